"""A ViT student takes the leading slices of a larger ViT, and the same function where the cut
channels carried nothing.
"""

import msgspec
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from edgeclip.config import BrokenRule
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.towers.inherit import inherit, inherit_from, resample
from tests.support.command import mistake
from tests.support.files import snapshot, write
from tests.support.tiny_recipe import RECIPE


def timm_vit(width, depth, seed, size=32, head_dim=8, **kwargs):
    torch.manual_seed(seed)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=size,
        patch_size=8,
        embed_dim=width,
        depth=depth,
        num_heads=width // head_dim,
        num_classes=0,
        **kwargs,
    )
    return randomised(model)


def open_clip_vit(width, depth, seed, size=32, head_dim=8, embed_dim=12):
    spec = R.OpenClip(
        model="own",
        weights="random",
        seed=seed,
        config={
            "embed_dim": embed_dim,
            "vision_cfg": {
                "image_size": size,
                "layers": depth,
                "width": width,
                "head_width": head_dim,
                "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 8,
                "vocab_size": 16,
                "width": 8,
                "heads": 1,
                "layers": 1,
            },
        },
    )
    return randomised(students.image_tower(spec)[0])


def randomised(model):
    """Norm gains and biases away from 1 and 0, so that a wrong slice of them shows."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


BOTH = pytest.mark.parametrize("vit", [timm_vit, open_clip_vit])


def pixels(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@BOTH
def test_a_student_of_the_teachers_shape_is_the_teacher(vit):
    teacher, student = vit(16, 2, seed=1), vit(16, 2, seed=2)
    inherit_from(student, teacher)
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    assert torch.equal(student(pixels()), teacher(pixels()))


@BOTH
def test_every_tensor_is_the_leading_slice_of_every_other_layers(vit):
    teacher, student = vit(32, 4, seed=1), vit(16, 2, seed=2)
    inherit_from(student, teacher)
    larger = teacher.state_dict()
    for name, own in student.state_dict().items():
        source = name.replace("blocks.1.", "blocks.2.")
        if (
            "qkv" in name or "in_proj" in name
        ):  # rows: 32 of the queries, 32 of the keys, 32 of the values
            for i in range(3):
                assert torch.equal(
                    own[16 * i : 16 * i + 16],
                    larger[source][32 * i : 32 * i + 16][
                        ..., : own.shape[-1] if own.ndim == 2 else None
                    ],
                )
        else:
            assert torch.equal(own, larger[source][tuple(slice(n) for n in own.shape)]), name


@BOTH
def test_a_half_width_half_depth_student_runs_at_another_size(vit):
    teacher, student = vit(32, 4, seed=1, size=64), vit(16, 2, seed=2)
    inherit_from(student, teacher)
    assert student(pixels()).isfinite().all()


@BOTH
def test_where_the_cut_channels_carry_nothing_the_function_is_kept(vit):
    """The teacher's upper residual channels copy the lower ones, so LayerNorm sees the same mean
    and variance, and nothing reads them; its upper heads, hidden units and odd layers write
    nothing.
    """
    small, teacher, student = vit(16, 2, seed=1), vit(32, 4, seed=2), vit(16, 2, seed=3)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            own = small.get_parameter(
                name.replace("blocks.1.", "blocks.0.")
                .replace("blocks.2.", "blocks.1.")
                .replace("blocks.3.", "blocks.1.")
            )
            writes = name.endswith(
                (
                    "out_proj.weight",
                    "out_proj.bias",
                    "attn.proj.weight",
                    "attn.proj.bias",
                    "fc2.weight",
                    "fc2.bias",
                    "c_proj.weight",
                    "c_proj.bias",
                )
            )
            if "qkv" in name or "in_proj" in name:
                for i in range(3):
                    p[32 * i : 32 * i + 16] = (
                        torch.cat([o := own[16 * i : 16 * i + 16], 0 * o], dim=-1)
                        if p.ndim == 2
                        else own[16 * i : 16 * i + 16]
                    )
            elif "fc1" in name or "c_fc" in name:
                p[: len(own)] = torch.cat([own, 0 * own], dim=-1) if p.ndim == 2 else own
            elif name.endswith("visual.proj"):
                p.copy_(torch.cat([own, 0 * own]))
            elif writes:
                p.copy_(
                    torch.cat([torch.cat([own, 0 * own], dim=-1)] * 2)
                    if p.ndim == 2
                    else torch.cat([own, own])
                )
                if "blocks.1." in name or "blocks.3." in name:
                    p.zero_()
            else:
                axis = 0 if name.endswith(("conv1.weight", "patch_embed.proj.weight")) else -1
                p.copy_(torch.cat([own, own], dim=axis))
    inherit_from(student, teacher)
    out, expected = student(pixels()), teacher(pixels())
    torch.testing.assert_close(out, expected[:, : out.shape[1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, small(pixels()))


def test_positions_keep_their_class_row_and_a_plane_stays_a_plane():
    row = torch.arange(16.0)
    plane = (row[:, None] + 2 * row[None, :]).reshape(256, 1)
    positions = torch.cat([torch.full((1, 1), 7.0), plane])
    small = resample(positions, 65, 1)
    assert small[0] == 7 and resample(positions, 257, 1) is positions
    middle = torch.arange(2, 6) * 2 + 0.5  # away from the border, where there is less to average
    torch.testing.assert_close(
        small[1:].reshape(8, 8)[2:6, 2:6], middle[:, None] + 2 * middle[None, :]
    )
    assert resample(positions[None], 17, 1).shape == (1, 17, 1)


@pytest.mark.parametrize(
    "teacher, what",
    [
        (timm_vit(32, 4, 0, head_dim=16), "has head_dim 16, student.tower has 8"),
        (timm_vit(16, 2, 0, reg_tokens=1), "has prefix_tokens 2, student.tower has 1"),
        (open_clip_vit(32, 4, 0), "is of another library"),
        (timm_vit(8, 4, 0), "does not cover"),
        (timm_vit(16, 1, 0), "has 1 layers, student.tower has 2"),
        (
            timm.create_model("resnet18", num_classes=0),
            r"student\.inherit: is no vision transformer of timm or open_clip \(ResNet\)",
        ),
        (timm_vit(16, 2, 0, global_pool="map"), "not the plain ViT's"),
        (timm_vit(16, 2, 0, mlp_layer=timm.layers.SwiGLUPacked), "not the plain ViT's"),
    ],
)
def test_what_cannot_be_sliced_is_refused_in_one_line(teacher, what):
    with pytest.raises(EdgeclipError, match=what) as e:
        inherit_from(timm_vit(16, 2, seed=0), teacher)
    assert "\n" not in str(e.value)


def test_another_patch_size_and_a_missing_tensor_are_refused():
    student = timm_vit(16, 1, 0).state_dict()
    other = {**student, "patch_embed.proj.weight": torch.zeros(16, 3, 16, 16)}
    with pytest.raises(EdgeclipError, match="same patch size"):
        inherit(student, other, "blocks", 1)
    with pytest.raises(EdgeclipError, match=r"no tensor 'norm\.bias'"):
        inherit(student, {k: v for k, v in student.items() if k != "norm.bias"}, "blocks", 1)


def test_a_cnn_student_is_refused():
    with pytest.raises(EdgeclipError, match=r"student\.tower: is no vision transformer"):
        inherit_from(
            timm.create_model("mobilenetv4_conv_small_035", num_classes=0), timm_vit(16, 2, seed=0)
        )


def test_a_recipes_student_inherits_and_is_rebuilt_without_the_teacher(tmp_path):
    larger = timm.create_model("vit_tiny_patch16_224")
    save_file(larger.state_dict(), tmp_path / "larger.safetensors")
    spec = R.Student(
        tower=R.Timm(model="vit_tiny_patch16_224", weights="random", image_size=64, seed=5),
        inherit=R.Timm(
            model="vit_tiny_patch16_224",
            weights=str(tmp_path / "larger.safetensors"),
            image_size=224,
        ),
        projector_hidden=None,
    )
    student, preprocess = students.build(spec, 4)
    assert preprocess.size == 64 and student.tower.pos_embed.shape == (1, 17, 192)
    assert torch.equal(student.tower.blocks[11].attn.qkv.weight, larger.blocks[11].attn.qkv.weight)
    description = {
        "architecture": msgspec.to_builtins(spec),
        "embed_dim": 4,
        "edu_attention": None,
        "preprocess": msgspec.to_builtins(preprocess),
    }
    students.save(tmp_path / "s", student, None, description, np.zeros((0, 4), np.float32))
    (tmp_path / "larger.safetensors").unlink()
    assert torch.equal(students.load(tmp_path / "s")[0](pixels(64)), student(pixels(64)))


def test_a_run_that_cannot_inherit_leaves_nothing_behind(here, photos):
    for i, p in enumerate(sorted(photos.iterdir())[:40]):
        folder = here / "shop" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(p.read_bytes())
    student = "{tower: {kind: timm, model: test_vit, weights: random, image_size: 64}, inherit: {kind: timm, model: vit_tiny_patch16_224, weights: random, image_size: 64}}"
    recipe = RECIPE.replace("ROOT", "shop").replace(
        "student: {tower: {kind: timm, model: mobilenetv4_conv_small_035, weights: random, image_size: 32}, projector_hidden: null}",
        f"student: {student}",
    )
    before = snapshot(here)
    mistake(
        "distill",
        write(here, recipe),
        says="student.inherit: has head_dim 64, student.tower has 32",
        only_line=False,
    )
    assert snapshot(here).keys() == before.keys() | {"r.yaml"}


def test_inheriting_over_given_weights_is_refused():
    tower = R.Timm(model="vit_tiny_patch16_224", weights="w.pth", image_size=64)
    with pytest.raises(BrokenRule, match="would overwrite the weights"):
        R.Student(tower=tower, inherit=R.OpenClip(model="ViT-B-16", weights="random"))
