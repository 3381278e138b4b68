"""The recipe's `preprocess`: teacher, cache, student and training see the images that it asks for."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from edgeclip import config
from edgeclip.device.images import index_folder, read
from edgeclip.device.preprocess import Preprocess, open_image, prepared, to_pixels
from edgeclip.errors import EdgeclipError
from edgeclip.host import cache, teachers
from edgeclip.host import recipe as R
from edgeclip.host.cache.building import describe
from edgeclip.host.distill import prepare
from tests.support import image_files as files
from tests.support.images import encoded, toy_image
from tests.support.tiny_recipe import RECIPE
from tests.support.toy_cache import SPEC, build, dataset, teacher

ON = R.ImageOptions(exif=True, background=(255, 255, 255))


def written(tmp_path, block=""):
    """The tiny recipe on two classes of photos that are stored turned, every second with alpha."""
    root = tmp_path / "shop"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            image = toy_image(i, 60, 40)
            format = ("JPEG", "PNG")[i % 2]
            if i % 2:
                image.putalpha(Image.linear_gradient("L").resize(image.size))
            (content,) = files.turned(image, 6, (format,)).values()
            (root / name / f"{i}.{format.lower()}").write_bytes(content)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("ROOT", str(root)) + block)
    return path


BLOCK = "preprocess: {exif: true, background: [255, 255, 255]}\n"


def test_the_options_are_off_until_a_recipe_asks_for_them(tmp_path):
    assert R.load(written(tmp_path)).preprocess == R.ImageOptions()
    assert R.load(written(tmp_path, BLOCK)).preprocess == ON


@pytest.mark.parametrize(
    "block",
    [
        "preprocess: {background: [1, 2]}",
        "preprocess: {background: [1, 2, 256]}",
        "preprocess: {background: [1, 2, -1]}",
        "preprocess: {background: white}",
        "preprocess: {exif: 1}",
        "preprocess: {exiff: true}",
    ],
)
def test_what_is_no_option_is_one_line(tmp_path, block):
    with pytest.raises(EdgeclipError, match=r"r\.yaml: preprocess"):
        R.load(written(tmp_path, block))


def test_stored_views_of_others_are_not_turned_below(tmp_path):
    value = {
        "data": {"kind": "csv", "name": "d", "root": "."},
        "teacher": {"kind": "reinforced", "root": "."},
        "student": {"tower": {"kind": "timm", "model": "m", "weights": "w", "image_size": 8}},
        "losses": {"if_align": {}},
        "text_encoder": False,
        "preprocess": {"exif": True},
    }
    with pytest.raises(EdgeclipError, match=r"preprocess\.exif: would turn images"):
        config.convert(value, R.Recipe, "r.yaml")
    value["preprocess"] = {"background": [0, 0, 0]}
    assert config.convert(value, R.Recipe, "r.yaml").preprocess.background == (0, 0, 0)


def test_the_teacher_sees_what_the_student_sees(tmp_path):
    recipe = R.load(written(tmp_path, BLOCK))
    found = teachers.load(recipe.teacher, recipe.preprocess).preprocess
    assert (found.exif, found.background) == (True, (255, 255, 255))
    assert teachers.load(recipe.teacher).preprocess.options() == []


def description(preprocess, folder):
    t = teacher(preprocess=preprocess)
    cpu = torch.device("cpu")
    return describe(cache.Ingredients(t, t.tower, dataset(folder), R.Views(), 0, False, cpu, 1))


def test_the_cache_is_named_by_the_options_and_not_by_their_absence(tmp_path):
    written(tmp_path)
    folder = tmp_path / "shop"
    plain = description(SPEC, folder)
    assert plain["preprocess"].keys() == {"size", "mean", "std", "resize", "interpolation"}
    each = [ON, R.ImageOptions(exif=True), R.ImageOptions(background=(0, 0, 0))]
    of_options = [description(o.on(SPEC), folder)["preprocess"] for o in each]
    assert len({str(p) for p in [plain["preprocess"], *of_options]}) == 4


@pytest.mark.parametrize("views", [1, 3])
def test_a_cache_is_built_of_turned_images_and_training_replays_them(tmp_path, views):
    written(tmp_path)
    made = build(
        tmp_path,
        dataset(tmp_path / "shop"),
        teacher(preprocess=ON.on(SPEC)),
        views=R.Views(count=views),
    )
    spec = ON.on(Preprocess(size=40, mean=SPEC.mean, std=SPEC.std))
    for i, image in enumerate(made.images):
        content = read(image)
        upright = prepared(open_image(content), spec)
        assert upright.size == (40, 60) and upright.mode == "RGB"
        for view in made.views[i]:
            assert view[0] + view[2] <= 40 and view[1] + view[3] <= 60
            seen = cache.decode_view(content, view, spec, image.key).astype(int)
            # torch's resize looks no further than the box: the rim may differ.
            apart = np.abs(cache.apply_view(upright, view, spec).astype(int) - seen)
            assert apart[3:-3, 3:-3].max() <= 2


def test_a_jpeg_that_is_decoded_smaller_is_turned_alike():
    image = toy_image(3, 640, 480)
    (content,) = files.turned(image, 6, ("JPEG",)).values()
    spec = Preprocess(size=24, mean=SPEC.mean, std=SPEC.std, exif=True)
    view = np.array([30, 40, 400, 480, 1], np.float32)
    whole = cache.apply_view(prepared(open_image(content), spec), view, spec).astype(int)
    small = cache.decode_view(content, view, spec, "x").astype(int)
    assert np.abs(whole - small).mean() < 2


@pytest.mark.parametrize("mode", ["P", "1", "RGBA", "LA", "CMYK", "I;16", "I", "F", "LAB", "PA"])
def test_a_view_in_training_is_cut_out_in_the_files_own_mode(mode):
    content = files.encoded(files.image_of(mode, 50, 40), "TIFF")
    spec = Preprocess(size=16, mean=SPEC.mean, std=SPEC.std)
    image = Image.open(io.BytesIO(content))
    # open_clip's RandomResizedCrop of a whole image, then MaybeConvertMode.
    expected = image.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB")
    view = np.array([0, 0, 50, 40, 0], np.float32)
    np.testing.assert_array_equal(cache.decode_view(content, view, spec, "x"), expected)


def test_distill_says_once_how_many_photos_are_turned(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path)
    prepare.load_inputs(path, R.load(path), torch.device("cpu"))
    lines = [x for x in capsys.readouterr().err.splitlines() if "stored turned" in x]
    assert len(lines) == 1 and lines[0].startswith("16 of 16 images")
    path = written(tmp_path, BLOCK)
    prepare.load_inputs(path, R.load(path), torch.device("cpu"))
    assert "stored turned" not in capsys.readouterr().err


def test_the_student_that_ships_has_the_options(tmp_path, monkeypatch):
    from edgeclip.device.manifest import read_manifest
    from tests.support.command import run

    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, BLOCK)
    for command in (("distill", path, "--out", "runs/r"), ("export", "--target", "onnx-fp32")):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert "stored turned" not in result.stderr
    manifest = read_manifest(tmp_path / "runs" / "r" / "bundles" / "onnx-fp32")
    assert manifest.preprocess.options() == ["exif", "background"]
    image = index_folder(tmp_path / "shop")[0]
    upright = ImageOps.exif_transpose(Image.open(image.path))
    plain = ON.on(manifest.preprocess)
    np.testing.assert_array_equal(
        to_pixels(open_image(encoded(upright)), plain), to_pixels(Image.open(image.path), plain)
    )
