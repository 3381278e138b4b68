"""Manifests and reports are read in the format that is written, and in that of edgeclip 0.1."""

import json

import pytest

from edgeclip import disk
from edgeclip.device.bench_report import BenchReport
from edgeclip.device.bundle import Bundle
from edgeclip.device.manifest import read_manifest, write_manifest
from edgeclip.device.records import (
    ParityReport,
    to_json,
)
from edgeclip.errors import EdgeclipError
from tests.support.manifests import manifest_fields, search_record
from tests.support.reports import bench_report, parity_report

OLD_WORDS = {
    "license": "licence",
    "licenses": "licences",
    "images": "pictures",
    "quantization": "quantisation",
    "optimization": "optimisation",
    "optimization_agreement": "optimisation_agreement",
    "learned": "learnt",
    "centered_cosine_p1": "centred_cosine_p1",
    "centered_cosine_mean": "centred_cosine_mean",
    "centered_p1": "centred_p1",
    "centered_p5": "centred_p5",
    "centered_min": "centred_min",
    "images_per_second": "pictures_per_second",
    "reference_top1": "reference_r1",
    "bundle_top1": "bundle_r1",
}


def in_old_words(value):
    if isinstance(value, dict):
        return {OLD_WORDS.get(k, k): in_old_words(v) for k, v in value.items()}
    if isinstance(value, list):
        return [in_old_words(v) for v in value]
    return value


def bundle(folder, **changes):
    folder.mkdir()
    disk.write_text(folder / "image_encoder.onnx", "x")
    disk.write_manifest(folder, "bundle", manifest_fields(**changes))
    return folder


def int8_fields(**changes):
    target = manifest_fields()["target"] | {
        "precision": "int8",
        "activations": "int8",
        "calibration": {"images": 32},
    }
    return {"target": target, "quantization": search_record(), **changes}


def test_a_manifest_of_format_1_is_read_as_format_2(tmp_path):
    new = bundle(tmp_path / "new", **int8_fields())
    old = bundle(tmp_path / "old", **int8_fields())
    fields = in_old_words(disk.read_json(old / disk.MANIFEST)) | {"format": 1}
    disk.write_json(old / disk.MANIFEST, fields)
    assert "centred" in json.dumps(fields)
    assert "pictures" in json.dumps(fields)
    assert read_manifest(old) == read_manifest(new)


def test_a_manifest_is_written_as_it_is_read(tmp_path):
    folder = bundle(tmp_path / "b", **int8_fields())
    manifest = read_manifest(folder)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest
    assert set(manifest.files) == {"image_encoder.onnx"}


@pytest.mark.parametrize("found", [0, 3, "2"])
def test_a_format_that_is_not_known_is_refused(tmp_path, found):
    folder = bundle(tmp_path / "b", format=found)
    with pytest.raises(EdgeclipError, match=f"is of format {found}, and this edgeclip reads 1 and"):
        Bundle.load(folder)


@pytest.mark.parametrize("change", [{"embed_dim": "wide"}, {"runtime": "tflite"}, {"golden": None}])
def test_a_manifest_with_a_wrong_field_is_one_line(tmp_path, change):
    with pytest.raises(EdgeclipError, match=rf"\$\.{next(iter(change))}"):
        read_manifest(bundle(tmp_path / "b", **change))


def test_reports_of_0_1_are_read(tmp_path):
    for report, kind in ((parity_report(), ParityReport), (bench_report(), BenchReport)):
        path = tmp_path / "report.json"
        fields = in_old_words(to_json(report))
        del fields["format"]
        disk.write_json(path, fields)
        assert disk.read_record(path, kind) == report
        disk.write_record(path, report)
        assert disk.read_record(path, kind) == report


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("golden pictures only", "cannot tell"),
        ("too few pictures", "cannot tell"),
        ("pass", "cannot tell"),
        ("fail", "fails"),
    ],
)
def test_verdicts_of_0_1_are_read(tmp_path, old, new):
    fields = to_json(parity_report()) | {"verdict": old}
    del fields["format"]
    disk.write_json(tmp_path / "r.json", fields)
    assert disk.read_record(tmp_path / "r.json", ParityReport).verdict == new


@pytest.mark.parametrize("verdict", [["pass"], {"pass": 1}, 1, None])
def test_a_verdict_of_0_1_that_is_no_word_is_one_line(verdict):
    fields = to_json(parity_report()) | {"verdict": verdict, "format": 1}
    with pytest.raises(EdgeclipError, match="is not what it should be"):
        disk.from_json(fields, ParityReport, "r.json")


def test_a_report_that_is_none_is_one_line(tmp_path):
    disk.write_json(tmp_path / "r.json", {"format": 2, "kind": "parity"})
    with pytest.raises(EdgeclipError, match=r"r\.json: .*missing required field"):
        disk.read_record(tmp_path / "r.json", ParityReport)
