"""Prompts: without tokens a prompted tower is the library's; a prompted student trains, returns
and exports as asked.
"""

import dataclasses

import msgspec
import numpy as np
import open_clip
import pytest
import timm
import torch
from torch.nn import functional as F

from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.cache import TeacherCache
from edgeclip.host.data import Dataset, shapes
from edgeclip.host.distill.targets import Lesson, Taught
from edgeclip.host.distill.train import train
from edgeclip.host.distill.training import Learner
from edgeclip.host.graph import trace as graph
from edgeclip.host.teachers import open_clip as teachers
from edgeclip.host.towers import counting
from edgeclip.host.towers.fold import fold
from edgeclip.host.towers.prompt_tokens import PromptedText, PromptedTower
from tests.support.prompted import PIXELS, TEACHER, TEXT, TINY, VISION, images_of, onnx_run
from tests.support.toy_bundle import SIZE

INIT = torch.tensor([320, 1125, 539, 320])  # "a photo of a"


def clip(vision=None, text=None, kind=open_clip.model.CLIP):
    torch.manual_seed(0)
    return kind(
        embed_dim=16, vision_cfg=VISION | (vision or {}), text_cfg=TEXT | (text or {})
    ).eval()


def ids(length):
    """Two texts of different length in `length` ids: start, words, end, padding."""
    out = torch.zeros(2, length, dtype=torch.long)
    for row, words in zip(out, ([7, 8], [9, 10, 11]), strict=True):
        row[: len(words) + 2] = torch.tensor([49406, *words, 49407])
    return out


# --- identities


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True},
        {"attentional_pool": True},
    ],
    ids=str,
)
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
@pytest.mark.parametrize(
    "text",
    [
        {},
        {"no_causal_mask": True},
        {"pool_type": "last"},
        {"proj_bias": True},
        {"pool_type": "eos", "eos_id": 49407},
    ],
    ids=str,
)
def test_a_text_tower_with_prompts_of_length_0_is_open_clips_bit_for_bit(kind, text):
    model = clip(text=text, kind=kind)
    with torch.inference_mode():
        assert torch.equal(
            PromptedText(model, 0, 3, INIT)(ids(12)),
            F.normalize(model.encode_text(ids(12)), dim=-1),
        )


def test_text_prompts_of_depth_1_start_as_the_words_they_are_initialized_from():
    model = clip()
    words = torch.cat(
        [ids(8)[:, :1], INIT.expand(2, -1), ids(8)[:, 1:]], dim=1
    )  # "a photo of a" spelt out
    with torch.inference_mode():
        assert torch.equal(
            PromptedText(model, 4, 1, INIT)(ids(8)), F.normalize(model.encode_text(words), dim=-1)
        )
    longer = PromptedText(model, 6, 2, INIT)
    assert torch.equal(
        longer.prompts[0, :4], model.token_embedding(INIT)
    ) and longer.prompts.shape == (2, 6, 20)


def test_padding_behind_the_end_changes_nothing_unless_the_tower_looks_at_it():
    with torch.inference_mode():
        for text in ({}, {"no_causal_mask": True}, {"pool_type": "last"}):
            module = PromptedText(clip(text=text), 4, 3, INIT)
            short = module.without_padding(ids(8))
            assert short.shape == ((2, 8) if text else (2, 5))
            torch.testing.assert_close(module(short), module(ids(8)))


def test_every_prompt_reaches_the_output_and_their_order_matters_where_they_have_positions():
    """Positions are added to the text prompts of the first block only; attention itself knows no
    order.
    """
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
        PromptedText(
            clip(text={"embed_cls": True}, kind=open_clip.model.CustomTextCLIP), 4, 2, INIT
        )


# --- the student


TOWERS = {
    "open_clip": TEACHER,
    "timm": R.Timm(model="test_vit", weights="random", image_size=160),
}


def student_spec(tower, freeze=True):
    return R.Student(
        tower=TOWERS[tower],
        projector_hidden=20,
        visual_prompts=R.VisualPrompts(length=4, depth=3, freeze_tower=freeze),
    )


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_the_papers_student_trains_prompts_projector_and_edu_attention_only():
    d, hidden, width, out = 12, 20, VISION["width"], TINY["embed_dim"]
    student, _ = students.build(student_spec("open_clip"), d)
    projector = out * hidden + 2 * hidden + hidden * d + d  # Linear without bias, BatchNorm, Linear
    assert trainable(student) == 3 * 4 * width + projector
    assert trainable(students.EduAttentionHead(d, R.EduAttention())) == d * d + d + 1
    free, _ = students.build(student_spec("open_clip", freeze=False), d)
    assert trainable(free) == counting.parameters(free) == counting.parameters(student)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_prompted_student_comes_back_bit_for_bit_and_exports(tower, tmp_path):
    spec = student_spec(tower)
    student, preprocess = students.build(spec, 12)
    description = {
        "architecture": msgspec.to_builtins(spec), "embed_dim": 12, "edu_attention": None,
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
        np.testing.assert_allclose(
            onnx_run(model, x[:batch].numpy()), expected[:batch].numpy(), atol=1e-5
        )


def test_a_student_that_is_no_vit_takes_no_prompts():
    spec = R.Student(
        tower=R.Timm(model="test_resnet", weights="random", image_size=64),
        visual_prompts=R.VisualPrompts(depth=1),
    )
    with pytest.raises(EdgeclipError, match="no ViT of open_clip or timm"):
        students.build(spec, 12)


@pytest.mark.parametrize("freeze", [True, False])
def test_training_moves_what_is_not_frozen_and_the_frozen_tower_stays_in_eval(freeze, tmp_path):
    spec = student_spec("open_clip", freeze)
    images = images_of(tmp_path / "photos", 8, [0, 1], shapes.draw)
    views = np.tile(np.array([0, 0, 72, 72, 0], np.float32), (8, 1, 1))
    rows = np.random.default_rng(0).normal(size=(8, 1, 12)).astype(np.float16)
    cached = TeacherCache(tmp_path, {}, images, rows, views, np.eye(4, 12, dtype=np.float32), None)
    student, preprocess = students.build(spec, 12)
    modes = []
    student.tower.vit.ln_post.register_forward_pre_hook(
        lambda module, _: modes.append(module.training)
    )
    before = {k: v.clone() for k, v in student.state_dict().items()}
    asked = R.Recipe(
        data=R.Folders(name="toy", root="."),
        teacher=TEACHER,
        student=spec,
        losses=R.Losses(kl=R.KL()),
        train=R.Train(batch_size=4, lr=0.1, optimizer="sgd", device="cpu"),
    )
    teacher = dataclasses.replace(teachers.load(TEACHER), embed_dim=12)
    data = Dataset("toy", "none", list("abcd"), ("{c}",), [], images, [0, 1, 2, 3], [])
    learner = Learner(student, None, preprocess)
    train(learner, Lesson(data, [Taught(teacher, cached)]), asked, torch.device("cpu"))
    moved = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert {k for k in moved if k.startswith("tower.vit.")} == (
        set() if freeze else {k for k in before if k.startswith("tower.vit.")}
    )
    assert "tower.prompts" in moved and "projector.0.weight" in moved
    assert modes and set(modes) == {not freeze}
    assert all((p.grad is None) is freeze for p in student.tower.vit.parameters())
