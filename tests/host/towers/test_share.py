"""Shared blocks: the weights of n blocks, the depth of n * m, and the same answers after saving
and after export.
"""

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch

from edgeclip.device.bundle import Bundle
from edgeclip.device.images import read
from edgeclip.device.preprocess import normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.export import export
from edgeclip.host.graph import trace as graph
from edgeclip.host.towers import counting
from edgeclip.host.towers.fold import fold
from edgeclip.host.towers.share import swapped
from tests.support.toy_bundle import WIDTH, toy_target

OPEN_CLIP = R.OpenClip(
    model="own",
    weights="random",
    config={
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 32,
            "layers": 4,
            "width": 32,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
    },
)
TIMM = R.Timm(model="test_vit", weights="random", image_size=64)
BOTH = pytest.mark.parametrize("tower", [OPEN_CLIP, TIMM], ids=["open_clip", "timm"])


def build(tower, share):
    return students.build(R.Student(tower=tower, projector_hidden=None, share=share), 6)


def blocks(student):
    tower = student.tower
    return tower.visual.transformer.resblocks if hasattr(tower, "visual") else tower.blocks


def attention(block):
    """The stacked query, key and value projections: weight, bias."""
    a = block.attn
    return (a.qkv.weight, a.qkv.bias) if hasattr(a, "qkv") else (a.in_proj_weight, a.in_proj_bias)


@BOTH
def test_it_weighs_as_its_unique_blocks_and_runs_as_deep_as_all_passes(tower):
    whole, preprocess = build(tower, None)
    shared = build(tower, R.Share(blocks=2, times=3))[0]
    assert len(blocks(shared)) == 6
    one = counting.parameters(next(blocks(whole).children()))
    assert counting.parameters(whole) - counting.parameters(shared) == one * (
        len(blocks(whole)) - 2
    )
    macs = {
        (n, m): counting.macs(build(tower, R.Share(blocks=n, times=m))[0], preprocess.size)
        for n, m in ((1, 1), (1, 2), (2, 3))
    }
    assert macs[2, 3] == macs[1, 1] + 5 * (macs[1, 2] - macs[1, 1])


@BOTH
def test_one_pass_of_all_blocks_is_the_plain_tower(tower):
    whole, preprocess = build(tower, None)
    x = torch.randn(2, 3, preprocess.size, preprocess.size)
    shared = build(tower, R.Share(blocks=len(blocks(whole)), times=1))[0]
    torch.testing.assert_close(shared(x), whole(x))


@BOTH
def test_a_swapped_block_is_the_block_with_query_and_key_weights_exchanged(tower):
    block, other = (next(blocks(build(tower, None)[0]).children()) for _ in range(2))
    with torch.no_grad():
        for own, exchanged in zip(attention(block), attention(other), strict=True):
            own.normal_(std=0.3)
            query, key, value = own.chunk(3)
            exchanged.copy_(torch.cat([key, query, value]))
    x = torch.randn(2, 5, attention(block)[0].shape[1])
    torch.testing.assert_close(swapped(block, x), other(x))
    assert not torch.allclose(block(x), other(x), atol=1e-3)
    torch.testing.assert_close(swapped(block, x), other(x))  # the block itself is as it was


@BOTH
def test_query_key_and_value_are_trained_through_both_passes(tower):
    student, preprocess = build(tower, R.Share(blocks=1, times=2))
    student(torch.randn(2, 3, preprocess.size, preprocess.size))[:, 0].sum().backward()
    gradient = attention(blocks(student).unique[0])[0].grad
    assert all(part.abs().sum() > 0 for part in gradient.chunk(3))


@BOTH
def test_a_shared_student_comes_back_from_disk(tower, tmp_path):
    spec = R.Student(tower=tower, projector_hidden=None, share=R.Share(blocks=2, times=2))
    student, preprocess = students.build(spec, 6)
    description = {
        "architecture": msgspec.to_builtins(spec),
        "embed_dim": 6,
        "edu_attention": None,
        "preprocess": msgspec.to_builtins(preprocess),
    }
    students.save(tmp_path / "s", student, None, description, np.zeros((0, 6), np.float32))
    x = torch.randn(2, 3, preprocess.size, preprocess.size)
    assert torch.equal(students.load(tmp_path / "s")[0](x), student(x))


@BOTH
def test_the_exported_graph_answers_as_torch_and_holds_a_second_copy_of_what_is_exchanged_only(
    tower,
):
    numbers = {}
    for shuffle in (False, True):
        student, preprocess = build(tower, R.Share(blocks=2, times=3, shuffle=shuffle))
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.05 * torch.randn_like(p))  # the exporter would merge equal zeros
        x = torch.randn(3, 3, preprocess.size, preprocess.size)
        model = graph.to_onnx(fold(student, x), x[:1], "pixels", "image_features", 17)
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        np.testing.assert_allclose(
            session.run(None, {"pixels": x.numpy()})[0], student(x).detach().numpy(), atol=1e-5
        )
        numbers[shuffle] = sum(
            v.size for v in graph.initializers(model).values() if v.dtype == np.float32
        )
        assert numbers[False] == pytest.approx(counting.parameters(student), rel=0.02)
    width = attention(blocks(student).unique[0])[0].shape[1]
    assert numbers[True] - numbers[False] == 2 * (3 * width**2 + 3 * width)


@pytest.mark.parametrize("target", ["onnx-fp32", "onnx-int8"])
def test_a_bundle_of_a_shared_student_is_the_student(source, tmp_path, target):
    student = students.build(
        R.Student(tower=OPEN_CLIP, projector_hidden=None, share=R.Share(blocks=2, times=2)), WIDTH
    )[0]
    shared = source._replace(image_encoder=student, load_text=None)
    bundle = Bundle.load(export(shared, target, toy_target(target), tmp_path / "bundle"))
    pixels = np.stack([bundle.pixels(read(p)) for p in shared.golden])
    with torch.inference_mode():
        expected = student(torch.from_numpy(normalize(pixels, shared.preprocess))).numpy()
    assert (bundle.encode_pixels(pixels) * expected).sum(axis=1).min() > (
        1 - 1e-6 if target == "onnx-fp32" else 0.99
    )
    print(target, bundle.manifest.image_encoder_bytes, counting.parameters(student))


def test_more_blocks_than_there_are_and_a_cnn_are_refused():
    with pytest.raises(
        EdgeclipError, match=r"share\.blocks: is 5, and student\.tower has 4 blocks"
    ):
        build(OPEN_CLIP, R.Share(blocks=5))
    with pytest.raises(EdgeclipError, match="no vision transformer"):
        build(
            R.Timm(model="mobilenetv4_conv_small_035", weights="random", image_size=64),
            R.Share(blocks=2),
        )
