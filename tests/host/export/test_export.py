"""A bundle gives the student's answers, says where it came from, and is whole or not there."""

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch

from edgeclip import disk
from edgeclip.config import shipped
from edgeclip.device import target
from edgeclip.device.bundle import Bundle, bake_labels
from edgeclip.device.metrics import cosine
from edgeclip.device.zero_shot import class_scores
from edgeclip.errors import EdgeclipError
from edgeclip.host.export import export
from edgeclip.host.graph import trace as graph
from tests.support.files import snapshot
from tests.support.images import encoded, toy_image, truncated_jpeg
from tests.support.optional import require
from tests.support.toy_bundle import LABELS, SIZE, WIDTH, toy_input, toy_target

ALL = list(shipped("target"))
TENSORRT = [name for name in ALL if target.load(name)[1].runtime == "tensorrt"]
RUNNABLE = [name for name in ALL if name not in TENSORRT]
QUANTIZED = [name for name in ALL if target.load(name)[1].calibration is not None]
INT8 = [name for name in QUANTIZED if target.load(name)[1].precision == "int8"]


@pytest.mark.parametrize("name", ALL)
def test_the_manifest_names_every_file_parents_versions_and_licenses(shipped_bundle, source, name):
    folder = shipped_bundle(name)
    manifest = Bundle.load(folder).manifest
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {
        disk.MANIFEST
    }
    assert set(manifest.files) == on_disk
    assert manifest.parents == source.parents
    assert manifest.licenses == source.licenses
    assert manifest.target.name == name
    assert {"edgeclip", "torch", "onnx"} <= manifest.versions.keys()
    assert (manifest.embed_dim, manifest.preprocess.size, manifest.logit_scale) == (
        WIDTH,
        SIZE,
        20.0,
    )
    encoder = [p for p in folder.glob("image_encoder.*")]
    assert manifest.image_encoder_bytes == sum(p.stat().st_size for p in encoder) > 0


def test_a_recipes_floor_is_in_the_bundle_where_the_target_has_none(source, tmp_path):
    floor, own = target.Floor(top1=0.8, worst_class_top1=0.5), target.Floor(top1=0.9)
    source = source._replace(floor=floor)
    name, plain = target.load("onnx-fp32")
    bundle = export(source, name, plain, tmp_path / "plain")
    assert Bundle.load(bundle).manifest.target.floor == floor
    stricter = msgspec.structs.replace(plain, floor=own)
    bundle = export(source, name, stricter, tmp_path / "stricter")
    assert Bundle.load(bundle).manifest.target.floor == own


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("onnx-fp32", 0.99999),
        ("onnx-fp16", 0.999),
        ("onnx-int8", 0.97),
        ("onnx-int8-arm", 0.97),
        ("openvino-fp16", 0.999),
        ("openvino-int8", 0.93),
    ],
)
def test_image_features_are_the_students_unit_rows(shipped_bundle, student, name, least):
    bundle = Bundle.load(shipped_bundle(name))
    images = [toy_image(700 + i, SIZE, SIZE) for i in range(40)]
    with torch.inference_mode():
        expected = student(
            torch.from_numpy(np.stack([toy_input(700 + i) for i in range(40)]))
        ).numpy()
    found = bundle.encode_image(images)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
    assert cosine(found, expected).centered_p5 > least


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_batch_gives_what_single_images_give(shipped_bundle, name):
    bundle = Bundle.load(shipped_bundle(name))
    pixels = np.stack([bundle.pixels(toy_image(i)) for i in range(5)])
    within = 1e-3 if "fp16" in name else 1e-5
    np.testing.assert_allclose(
        bundle.encode_pixels(pixels),
        np.concatenate([bundle.encode_pixels(p[None]) for p in pixels]),
        atol=within,
    )


def test_golden_answers_are_torchs_own(shipped_bundle, student, source):
    folder = shipped_bundle("onnx-int8") / "golden"
    pixels, features = np.load(folder / "pixels.npy"), np.load(folder / "image_features.npy")
    x = ((pixels.astype(np.float32) / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        np.testing.assert_allclose(
            features, student(torch.from_numpy(np.ascontiguousarray(x))).numpy(), atol=1e-5
        )
    assert len(pixels) == len(source.golden) == len([p for p in folder.glob("*.png")])


def test_calibration_images_are_named_by_hash_and_none_is_golden(shipped_bundle, source):
    manifest = disk.read_manifest(shipped_bundle("onnx-int8"), "bundle")
    used = {c["key"]: c["sha256"] for c in manifest["calibration"]}
    pool = {p.key: p for p in source.calibration()}
    assert len(used) == 32
    assert used.keys() <= pool.keys()
    assert not used.keys() & {p.key for p in source.golden}
    assert all(disk.sha256(Path(pool[k].path)) == v for k, v in used.items())
    assert disk.read_manifest(shipped_bundle("onnx-fp32"), "bundle")["calibration"] == []


def test_int8_targets_of_every_runtime_quantize_the_same_layers(shipped_bundle):
    records = [disk.read_manifest(shipped_bundle(n), "bundle")["quantization"] for n in INT8]
    assert records[0]["int8_layers"] >= 1 and records[0]["int8_share_of_macs"] > 0
    assert [r["float_layers"] for r in records] == [records[0]["float_layers"]] * len(records)
    assert all(
        disk.read_manifest(shipped_bundle(n), "bundle")["quantization"] is None
        for n in ALL
        if n not in QUANTIZED
    )


@pytest.mark.parametrize("name", TENSORRT)
def test_tensorrts_graph_is_parsed_and_built_by_tensorrt_rtx(shipped_bundle, name):
    require("tensorrt_rtx", "pip install 'edgeclip[lint]'")
    lint = disk.read_manifest(shipped_bundle(name), "bundle")["lint"]
    assert lint["checked_by"].startswith("TensorRT-RTX")
    assert lint["parses"]
    assert lint["builds"]
    assert lint["errors"] == []


@pytest.mark.parametrize("name", RUNNABLE)
def test_classify_ranks_as_the_head_does(shipped_bundle, source, name):
    bundle = Bundle.load(shipped_bundle(name))
    rows = bundle.classify(encoded(toy_image(5)), top=6)
    scores = class_scores(bundle.encode_image([toy_image(5)]), source.class_features, source.head)[
        0
    ]
    assert [r["label"] for r in rows] == [LABELS[i] for i in np.argsort(-scores)]
    np.testing.assert_allclose([r["score"] for r in rows], np.sort(scores)[::-1], atol=1e-5)
    assert abs(sum(r["probability"] for r in rows) - 1) < 1e-6
    ratio = np.log(rows[0]["probability"] / rows[1]["probability"])
    assert abs(ratio - 20.0 * (rows[0]["score"] - rows[1]["score"])) < 1e-3


def test_baked_labels_need_no_text_encoder_and_new_words_do(own_bundle):
    folder = own_bundle("onnx-fp32")
    (folder / "text_encoder.onnx").write_bytes(b"broken")
    bundle = Bundle.load(folder)
    assert [r["label"] for r in bundle.classify(toy_image(1), ["dog"])] == ["dog"]
    with pytest.raises(EdgeclipError, match=r"text_encoder\.onnx was changed"):
        bundle.classify(toy_image(1), ["dog", "pear"])


@pytest.mark.parametrize("name", RUNNABLE)
def test_words_given_at_hand_are_the_baked_ones(shipped_bundle, source, name):
    found = Bundle.load(shipped_bundle(name)).bake(LABELS)
    assert (found * source.class_features).sum(axis=1).min() > (
        0.9999 if name == "onnx-fp32" else 0.98
    )


def test_baking_labels_keeps_everything_but_the_words(shipped_bundle, tmp_path):
    old = shipped_bundle("onnx-fp32")
    new = bake_labels(old, ["pear", "plum", "cat"], tmp_path / "fruit")
    bundle, before = Bundle.load(new), Bundle.load(old)
    assert bundle.labels == ["pear", "plum", "cat"] and bundle.class_features.shape == (3, WIDTH)
    np.testing.assert_allclose(bundle.class_features[2], before.class_features[0], atol=1e-5)
    assert bundle.manifest.parents == {
        **before.manifest.parents,
        "bundle": disk.sha256(old / disk.MANIFEST),
    }
    a, b = snapshot(new), snapshot(old)
    assert {k for k in a.keys() | b.keys() if a.get(k) != b.get(k)} == {
        "labels.json",
        "class_features.npy",
        disk.MANIFEST,
    }
    assert [r["label"] for r in bundle.classify(toy_image(2), ["pear", "cat"])] == [
        r["label"] for r in before.classify(toy_image(2), ["pear", "cat"])
    ]


def test_baking_in_place_replaces_the_words(own_bundle):
    folder = own_bundle("onnx-fp32")
    assert Bundle.load(bake_labels(folder, ["plum"], folder)).labels == ["plum"]


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        ([], "the list is empty"),
        (["a", "b", "a"], "'a' occurs more than once"),
        (["cat " * 20], "tokens"),
    ],
)
def test_labels_that_cannot_be_baked_leave_the_bundle_as_it_was(own_bundle, labels, what):
    folder = own_bundle("onnx-fp32")
    before = snapshot(folder.parent)
    with pytest.raises(EdgeclipError, match=what):
        bake_labels(folder, labels, folder)
    assert snapshot(folder.parent) == before


def test_a_folder_that_is_no_bundle_is_refused_before_the_work(source, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("thesis")
    with pytest.raises(EdgeclipError, match="something else lies there already"):
        export(source, "onnx-fp32", toy_target("onnx-fp32"), tmp_path)
    assert "1/5" not in capsys.readouterr().err and snapshot(tmp_path) == {"thesis.txt": b"thesis"}


def test_a_bundle_without_a_text_encoder_knows_its_own_labels_only(source, tmp_path):
    bundle = Bundle.load(
        export(
            source._replace(load_text=None, head=None),
            "onnx-fp32",
            toy_target("onnx-fp32"),
            tmp_path / "b",
        )
    )
    assert bundle.manifest.text is None
    assert len(bundle.classify(toy_image(0))) == 5
    assert bundle.head is None
    for call in (
        lambda: bundle.classify(toy_image(0), ["pear"]),
        lambda: bake_labels(bundle.folder, ["pear"], tmp_path / "c"),
    ):
        with pytest.raises(EdgeclipError, match="no text encoder"):
            call()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.onnx",
        "labels.json",
        "class_features.npy",
        "head.npz",
        "golden/pixels.npy",
        "tokenizer.json",
    ],
)
def test_a_changed_file_is_refused_by_name(own_bundle, name):
    folder = own_bundle("onnx-fp32")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(EdgeclipError, match=f"{name} was changed"):
        Bundle.load(folder, check=True)
    if "golden" not in name:  # and without the check as soon as it is used
        with pytest.raises(EdgeclipError, match=f"{name} was changed"):
            Bundle.load(folder).classify(
                toy_image(0), ["pear"] if name == "tokenizer.json" else None
            )


class Breaks(torch.nn.Module):
    def forward(self, input_ids):
        raise RuntimeError("no such text")


@pytest.mark.parametrize("name", ["onnx-fp32", "onnx-int8"])
def test_an_export_that_fails_midway_leaves_no_folder(source, tmp_path, name):
    text = source.load_text()
    broken = type(text)(
        module=Breaks(), tokenizer=text.tokenizer, context_length=text.context_length
    )
    with pytest.raises(RuntimeError, match="no such text"):
        export(
            source._replace(load_text=lambda: broken),
            name,
            toy_target(name),
            tmp_path / "bundles" / name,
        )
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "bundles"])


def test_too_few_calibration_images_are_a_users_error(source, tmp_path):
    with pytest.raises(
        EdgeclipError, match="asks for 32 training images and 0 to judge on, and there are 3"
    ):
        export(
            source._replace(calibration=lambda: source.golden[:3]),
            "onnx-int8",
            toy_target("onnx-int8"),
            tmp_path / "b",
        )
    assert snapshot(tmp_path) == {}


def test_unreadable_calibration_images_fail_the_export(source, tmp_path):
    from edgeclip.device.images import ImageRef

    bad = ImageRef("half.jpg", str(truncated_jpeg(tmp_path / "half.jpg")))
    with pytest.raises(EdgeclipError, match=r"1 of 32 images are unreadable.*half\.jpg"):
        export(
            source._replace(calibration=lambda: [*source.calibration()[:31], bad]),
            "onnx-int8",
            toy_target("onnx-int8"),
            tmp_path / "b",
        )
    assert not (tmp_path / "b").exists()


def test_an_export_is_reproducible(source, shipped_bundle, tmp_path):
    again, first = (
        snapshot(export(source, "onnx-int8", toy_target("onnx-int8"), tmp_path / "b")),
        snapshot(shipped_bundle("onnx-int8")),
    )
    for name in ("image_encoder.onnx", "class_features.npy", "golden/image_features.npy"):
        assert again[name] == first[name], name


@pytest.mark.parametrize(
    ("runtime", "precision", "text"),
    [
        ("onnxruntime", "fp16", "fp32"),
        ("onnxruntime", "fp32", "fp16"),
        ("onnxruntime", "fp8", "fp16"),
        ("tensorrt", "fp32", "fp32"),
        ("tensorrt", "fp16", "fp32"),
        ("tensorrt", "fp16", "int8"),
    ],
)
def test_a_precision_is_given_as_asked_or_refused_never_another(
    source, tmp_path, runtime, precision, text
):
    limits = "{centered_cosine_p1: 0.9, top1_agreement: 0.9, accuracy_drop_pp: 1}"
    (tmp_path / "t.yaml").write_text(
        f"runtime: {runtime}\nprecision: {precision}\ntext: {text}\nopset: 19\ntolerance: {limits}\n"
    )
    try:
        bundle = export(source, *target.load(str(tmp_path / "t.yaml")), tmp_path / "b")
    except EdgeclipError:
        assert not (tmp_path / "b").exists()
        return
    dtypes = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
    for name, asked in (("image_encoder", precision), ("text_encoder", text)):
        (file,) = bundle.glob(f"{name}*.onnx")
        constants = graph.initializers(onnx.load(file)).values()
        largest = max(constants, key=lambda c: c.size)
        assert largest.dtype == dtypes[asked], f"{name} was asked for in {asked}"


def test_texts_that_ship_as_golden_have_torchs_answers(shipped_bundle, source):
    folder = shipped_bundle("onnx-fp32")
    texts = json.loads((folder / "golden" / "texts.json").read_text())
    np.testing.assert_allclose(
        Bundle.load(folder).encode_text(texts),
        np.load(folder / "golden" / "text_features.npy"),
        atol=1e-5,
    )


def test_a_wrong_trace_and_a_wrong_vocabulary_are_refused_with_a_number(source):
    from edgeclip.errors import WrongGraph
    from edgeclip.host.export import write

    golden = write.golden_answers(source)
    x = torch.from_numpy(golden.inputs)
    model = graph.to_onnx(source.image_encoder, x[:1], "pixels", "image_features", 18)
    write.compare("image", model, golden.inputs, golden.features)
    for wrong in (golden.features + 1e-3, np.full_like(golden.features, np.nan)):
        with pytest.raises(
            WrongGraph, match="image encoder: the exported graph differs from torch"
        ):
            write.compare("image", model, golden.inputs, wrong)

    text = source.load_text()
    ids = np.array([[1, 2, 3]])
    write._compare_pruned(text, ids, text, ids)
    with pytest.raises(WrongGraph, match="removing tokens changed the features"):
        write._compare_pruned(text, ids, text, ids[:, ::-1].copy() + 1)
