"""What changes a model's features and is in no tensor: taken from the user, else from what all
published weights agree on, else asked for; said, and recorded.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from edgeclip import disk
from edgeclip.config import BrokenRule
from edgeclip.device.preprocess import Preprocess, normalize, to_pixels
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host.export import source as sources
from edgeclip.host.towers import assumed, reference, weights
from tests.support.checkpoints import CNN
from tests.support.checkpoints import checkpoint_layouts as L
from tests.support.checkpoints import conform_weights as C

MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)


def clip(model, **more):
    """What is assumed of a file of that name, without reading it."""
    return weights.assumed_of(R.OpenClip(model=model, weights="some/file.pt", **more))


# --- the activation


ONLY_QUICK = [
    "RN50",
    "RN101",
    "RN50x4",
    "RN50x16",
    "RN50x64",
    "ViT-L-14-336",
    "ViT-H-14-worldwide",
    "ViT-H-14-378",
]


@pytest.mark.parametrize("name", ONLY_QUICK)
def test_weights_that_only_exist_with_quick_gelu_get_it(name):
    found = clip(name)
    assert found.quick_gelu is True
    assert name in found.told["quick_gelu"]
    spec = R.OpenClip(model=name, weights="some/file.pt")
    assert weights.open_clip_config(spec)["quick_gelu"] is True
    assert weights.resolved(spec).quick_gelu is True


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"])
def test_where_published_weights_differ_it_is_asked_for(name):
    with pytest.raises(EdgeclipError, match=r"QuickGELU.*--like TAG") as refused:
        clip(name)
    assert "\n" not in str(refused.value)
    assert clip(name, like="openai" if name in ("ViT-B-32", "ViT-L-14") else "metaclip_fullcc")


def test_a_tag_and_the_recipe_settle_it():
    assert clip("ViT-B-32", like="openai").quick_gelu is True
    assert clip("ViT-B-32", like="laion2b_e16").quick_gelu is None
    assert clip("ViT-B-32", like="laion2b_e16", quick_gelu=True).quick_gelu is True
    assert clip("ViT-B-32-quickgelu").quick_gelu is None
    assert weights.open_clip_config(R.OpenClip(model="ViT-B-32-quickgelu", weights="x"))[
        "quick_gelu"
    ]
    with pytest.raises(EdgeclipError, match="did you mean 'openai'"):
        clip("ViT-B-32", like="opnai")


@pytest.mark.parametrize("quick", [True, False])
def test_the_activation_is_computed_and_kept_without_the_weights(quick, tmp_path):
    config = {"model_cfg": C.CLIPS["TinyCLIP-ViT-8M-16"], "preprocess_cfg": C.DEFAULT}
    theirs = L.lively(__import__("open_clip").CLIP(**config["model_cfg"], quick_gelu=quick))
    file = L.plain(theirs.state_dict(), tmp_path)
    spec = R.OpenClip(model="own", weights=file, config=config, quick_gelu=quick)
    ours, _ = weights.open_clip_model(spec)
    assert C.difference(ours, theirs) <= C.MOST
    other, _ = weights.open_clip_model(
        R.OpenClip(model="own", weights=file, config=config, quick_gelu=not quick)
    )
    assert C.difference(other, theirs) > 100 * C.MOST
    kept = students.resolved(R.Student(tower=spec)).tower
    assert kept.quick_gelu is quick


# --- how images are prepared


def test_published_weights_that_agree_are_taken_and_said():
    found = clip("MobileCLIP2-S0")
    assert found.preprocess["mean"] == (0, 0, 0) and found.preprocess["std"] == (1, 1, 1)
    assert "all" in found.told["mean"] and "MobileCLIP2-S0" in found.told["mean"]


def test_published_weights_that_differ_are_a_question():
    with pytest.raises(EdgeclipError, match="differ in how its images are prepared"):
        clip("ViT-H-14-quickgelu")
    assert clip("ViT-H-14-quickgelu", like="dfn5b").preprocess["resize_mode"] == "squash"
    assert clip("ViT-H-14-quickgelu", like="metaclip_fullcc").preprocess["resize_mode"] != "squash"


def test_nothing_published_is_a_question_too():
    with pytest.raises(EdgeclipError, match="nothing published says how its images are prepared"):
        clip("ViT-S-16")
    assert clip("ViT-S-16", like="default").preprocess == {}
    config = C.CLIPS["ViT-B-32"]
    with pytest.raises(EdgeclipError, match="nothing published"):
        clip("own", config=config)
    given = clip("own", config={"model_cfg": config, "preprocess_cfg": {"mean": MEAN}})
    assert given.preprocess == {"mean": MEAN}


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        ({"resize_mode": "longest"}, "resize 'longest'"),
        ({"interpolation": "nearest"}, "interpolation 'nearest'"),
        ({"interpolation": "random"}, "interpolation 'random'"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (0.5, 0.5, 0.0)}, "std"),
        ({"std": (0.5, 0.5, math.nan)}, "std"),
        ({"mean": "half"}, "mean"),
    ],
)
def test_what_is_not_computed_is_refused_at_the_door(cfg, says):
    with pytest.raises(EdgeclipError, match=says) as refused:
        assumed.preprocess_of_open_clip("model", cfg, 224)
    assert "\n" not in str(refused.value)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(EdgeclipError, match="takes images of 224 x 112"):
        assumed.preprocess_of_open_clip("model", {}, (224, 112))


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 2.5},
        {"resize": "longest"},
        {"interpolation": "area"},
        {"crop": 0.0},
        {"crop": 1.5},
        {"crop": math.nan},
        {"mean": (0.5, 0.5)},
        {"mean": (0.5, 0.5, math.inf)},
        {"std": (0.5, 0.5, 0.0)},
    ],
)
def test_a_record_that_is_built_in_code_is_checked_like_one_that_is_read(wrong):
    with pytest.raises(BrokenRule):
        Preprocess(**{"size": 8, "mean": MEAN, "std": STD, **wrong})


# --- timm


def test_timms_published_weights_differ_and_it_is_asked_for():
    spec = R.Timm(model="resnet50", weights="some/file.pt", image_size=224, crop_pct=None)
    with pytest.raises(EdgeclipError, match="differ in how its images are prepared"):
        weights.assumed_of(spec)
    for named in ({"like": "a1_in1k"}, {"model": "resnet50.a1_in1k"}):
        spec = R.Timm(**{"model": "resnet50", "image_size": 224, "weights": "f", **named})
        assert weights.assumed_of(spec).told == {}
    with pytest.raises(EdgeclipError, match="unknown tag"):
        weights.assumed_of(R.Timm(model="resnet50", weights="f", image_size=224, like="a1_in2k"))


def photo(seed, size):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (224, 224), (64, 50), (1000, 37)])
@pytest.mark.parametrize("crop", [0.875, 0.9, 0.95, 1.0, 0.5])
@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_model_as_it_is_sees_timms_own_pixels(size, crop, mode, interpolation):
    from timm.data import create_transform

    cfg = {"mean": MEAN, "std": STD, "interpolation": interpolation}
    theirs = create_transform((3, 96, 96), crop_pct=crop, crop_mode=mode, is_training=False, **cfg)(
        photo(1, size)
    )
    spec = R.Timm(model=CNN, weights="random", image_size=96, crop_pct=None)
    found = assumed.preprocess_of_timm(spec, {**cfg, "crop_pct": crop, "crop_mode": mode})
    ours = normalize(to_pixels(photo(1, size), found)[None], found)[0]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6, rtol=0)


def test_a_border_around_the_image_is_refused():
    spec = R.Timm(model=CNN, weights="random", image_size=96, crop_pct=None)
    cfg = {"mean": MEAN, "std": STD, "crop_mode": "border"}
    with pytest.raises(EdgeclipError, match="resize 'border'"):
        assumed.preprocess_of_timm(spec, cfg)


def test_a_student_keeps_the_whole_square_unless_its_recipe_says_otherwise():
    given = {"model": "tf_efficientnet_lite0", "weights": "random", "image_size": 128}
    assert weights.timm_model(R.Timm(**given))[1].crop == 1.0
    assert weights.timm_model(R.Timm(**given, crop_pct=0.9))[1].crop == 0.9
    assert weights.timm_model(R.Timm(**given, crop_pct=None))[1].crop == 0.875


# --- in a bundle


def test_a_classifier_is_exported_as_timm_published_it(tmp_path):
    import timm
    from timm.data import create_transform, resolve_model_data_config

    from edgeclip.host.export import write

    for i in range(3):
        photo(i, (320 + 40 * i, 240)).save(tmp_path / f"{i}.png")
    found = sources.from_model(CNN, "random", [], tmp_path)
    assert found.preprocess.crop == 0.875 and found.preprocess.size == 224
    transform = create_transform(
        **resolve_model_data_config(timm.create_model(CNN)), is_training=False
    )
    answers = write.golden_answers(found)
    for i in range(3):
        theirs = transform(Image.open(tmp_path / f"{i}.png")).numpy()
        assert (answers.inputs[i] == theirs).all()

    wrong = found._replace(preprocess=Preprocess(size=224, mean=(0.5,) * 3, std=(0.5,) * 3))
    with pytest.raises(EdgeclipError, match="the model's own library prepares it otherwise"):
        write.golden_answers(wrong)


def test_golden_answers_of_open_clip_are_its_own_transforms():
    spec = R.OpenClip(
        model="own",
        weights="random",
        config={"model_cfg": C.CLIPS["TinyCLIP-ViT-8M-16"], "preprocess_cfg": {"mean": MEAN}},
    )
    preprocess = weights.open_clip_model(spec)[1]
    theirs = reference.of_open_clip(spec, 224)(photo(3, (300, 250))).numpy()
    ours = normalize(to_pixels(photo(3, (300, 250)), preprocess)[None], preprocess)[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def test_what_was_assumed_is_recorded_with_the_bundle(tmp_path):
    import timm

    model = timm.create_model("tf_efficientnet_lite0", num_classes=3)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = sources.from_model("tf_efficientnet_lite0", str(tmp_path / "w.safetensors"), [], None)
    told = found.parents["assumed"]
    assert "tf_efficientnet_lite0" in told["crop_pct"] and "0.875" in told["crop_pct"]
    assert disk.fingerprint(told)
    assert "assumed" not in sources.from_model(CNN, "random", [], None).parents


def test_more_than_an_onnx_file_holds_is_refused_before_the_work(tmp_path):
    from edgeclip.host.export import _refuse_too_large

    with torch.device("meta"):
        large = torch.nn.Linear(32768, 32768)
    with pytest.raises(EdgeclipError, match=r"4\.0 GiB in float32, an ONNX file holds less"):
        _refuse_too_large(large)
