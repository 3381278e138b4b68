"""Prompts: without tokens a prompted tower is the library's, with them only they learn; stage 1 keeps what it learnt."""

import dataclasses
import math
import random

import msgspec
import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import SIZE, encoded, mistake, run, write
from msgspec.structs import replace
from torch.nn import functional as F

from edgeclip import disk, students, tokenizer, weights
from edgeclip import recipe as R
from edgeclip.cache import TeacherCache
from edgeclip.data import Dataset, shapes
from edgeclip.distill import promptsrc
from edgeclip.distill.train import train
from edgeclip.errors import EdgeclipError
from edgeclip.export import graph
from edgeclip.fold import fold
from edgeclip.pictures import Picture
from edgeclip.prompts import PromptedText, PromptedTower
from edgeclip.teachers import open_clip as teachers

VISION = {"image_size": SIZE, "layers": 3, "width": 24, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 20, "heads": 2, "layers": 3}
TINY = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
INIT = torch.tensor([320, 1125, 539, 320])  # "a photo of a"


def clip(vision=None, text=None, kind=open_clip.model.CLIP):
    torch.manual_seed(0)
    return kind(embed_dim=16, vision_cfg=VISION | (vision or {}), text_cfg=TEXT | (text or {})).eval()


def ids(length):
    """Two texts of different length in `length` ids: start, words, end, padding."""
    out = torch.zeros(2, length, dtype=torch.long)
    for row, words in zip(out, ([7, 8], [9, 10, 11]), strict=True):
        row[: len(words) + 2] = torch.tensor([49406, *words, 49407])
    return out


# --- identities


@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"no_ln_pre": True}, {"attentional_pool": True}], ids=str)
def test_an_image_tower_with_prompts_of_length_0_is_open_clips_bit_for_bit(vision):
    visual = clip(vision).visual
    with torch.inference_mode():
        assert torch.equal(PromptedTower(visual, 0, 3)(PIXELS), visual(PIXELS))


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_an_image_tower_with_prompts_of_length_0_is_timms_bit_for_bit(pool):
    vit = timm.create_model("test_vit", global_pool=pool, num_classes=0, img_size=SIZE).eval()
    with torch.inference_mode():
        assert torch.equal(PromptedTower(vit, 0, 2)(PIXELS), vit(PIXELS))


@pytest.mark.parametrize("kind", [open_clip.model.CLIP, open_clip.model.CustomTextCLIP])
@pytest.mark.parametrize("text", [{}, {"no_causal_mask": True}, {"pool_type": "last"}, {"proj_bias": True}, {"pool_type": "eos", "eos_id": 49407}], ids=str)
def test_a_text_tower_with_prompts_of_length_0_is_open_clips_bit_for_bit(kind, text):
    model = clip(text=text, kind=kind)
    with torch.inference_mode():
        assert torch.equal(PromptedText(model, 0, 3, INIT)(ids(12)), F.normalize(model.encode_text(ids(12)), dim=-1))


def test_text_prompts_of_depth_1_start_as_the_words_they_are_initialised_from():
    model = clip()
    words = torch.cat([ids(8)[:, :1], INIT.expand(2, -1), ids(8)[:, 1:]], dim=1)  # "a photo of a" spelt out
    with torch.inference_mode():
        assert torch.equal(PromptedText(model, 4, 1, INIT)(ids(8)), F.normalize(model.encode_text(words), dim=-1))
    longer = PromptedText(model, 6, 2, INIT)
    assert torch.equal(longer.prompts[0, :4], model.token_embedding(INIT)) and longer.prompts.shape == (2, 6, 20)


def test_every_prompt_reaches_the_output_and_their_order_matters_where_they_have_positions():
    """Positions are added to the text prompts of the first block only; attention itself knows no order."""
    model = clip()
    image, text = PromptedTower(model.visual, 4, 3), PromptedText(model, 4, 3, INIT)
    with torch.no_grad():
        for module, x, ordered in ((image, PIXELS, []), (text, ids(8), [0])):
            module.prompts.copy_(torch.randn(module.prompts.shape))
            before, kept = module(x), module.prompts.clone()
            for block in range(3):
                module.prompts[block] = kept[block].flip(0)
                assert torch.allclose(module(x), before, atol=1e-5) is (block not in ordered)
                module.prompts[block] = torch.randn(kept[block].shape)
                assert not torch.allclose(module(x), before, atol=1e-3)
                module.prompts.copy_(kept)
            module.prompts.copy_(kept.flip(0))  # from block to block the order matters
            assert not torch.allclose(module(x), before, atol=1e-3)


def test_folding_keeps_a_prompted_tower():
    tower = PromptedTower(clip().visual, 2, 3)
    with torch.inference_mode():
        torch.testing.assert_close(fold(tower, PIXELS)(PIXELS), tower(PIXELS))


def test_towers_that_take_no_prompts_are_refused():
    with pytest.raises(EdgeclipError, match=r"the image tower has 3 blocks; use a depth of 1 to 3"):
        PromptedTower(clip().visual, 4, 4)
    with pytest.raises(EdgeclipError, match=r"the text tower has 2 blocks"):
        PromptedText(clip(text={"layers": 2}), 4, 3, INIT)
    with pytest.raises(EdgeclipError, match=r"no ViT of open_clip or timm; choose a ViT"):
        PromptedTower(timm.create_model("test_resnet"), 4, 2)
    with pytest.raises(EdgeclipError, match=r"not CLIP's plain transformer"):
        PromptedText(clip(text={"embed_cls": True}, kind=open_clip.model.CustomTextCLIP), 4, 2, INIT)


# --- PromptSRC's closed forms


def test_epoch_weights_are_a_gaussian_that_sums_to_one():
    w = promptsrc.epoch_weights(20, 15.0, 1.0)
    assert w.sum().item() == pytest.approx(1) and w.argmax() == 14
    assert (w[15] / w[14]).item() == pytest.approx(math.exp(-1 / 2)) and w[12].item() == pytest.approx(w[16].item())
    torch.testing.assert_close(promptsrc.epoch_weights(4, 2.5, 1e9), torch.full((4,), 0.25, dtype=torch.float64))
    assert promptsrc.epoch_weights(2, 1000.0, 0.1).tolist() == [0.0, 1.0]  # far off: the nearest epoch, not 0 / 0


def test_the_learning_rate_is_constant_then_a_half_cosine():
    spec = R.Prompts(epochs=5, warmup_epochs=1, warmup_lr=1e-5, lr=0.1)
    assert [promptsrc.learning_rate(e, spec) for e in range(5)] == pytest.approx([1e-5, 0.1, 0.1 * (2 + math.sqrt(2)) / 4, 0.05, 0.1 * (2 - math.sqrt(2)) / 4])


def test_the_losses_against_a_case_by_hand():
    u, w = torch.tensor([[0.6, 0.8]]), torch.eye(2)
    got = promptsrc.losses(u, torch.tensor([[1.0, 0.0]]), w, w, torch.tensor([1]), 10.0)
    q = np.exp([6.0, 8.0]) / np.exp([6.0, 8.0]).sum()
    q0 = np.exp([10.0, 0.0]) / np.exp([10.0, 0.0]).sum()
    expected = {"cross_entropy": -np.log(q[1]), "image": (0.4 + 0.8) / 2, "text": 0.0, "logit": (q0 * np.log(q0 / q)).sum() / 2}
    assert {k: v.item() for k, v in got.items()} == pytest.approx(expected)
    same = promptsrc.losses(u, u, w, w, torch.tensor([1]), 10.0)
    assert same["image"] == same["text"] == same["logit"] == 0


# --- stage 1


def coloured(folder, count, classes, draw, seed=0):
    """`count` labelled PNGs of shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, out = random.Random(seed), []
    for i in range(count):
        label = classes[i % len(classes)]
        path = folder / f"{i}.png"
        path.write_bytes(encoded(draw(label, rng)))
        out.append(Picture(key=f"{folder.name}/{i}", path=str(path), label=label))
    return out


def dataset(labelled, train=None):
    return Dataset(
        name="toy", licence="none", classes=shapes.CLASSES, templates=("a {c}", "a photo of a {c}"), labelled=labelled,
        train=train or labelled, train_classes=list(range(len(shapes.CLASSES))), evaluation=[],
    )  # fmt: skip


SPEC = R.Prompts(length=4, depth=3, epochs=3, batch_size=4, lr=0.05, average_mean=3.0)
TEACHER = R.OpenClip(model="tiny", weights="random", config=TINY)
RECIPE = R.Recipe(
    data=R.Folders(name="toy", root="."), teacher=TEACHER, adapt=SPEC, losses=R.Losses(kl=R.KL()), student=R.Student(tower=TEACHER),
    views=R.Views(scale=(0.8, 1.0), flip=0.0),
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("labelled"), 12, [0, 1, 2, 3], shapes.draw)


def stage_1(labelled, folder, asked=RECIPE):
    teacher = teachers.load(asked.teacher)
    prompted = promptsrc.with_prompts(teacher, asked.adapt, asked.seed)
    return teacher, promptsrc.adapt(teacher, prompted, dataset(labelled), asked, folder, CPU)


def test_only_prompts_are_trained_and_they_are_read_back(labelled, tmp_path):
    teacher, adapted = stage_1(labelled, tmp_path / "teacher")
    untouched = weights.open_clip_model(TEACHER)[0].state_dict()
    trained = adapted.text.module.model.state_dict()
    assert all(torch.equal(untouched[k], trained[k]) for k in untouched)
    start = promptsrc.with_prompts(teachers.load(TEACHER), SPEC, 0)
    assert not torch.equal(start.tower.prompts, adapted.tower.prompts)
    assert not torch.equal(start.text.module.prompts, adapted.text.module.prompts)

    _, again = stage_1([], tmp_path / "teacher", replace(RECIPE, seed=5))  # nothing labelled: it is read, not trained
    assert again.identity == adapted.identity and adapted.identity["prompts"] == disk.sha256(tmp_path / "teacher" / "prompts.safetensors")
    assert again.identity | teacher.identity != teacher.identity
    names = ["red circle.", "blue square."]
    assert torch.equal(again.encode_text(names), adapted.encode_text(names)) and not torch.equal(adapted.encode_text(names), teacher.encode_text(names))
    with torch.inference_mode():
        assert torch.equal(again.tower(PIXELS), adapted.tower(PIXELS)) and not torch.equal(adapted.tower(PIXELS), teacher.tower(PIXELS))
    (log,) = [disk.read_manifest(tmp_path / "teacher", "adapted teacher")["log"]]
    assert [row["epoch"] for row in log] == [1, 2, 3] and {"loss", "cross_entropy", "image", "text", "logit"} < log[0].keys()


def test_without_a_learning_rate_the_average_is_where_it_started(labelled, tmp_path):
    asked = replace(RECIPE, adapt=replace(SPEC, lr=0.0, warmup_lr=0.0))
    _, adapted = stage_1(labelled, tmp_path / "teacher", asked)
    start = promptsrc.with_prompts(teachers.load(TEACHER), SPEC, 0)
    assert torch.equal(start.tower.prompts, adapted.tower.prompts) and torch.equal(start.text.module.prompts, adapted.text.module.prompts)


def test_the_text_side_that_ships_gives_words_the_same_context(labelled, tmp_path):
    _, adapted = stage_1(labelled, tmp_path / "teacher")
    text = promptsrc.load_text(TEACHER, SPEC, tmp_path / "teacher")
    assert text.context_length == TEXT["context_length"] - SPEC.length
    words = tokenizer.load(text.tokenizer, text.context_length)
    two = torch.from_numpy(tokenizer.encode(words, ["red circle.", "pear."], text.context_length))
    with torch.inference_mode():
        expected = adapted.encode_text(["red circle.", "pear."])
        torch.testing.assert_close(text.module(two), expected)
    model = graph.to_onnx(text.module, two, "input_ids", "text_features", 17)
    np.testing.assert_allclose(onnx_run(model, two.numpy()), expected.numpy(), atol=1e-5)
    with pytest.raises(EdgeclipError, match=r"has 10 tokens, the text encoder takes 8"):
        adapted.encode_text(["a b c d e f g h"])


def test_mistakes_of_stage_1(labelled, tmp_path):
    with pytest.raises(EdgeclipError, match="no labelled pictures"):
        stage_1([], tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    stage_1(labelled[:4], tmp_path / "teacher")
    with pytest.raises(EdgeclipError, match="prompts of another teacher"):
        stage_1(labelled[:4], tmp_path / "teacher", replace(RECIPE, teacher=replace(TEACHER, seed=1)))
    content = bytearray((tmp_path / "teacher" / "prompts.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "teacher" / "prompts.safetensors").write_bytes(content)
    with pytest.raises(EdgeclipError, match=r"prompts\.safetensors was changed"):
        stage_1(labelled[:4], tmp_path / "teacher")


def test_shots_take_as_many_of_each_class():
    pictures = [Picture(key=str(i), path="", label=i % 3) for i in range(10)]
    taken = promptsrc._shots(pictures, 2, 0)
    assert [p.label for p in taken] == [0, 0, 1, 1, 2, 2] and taken == promptsrc._shots(pictures, 2, 0) and len(set(taken)) == 6
    assert len(promptsrc._shots(pictures, 100, 0)) == 10 and promptsrc._shots(pictures, None, 0) == pictures


# --- the student


def onnx_run(model, x):
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


TOWERS = {
    "open_clip": R.OpenClip(model="tiny", weights="random", config=TINY),
    "timm": R.Timm(model="test_vit", weights="random", image_size=160),
}


def student_spec(tower, freeze=True):
    return R.Student(tower=TOWERS[tower], projector_hidden=20, visual_prompts=R.VisualPrompts(length=4, depth=3, freeze_tower=freeze))


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_the_papers_student_trains_prompts_projector_and_edu_attention_only():
    d, hidden, width, out = 12, 20, VISION["width"], TINY["embed_dim"]
    student, _ = students.build(student_spec("open_clip"), d)
    projector = out * hidden + 2 * hidden + hidden * d + d  # Linear without bias, BatchNorm, Linear
    assert trainable(student) == 3 * 4 * width + projector
    assert trainable(students.EduAttentionHead(d, 0.1)) == d * d + d + 1
    free, _ = students.build(student_spec("open_clip", freeze=False), d)
    assert trainable(free) == weights.parameters(free) == weights.parameters(student)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_prompted_student_comes_back_bit_for_bit_and_exports(tower, tmp_path):
    spec = student_spec(tower)
    student, preprocess = students.build(spec, 12)
    description = {
        "architecture": msgspec.to_builtins(spec), "embed_dim": 12, "edu_attention_temperature": None,
        "preprocess": msgspec.to_builtins(preprocess), "labels": [],
    }  # fmt: skip
    students.save(tmp_path / "s", student, None, description, np.zeros((0, 12), np.float32))
    torch.manual_seed(99)
    back = students.load(tmp_path / "s")[0]
    x = torch.randn(3, 3, preprocess.size, preprocess.size)
    with torch.inference_mode():
        expected = student(x)
        assert torch.equal(back(x), expected)
    model = graph.to_onnx(fold(back, x[:1]), x[:1], "pixels", "image_features", 17)
    for batch in (1, 3):
        np.testing.assert_allclose(onnx_run(model, x[:batch].numpy()), expected[:batch].numpy(), atol=1e-5)


def test_a_student_that_is_no_vit_takes_no_prompts():
    spec = R.Student(tower=R.Timm(model="test_resnet", weights="random", image_size=64), visual_prompts=R.VisualPrompts(depth=1))
    with pytest.raises(EdgeclipError, match="no ViT of open_clip or timm"):
        students.build(spec, 12)


@pytest.mark.parametrize("freeze", [True, False])
def test_training_moves_what_is_not_frozen_and_the_frozen_tower_stays_in_eval(freeze, tmp_path):
    spec = student_spec("open_clip", freeze)
    pictures = coloured(tmp_path / "photos", 8, [0, 1], shapes.draw)
    views = np.tile(np.array([0, 0, 72, 72, 0], np.float32), (8, 1, 1))
    rows = np.random.default_rng(0).normal(size=(8, 1, 12)).astype(np.float16)
    cached = TeacherCache(tmp_path, {}, pictures, rows, views, np.eye(4, 12, dtype=np.float32), None)
    student, preprocess = students.build(spec, 12)
    modes = []
    student.tower.vit.ln_post.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    asked = replace(RECIPE, student=spec, train=R.Train(epochs=1, batch_size=4, lr=0.1, optimizer="sgd", momentum=0.9, device="cpu"))
    teacher = dataclasses.replace(teachers.load(TEACHER), embed_dim=12)
    train(student, None, teacher, cached, preprocess, [0, 1, 2, 3], asked, CPU)
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert {k for k in moved if k.startswith("tower.vit.")} == (set() if freeze else {k for k in before if k.startswith("tower.vit.")})
    assert "tower.prompts" in moved and "projector.0.weight" in moved
    assert modes and set(modes) == {not freeze}
    assert all((p.grad is None) is freeze for p in student.tower.vit.parameters())


# --- the whole path


PATH = f"""
data: {{kind: webdataset, name: shapes, root: ROOT, protocol: base_to_novel}}
teacher: &tiny
  kind: open_clip
  model: tiny
  weights: random
  config: {{embed_dim: 16, vision_cfg: {VISION}, text_cfg: {TEXT}}}
adapt: {{kind: prompts, length: 4, depth: 3, shots: 2, epochs: 2, average_mean: 2}}
student:
  tower: *tiny
  projector_hidden: 20
  visual_prompts: {{length: 4, depth: 3}}
losses: {{kl: {{weight: 1000, reduction: promptkd}}, if_align: {{weight: 1}}, edu_attention: {{}}}}
train: {{epochs: 1, batch_size: 32, optimizer: sgd, lr: 0.005, device: cpu}}
"""


def test_vit_to_vit_from_recipe_to_bundle(here):
    from edgeclip.bundle import Bundle

    shapes.write(here / "shapes")
    write(here, PATH.replace("ROOT", "shapes"))
    assert run("distill", "r.yaml").exit_code == 0
    results = disk.read_json(here / "runs/r/results.json")
    assert [s["name"] for s in results["sets"]] == ["base", "novel"] and "prompted" in results["models"]["teacher"]["name"]
    description = disk.read_json(here / "runs/r/student/student.json")
    assert description["templates"] == ["{c}."]
    identity = disk.read_json(next((here / "cache").iterdir()) / disk.MANIFEST)["teacher"]
    assert identity["prompts"] == disk.sha256(here / "runs/r/teacher/prompts.safetensors")
    assert run("export", "--target", "onnx-fp32").exit_code == 0
    bundle = Bundle.load(here / "runs/r/bundles/onnx-fp32")
    np.testing.assert_allclose(bundle.bake(shapes.CLASSES), bundle.class_features, atol=1e-5)  # words get the learnt context


def test_adapt_and_teacher_must_belong_together(here):
    said = mistake(
        "distill",
        write(here, PATH.replace("kind: prompts, length: 4, depth: 3, shots: 2, epochs: 2, average_mean: 2", "kind: residual_head")),
        says="residual_head is for",
    )
    assert "use kind: prompts" in said
    shapes.write(here / "shapes")
    mistake("distill", write(here, PATH.replace("depth: 3, shots", "depth: 5, shots").replace("ROOT", "shapes")), says="has 3 blocks", only_line=False)
    assert not (here / "runs").exists()
