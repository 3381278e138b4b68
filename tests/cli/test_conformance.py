"""`edgeclip conformance`: exit 0 where it must be equal and is, 3 where it is not, one line for
bad input.
"""

import json
import shutil

import numpy as np
import pytest

from edgeclip import disk
from tests.support.command import mistake, run
from tests.support.files import same, snapshot
from tests.support.toy_bundle import SIZE


@pytest.fixture
def kept(here, clip_bundle, clip_pack):
    """The bundle's own answers on disk, as an example to a foreign implementation."""
    result = run("conformance", clip_bundle, "--pack", clip_pack, "--keep", "answers")
    assert result.exit_code == 0, result.output
    return here / "answers"


def test_the_table_lists_each_kind_and_what_differs(here, clip_bundle, clip_pack):
    result = run("conformance", clip_bundle, "--pack", clip_pack)
    assert result.exit_code == 0, result.output
    for kind in ("rgb", "grey", "cmyk", "16-bit", "extreme aspect", "plain", "html entities"):
        assert any(line.startswith(kind) for line in result.stdout.splitlines()), kind
    assert "differs: palette" not in result.stdout
    assert "FAILS" not in result.stdout
    assert snapshot(here) == {}


def test_another_implementations_folder_is_scored_and_a_fault_in_it_exits_3(
    kept, clip_bundle, clip_pack
):
    command = ("conformance", clip_bundle, "--pack", clip_pack, "--answers", kept)
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["device"] is None and report["answers"] == str(kept)
    np.save(kept / "images" / "rgb-wide.npy", np.zeros((SIZE, SIZE, 3), np.uint8))
    result = run(*command)
    assert result.exit_code == 3
    assert "FAILS: rgb: rgb-wide: up to " in result.stdout


def test_the_report_is_kept_with_the_bundles_run(here, clip_bundle, clip_pack):
    shutil.copytree(clip_bundle, here / "r" / "bundles" / "b")
    (here / "r" / "evaluation").mkdir()
    (here / "r" / "evaluation" / "manifest.json").write_text("{}")
    result = run("conformance", "r/bundles/b", "--pack", clip_pack, "--json")
    assert result.exit_code == 0, result.output
    path = here / "r" / "reports" / "b.host-cpu.conformance.json"
    assert disk.read_json(path) == json.loads(result.stdout)


def test_what_is_no_bundle_pack_or_folder_of_answers(here, clip_bundle, clip_pack, shipped_bundle):
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").write_text("mine")
    before = snapshot(here)
    packed = ("conformance", clip_bundle, "--pack", clip_pack)
    mistake("conformance", "nothing", says="nothing: there is no such folder")
    mistake("conformance", "notes", says="so it is no finished bundle")
    mistake("conformance", clip_pack, says="is not a bundle")
    mistake("conformance", clip_bundle, "--pack", clip_bundle, says="is not a conformance pack")
    mistake(
        "conformance",
        clip_bundle,
        "--pack",
        "notes",
        says="something else lies there already",
        only_line=False,
    )
    mistake(
        "conformance",
        shipped_bundle("onnx-fp32"),
        "--pack",
        clip_pack,
        says="is a pack for another bundle (",
    )
    mistake(*packed, "--answers", "nothing", says="nothing: there is no such folder")
    mistake(*packed, "--answers", "notes", says="notes: has no images/rgb-wide.npy and")
    mistake(*packed, "--device", "toaster", says="unknown device")
    mistake(*packed, "--keep", "notes", says="something else lies there already")
    same(here, before)


def test_a_damaged_answer_is_named(kept, clip_bundle, clip_pack):
    command = ("conformance", clip_bundle, "--pack", clip_pack, "--answers", kept)
    file = kept / "images" / "rgb-wide.npy"
    whole = np.load(file)
    for array, says in (
        (whole[:, 1:], f"is float32 [3, {SIZE - 1}, {SIZE}], not float32 [3, {SIZE}, {SIZE}]"),
        (np.full_like(whole, np.nan), "has values that are not finite"),
    ):
        np.save(file, array)
        assert "rgb-wide.npy: " in mistake(*command, says=says)
    file.unlink()
    mistake(*command, says="has no images/rgb-wide.npy; ")
    np.save(file, whole)
    ids = json.loads((kept / "ids.json").read_text())
    (kept / "ids.json").write_text(json.dumps(ids | {"plain-0": [10**6]}))
    mistake(*command, says="'plain-0' has the id 1000000")


def test_answers_of_another_are_not_asked_of_a_device(here):
    result = run("conformance", "b", "--answers", "a", "--device", "loopback")
    assert result.exit_code == 2
    assert "leave --device" in result.stderr
