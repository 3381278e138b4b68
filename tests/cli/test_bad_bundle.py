"""A bundle or a device that is not what it should be: one line, exit 1, nothing half-written."""

import numpy as np
import pytest

from edgeclip import disk
from tests.support.command import mistake, run
from tests.support.files import REPO, same, snapshot, write


def test_a_bundle_of_another_format(cat, own_bundle):
    bundle = own_bundle("onnx-fp32")
    manifest = disk.read_json(bundle / "manifest.json")
    disk.write_json(bundle / "manifest.json", manifest | {"format": 99})
    mistake(
        "classify",
        cat,
        "--bundle",
        bundle,
        says="is of format 99, and this edgeclip reads 1 and 2",
    )
    with np.load(bundle / "head.npz") as z:
        np.savez(bundle / "head.npz", **{k: z[k] for k in z.files if k != "fc"})
    disk.write_json(
        bundle / "manifest.json",
        manifest | {"files": manifest["files"] | {"head.npz": disk.sha256(bundle / "head.npz")}},
    )
    mistake(
        "classify",
        cat,
        "--bundle",
        bundle,
        says="was written by an edgeclip before 0.1; export it again from its run",
    )


def test_a_meters_file_that_is_missing_is_told_before_the_clock_starts(here, shipped_bundle):
    mistake(
        "bench",
        "--bundle",
        shipped_bundle("onnx-fp32"),
        "--meter",
        "m.csv",
        says="m.csv: there is no such file",
    )


def test_an_empty_list_of_words(cat, shipped_bundle):
    for words in ("", " , "):
        mistake(
            "classify",
            cat,
            "--bundle",
            shipped_bundle("onnx-fp32"),
            "--labels",
            words,
            says="the list is empty",
        )


@pytest.mark.parametrize("name", ["image_encoder.onnx", "class_features.npy", "labels.json"])
def test_a_changed_bundle(cat, own_bundle, name):
    bundle = own_bundle("onnx-fp32")
    (bundle / name).write_bytes((bundle / name).read_bytes() + b" ")
    before = snapshot(cat.parent)
    mistake("classify", cat, "--bundle", bundle, says=f"{name} was changed")
    mistake("validate", "--bundle", bundle, says=f"{name} was changed")
    mistake(
        "labels",
        bundle,
        f"@{write(cat.parent.parent, 'pear', 'w.txt')}",
        "--out",
        "new",
        says=f"{name} was changed",
    )
    if name == "image_encoder.onnx":
        mistake("bench", "--bundle", bundle, says="was changed")
        mistake("embed", cat, "--out", "f.npy", "--bundle", bundle, says="was changed")
    same(cat.parent, before)


def test_a_file_missing_from_a_bundle(cat, own_bundle):
    bundle = own_bundle("onnx-fp32")
    (bundle / "image_encoder.onnx").unlink()
    mistake("classify", cat, "--bundle", bundle, says="image_encoder.onnx is missing")


def test_a_bundle_without_a_manifest(cat, own_bundle):
    bundle = own_bundle("onnx-fp32")
    (bundle / "manifest.json").unlink()
    mistake("classify", cat, "--bundle", bundle, says="no finished bundle")


def test_a_device_profile_that_is_not_this_machine(here, shipped_bundle):
    board = (
        (REPO / "devices" / "jetson-orin-nano.yaml")
        .read_text()
        .replace("reach: {ssh: jetson-orin-nano}", "reach: {}")
    )
    (here / "devices").mkdir()
    (here / "devices" / "board.yaml").write_text(board)
    before = snapshot(here)
    for verb in ("validate", "bench"):
        mistake(
            verb,
            "--bundle",
            shipped_bundle("onnx-fp32"),
            "--device",
            "board",
            says="this machine is not that device",
        )
        mistake(
            verb,
            "--bundle",
            shipped_bundle("onnx-fp32"),
            "--device",
            "jetson-orin-nano",
            says="cannot be reached over ssh",
        )
    mistake(
        "doctor", "--device", "jetson-orin-nano", says="cannot be reached over ssh"
    )  # it is not in this user's ssh setup
    assert run("doctor", "--device", "board").exit_code == 3  # its table says what is wrong
    assert snapshot(here) == before


def test_a_bundle_that_the_device_cannot_run(here, shipped_bundle):
    mistake(
        "validate",
        "--bundle",
        shipped_bundle("tensorrt-int8"),
        says="can run none of these bundles",
        only_line=False,
    )
