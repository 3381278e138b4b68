"""PromptSRC: its closed forms, what stage 1 keeps, and the whole path from a prompted teacher to a
prompted student.
"""

import math
import random

import numpy as np
import open_clip
import pytest
import torch
from msgspec.structs import replace
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch.nn import functional as F

from edgeclip import disk
from edgeclip.device import tokenizer
from edgeclip.device.images import ImageRef
from edgeclip.device.preprocess import Preprocess, normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.adapt import promptsrc
from edgeclip.host.cache import class_features
from edgeclip.host.data import Dataset, shapes
from edgeclip.host.graph import trace as graph
from edgeclip.host.teachers import open_clip as teachers
from edgeclip.host.towers import weights
from tests.support.command import mistake, run
from tests.support.files import write
from tests.support.prompted import PIXELS, TEACHER, TEXT, VISION, images_of, onnx_run
from tests.support.tokens import clip_words

# --- PromptSRC's closed forms


def test_epoch_weights_are_a_gaussian_that_sums_to_one():
    w = promptsrc.epoch_weights(20, 15.0, 1.0)
    assert w.sum().item() == pytest.approx(1) and w.argmax() == 14
    assert (w[15] / w[14]).item() == pytest.approx(math.exp(-1 / 2)) and w[
        12
    ].item() == pytest.approx(w[16].item())
    torch.testing.assert_close(
        promptsrc.epoch_weights(4, 2.5, 1e9), torch.full((4,), 0.25, dtype=torch.float64)
    )
    assert promptsrc.epoch_weights(2, 1000.0, 0.1).tolist() == [
        0.0,
        1.0,
    ]  # far off: the nearest epoch, not 0 / 0


def test_the_learning_rate_is_constant_then_a_cosine_as_long_as_the_whole_training():
    """Dassl's ConstantWarmupScheduler over CosineAnnealingLR(T_max = epochs), as PromptSRC has
    it.
    """
    spec = R.Prompts(epochs=4, warmup_epochs=1, warmup_lr=1e-5, lr=0.1)
    assert [promptsrc.learning_rate(e, spec) for e in range(4)] == pytest.approx(
        [1e-5, 0.1, 0.1 * (2 + math.sqrt(2)) / 4, 0.05]
    )


def test_the_losses_against_a_case_by_hand():
    u, w = torch.tensor([[0.6, 0.8]]), torch.eye(2)
    got = promptsrc.losses(u, torch.tensor([[1.0, 0.0]]), w, w, torch.tensor([1]), 10.0)
    q = np.exp([6.0, 8.0]) / np.exp([6.0, 8.0]).sum()
    q0 = np.exp([10.0, 0.0]) / np.exp([10.0, 0.0]).sum()
    expected = {
        "cross_entropy": -np.log(q[1]),
        "image": (0.4 + 0.8) / 2,
        "text": 0.0,
        "logit": (q0 * np.log(q0 / q)).sum() / 2,
    }
    assert {k: v.item() for k, v in got.items()} == pytest.approx(expected)
    same = promptsrc.losses(u, u, w, w, torch.tensor([1]), 10.0)
    assert same["image"] == same["text"] == same["logit"] == 0


# --- stage 1


def dataset(labeled, train=None):
    return Dataset(
        name="toy", license="none", classes=shapes.CLASSES, templates=("a {c}", "a photo of a {c}"), labeled=labeled,
        train=train or labeled, train_classes=list(range(len(shapes.CLASSES))), evaluation=[],
    )  # fmt: skip


SPEC = R.Prompts(length=4, depth=3, epochs=3, batch_size=4, lr=0.05, average_mean=3.0)
RECIPE = R.Recipe(
    data=R.Folders(name="toy", root="."), teacher=TEACHER, adapt=SPEC, losses=R.Losses(kl=R.KL()), student=R.Student(tower=TEACHER),
    views=R.Views(scale=(0.8, 1.0), flip=0.0),
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    return images_of(tmp_path_factory.mktemp("labeled"), 12, [0, 1, 2, 3], shapes.draw)


def stage_1(labeled, folder, asked=RECIPE):
    teacher, data = teachers.load(asked.teacher), dataset(labeled)
    prompted = promptsrc.with_prompts(teacher, data, [], asked.adapt, asked.seed)
    return teacher, promptsrc.adapt(teacher, prompted, data, asked, folder, CPU)


def test_only_prompts_are_trained_and_they_are_read_back(labeled, tmp_path):
    teacher, adapted = stage_1(labeled, tmp_path / "teacher")
    untouched = weights.open_clip_model(TEACHER)[0].state_dict()
    trained = adapted.text.module.model.state_dict()
    assert all(torch.equal(untouched[k], trained[k]) for k in untouched)
    start = promptsrc.with_prompts(teachers.load(TEACHER), dataset(labeled), [], SPEC, 0)
    assert not torch.equal(start.tower.prompts, adapted.tower.prompts)
    assert not torch.equal(start.text.module.prompts, adapted.text.module.prompts)

    _, again = stage_1(
        labeled, tmp_path / "teacher", replace(RECIPE, seed=5)
    )  # another seed: it is read, not trained
    assert again.identity == adapted.identity and adapted.identity["prompts"] == disk.sha256(
        tmp_path / "teacher" / "prompts.safetensors"
    )
    assert again.identity | teacher.identity != teacher.identity
    names = ["red circle.", "blue square."]
    assert torch.equal(again.encode_text(names), adapted.encode_text(names)) and not torch.equal(
        adapted.encode_text(names), teacher.encode_text(names)
    )
    with torch.inference_mode():
        assert torch.equal(again.tower(PIXELS), adapted.tower(PIXELS)) and not torch.equal(
            adapted.tower(PIXELS), teacher.tower(PIXELS)
        )
    (log,) = [disk.read_manifest(tmp_path / "teacher", "adapted teacher")["log"]]
    assert [row["epoch"] for row in log] == [1, 2, 3] and {
        "loss",
        "cross_entropy",
        "image",
        "text",
        "logit",
    } < log[0].keys()


def test_without_a_learning_rate_the_average_is_where_it_started(labeled, tmp_path):
    asked = replace(RECIPE, adapt=replace(SPEC, lr=0.0, warmup_lr=0.0))
    _, adapted = stage_1(labeled, tmp_path / "teacher", asked)
    start = promptsrc.with_prompts(teachers.load(TEACHER), dataset(labeled), [], SPEC, 0)
    assert torch.equal(start.tower.prompts, adapted.tower.prompts) and torch.equal(
        start.text.module.prompts, adapted.text.module.prompts
    )


def test_the_text_side_that_ships_gives_words_the_same_context(labeled, tmp_path):
    _, adapted = stage_1(labeled, tmp_path / "teacher")
    text = promptsrc.load_text(TEACHER, SPEC, tmp_path / "teacher")
    assert text.context_length == TEXT["context_length"] - SPEC.length
    two = torch.from_numpy(tokenizer.encode(text.words(), ["red circle.", "pear."]))
    with torch.inference_mode():
        expected = adapted.encode_text(["red circle.", "pear."])
        torch.testing.assert_close(text.module(two), expected)
    model = graph.to_onnx(text.module, two, "input_ids", "text_features", 17)
    np.testing.assert_allclose(onnx_run(model, two.numpy()), expected.numpy(), atol=1e-5)
    with pytest.raises(EdgeclipError, match=r"has 10 tokens, the text encoder takes 8"):
        adapted.encode_text(["a b c d e f g h"])


def test_mistakes_of_stage_1(labeled, tmp_path):
    with pytest.raises(EdgeclipError, match="no labeled images"):
        stage_1([], tmp_path / "teacher")
    with pytest.raises(EdgeclipError, match=r"has 9 tokens, the text encoder takes 7"):
        promptsrc.with_prompts(
            teachers.load(TEACHER),
            dataset(labeled)._replace(classes=["a b c d e f"]),
            [],
            replace(SPEC, length=5),
            0,
        )
    assert not (tmp_path / "teacher").exists()
    stage_1(labeled[:4], tmp_path / "teacher")
    with pytest.raises(EdgeclipError, match="prompts of another teacher"):
        stage_1(
            labeled[:4], tmp_path / "teacher", replace(RECIPE, teacher=replace(TEACHER, seed=1))
        )
    content = bytearray((tmp_path / "teacher" / "prompts.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "teacher" / "prompts.safetensors").write_bytes(content)
    with pytest.raises(EdgeclipError, match=r"prompts\.safetensors was changed"):
        stage_1(labeled[:4], tmp_path / "teacher")


def test_shots_take_as_many_of_each_class():
    images = [ImageRef(key=str(i), path="", label=i % 3) for i in range(10)]
    taken = promptsrc._shots(images, 2, 0)
    assert [p.label for p in taken] == [0, 0, 1, 1, 2, 2]
    assert taken == promptsrc._shots(images, 2, 0)
    assert len(set(taken)) == 6
    assert (
        len(promptsrc._shots(images, 100, 0)) == 10 and promptsrc._shots(images, None, 0) == images
    )


# --- the whole path


TOWER = f"""
  kind: open_clip
  model: tiny
  weights: random
  config: {{embed_dim: 16, vision_cfg: {VISION}, text_cfg: {TEXT}}}
"""
PATH = f"""
data: {{kind: webdataset, name: shapes, root: ROOT, protocol: base_to_novel}}
teacher: {TOWER}
adapt: {{kind: prompts, length: 4, depth: 3, shots: 2, epochs: 2, average_mean: 2}}
student:
  tower: {TOWER.replace("  ", "    ")}
  projector_hidden: 20
  visual_prompts: {{length: 4, depth: 3}}
losses: {{kl: {{weight: 1000, reduction: promptkd}}, if_align: {{weight: 1}}, edu_attention: {{}}}}
train: {{epochs: 1, batch_size: 32, optimizer: sgd, lr: 0.005, device: cpu}}
"""


def test_vit_to_vit_from_recipe_to_bundle(here):
    from edgeclip.device.bundle import Bundle

    shapes.write(here / "shapes")
    write(here, PATH.replace("ROOT", "shapes"))
    assert run("distill", "r.yaml").exit_code == 0
    results = disk.read_json(here / "runs/r/results.json")
    assert [s["name"] for s in results["sets"]] == ["base", "novel"] and "prompted" in results[
        "models"
    ]["teacher"]["name"]
    description = disk.read_json(here / "runs/r/student/student.json")
    assert description["templates"] == ["{c}."]
    identity = disk.read_json(next((here / "cache").iterdir()) / disk.MANIFEST)["teacher"]
    assert identity["prompts"] == disk.sha256(here / "runs/r/teacher/prompts.safetensors")
    assert run("export", "--target", "onnx-fp32").exit_code == 0
    bundle = Bundle.load(here / "runs/r/bundles/onnx-fp32")
    np.testing.assert_allclose(
        bundle.bake(shapes.CLASSES), bundle.class_features, atol=1e-5
    )  # words get the learned context


def test_adapt_and_teacher_must_belong_together(here):
    said = mistake(
        "distill",
        write(
            here,
            PATH.replace(
                "kind: prompts, length: 4, depth: 3, shots: 2, epochs: 2, average_mean: 2",
                "kind: residual_head",
            ),
        ),
        says="residual_head is for",
    )
    assert "use kind: prompts" in said
    shapes.write(here / "shapes")
    mistake(
        "distill",
        write(here, PATH.replace("depth: 3, shots", "depth: 5, shots").replace("ROOT", "shapes")),
        says="has 3 blocks",
        only_line=False,
    )
    assert not (here / "runs").exists()


# --- a CLIP that knows something


COLORS, FORMS = (
    ("red", "green", "blue", "yellow", "purple", "black"),
    ("circle", "square", "triangle", "cross"),
)
CLASSES = [f"{color} {form}" for color in COLORS for form in FORMS]
BASE = [
    i for i in range(len(CLASSES)) if (i // len(FORMS) + i % len(FORMS)) % 2 == 0
]  # every color, every form, half the pairs
NOVEL = [i for i in range(len(CLASSES)) if i not in BASE]
KNOWING = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEMPLATES = ("a photo of a {c}", "a {c}", "{c}.", "a drawing of a {c}.")
PREPROCESS = Preprocess(
    size=32, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
)


def draw(label, rng):
    color, form = CLASSES[label].split()
    image = Image.new("RGB", (32, 32), (rng.randint(170, 255),) * 3)
    side = rng.randint(16, 24)
    x, y = rng.randint(1, 30 - side), rng.randint(1, 30 - side)
    pen, third = ImageDraw.Draw(image), side // 3
    if form == "circle":
        pen.ellipse((x, y, x + side, y + side), fill=color)
    elif form == "square":
        pen.rectangle((x, y, x + side, y + side), fill=color)
    elif form == "triangle":
        pen.polygon([(x, y + side), (x + side // 2, y), (x + side, y + side)], fill=color)
    else:
        pen.rectangle((x + third, y, x + side - third, y + side), fill=color)
        pen.rectangle((x, y + third, x + side, y + side - third), fill=color)
    return image


def draw_under_green_light(label, rng):
    return Image.fromarray((np.asarray(draw(label, rng)) * (0.5, 1.0, 0.6)).astype(np.uint8))


def train_clip(steps):
    """A tiny CLIP from scratch: each image against the captions of all classes, in templates that
    take turns.
    """
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**KNOWING).train()
    words = clip_words(16)
    captions = [
        torch.from_numpy(tokenizer.encode(words, [t.replace("{c}", c) for c in CLASSES]))
        for t in TEMPLATES
    ]
    rng = random.Random(0)
    label = torch.arange(120 * len(CLASSES)) % len(CLASSES)
    pixels = torch.from_numpy(
        normalize(np.stack([np.asarray(draw(i, rng)) for i in label.tolist()]), PREPROCESS)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        pick = torch.randint(len(pixels), (96,))
        u = model.encode_image(pixels[pick], normalize=True)
        w = model.encode_text(captions[step % len(captions)], normalize=True)
        loss = F.cross_entropy(model.logit_scale.exp() * u @ w.T, label[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def accuracy(teacher, images, classes, templates):
    pixels = np.stack([np.asarray(Image.open(p.path)) for p in images])
    with torch.inference_mode():
        u = F.normalize(
            teacher.tower(torch.from_numpy(normalize(pixels, PREPROCESS))), dim=-1
        ).numpy()
    w = class_features(teacher, [CLASSES[c] for c in classes], templates)
    return float((np.array(classes)[(u @ w.T).argmax(axis=1)] == [p.label for p in images]).mean())


@pytest.mark.slow
def test_prompts_learn_a_domain_on_base_classes_and_do_not_harm_the_novel_ones(tmp_path):
    """A CLIP of white light, 16 labeled images a base class under green light: +10 pp on base, at
    most -2 pp on novel.
    """
    save_file(train_clip(steps=400).state_dict(), tmp_path / "clip.safetensors")
    weights = str(tmp_path / "clip.safetensors")
    spec = R.OpenClip(model="tiny", weights=weights, config=KNOWING, like="default")
    asked = replace(RECIPE, teacher=spec, adapt=R.Prompts(depth=2), views=R.Views(scale=(0.8, 1.0)))
    labeled = images_of(tmp_path / "labeled", 16 * len(BASE), BASE, draw_under_green_light, seed=1)
    test = {
        part: images_of(tmp_path / part, 600, classes, draw_under_green_light, seed=2)
        for part, classes in (("base", BASE), ("novel", NOVEL))
    }
    teacher, data = (
        teachers.load(spec),
        dataset(labeled)._replace(classes=CLASSES, templates=TEMPLATES),
    )
    prompted = promptsrc.with_prompts(teacher, data, [], asked.adapt, asked.seed)
    adapted = promptsrc.adapt(teacher, prompted, data, asked, tmp_path / "teacher", CPU)

    plain = images_of(tmp_path / "plain", 600, BASE, draw, seed=3)
    assert accuracy(teacher, plain, BASE, TEMPLATES) > 0.9  # it does know its own domain
    before = {
        part: accuracy(teacher, test[part], classes, TEMPLATES)
        for part, classes in (("base", BASE), ("novel", NOVEL))
    }
    after = {
        part: accuracy(adapted, test[part], classes, promptsrc.TEMPLATES)
        for part, classes in (("base", BASE), ("novel", NOVEL))
    }
    assert after["base"] >= before["base"] + 0.10, (before, after)
    assert after["novel"] >= before["novel"] - 0.02, (before, after)
