"""`edgeclip migrate`: what 0.1 wrote, in today's words, in place, and nothing lost on the way."""

import json
import shutil

from edgeclip import disk
from edgeclip.device.manifest import read_manifest
from tests.support.command import mistake, run
from tests.support.reports import parity_report

DEVICE = """# my board
recognise: {cpu: Cortex-A76}  # the pictures: none
runtimes: [onnxruntime]
"""


def test_a_yaml_file_keeps_its_comments(here):
    (here / "board.yaml").write_text(DEVICE)
    assert run("doctor", "--device", "board.yaml").exit_code == 1
    result = run("migrate", "board.yaml", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"written": ["board.yaml"]}
    assert (here / "board.yaml").read_text() == DEVICE.replace("recognise", "recognize")
    assert "is of today's format already" in run("migrate", "board.yaml").stdout


def test_what_no_renaming_mends_is_left_as_it_is(here):
    (here / "board.yaml").write_text(DEVICE + "colour: red\n")
    mistake("migrate", "board.yaml", says="colour: unknown field")
    assert (here / "board.yaml").read_text() == DEVICE + "colour: red\n"


def older(folder):
    """The bundle at `folder`, as 0.1 wrote its manifest."""
    content = disk.read_manifest(folder, "bundle")
    content["format"] = 1
    content["licences"] = content.pop("licenses")
    content["golden"]["pictures"] = content["golden"].pop("images")
    disk.write_json(folder / disk.MANIFEST, content)
    return disk.sha256(folder / disk.MANIFEST)


def test_a_run_and_its_bundles_and_the_reports_that_count(shipped_bundle, here):
    folder = here / "r" / "bundles" / "onnx-fp32"
    shutil.copytree(shipped_bundle("onnx-fp32"), folder)
    today = read_manifest(folder)
    before = older(folder)
    report = json.loads(json.dumps(disk_form(parity_report(bundle=before, device="host-cpu"))))
    disk.write_json(here / "r" / "reports" / "onnx-fp32.host-cpu.parity.json", report)
    disk.write_json(here / "r" / disk.MANIFEST, {"kind": "run", "student": "s"})
    result = run("migrate", "r", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["written"]) == 2
    assert read_manifest(folder) == today
    written = disk.read_json(here / "r" / "reports" / "onnx-fp32.host-cpu.parity.json")
    assert written["bundle"] == disk.sha256(folder / disk.MANIFEST) != before
    assert written["format"] == 2
    assert json.loads(run("migrate", "r", "--json").stdout) == {"written": []}


def disk_form(report):
    """A report as 0.1 wrote it."""
    from edgeclip.device.records import to_json

    fields = to_json(report)
    del fields["format"]
    fields["pictures"] = fields.pop("images")
    return fields


def test_a_changed_bundle_is_not_migrated(shipped_bundle, here):
    shutil.copytree(shipped_bundle("onnx-fp32"), here / "b")
    before = older(here / "b")
    (here / "b" / "labels.json").write_text("[]")
    mistake("migrate", "b", says="labels.json was changed")
    assert disk.sha256(here / "b" / disk.MANIFEST) == before


def test_what_is_none_of_them_is_refused(here):
    mistake("migrate", "nothing", says="there is no such folder or YAML file")
    mistake("migrate", "no.yaml", says="there is no such file")
    (here / "empty").mkdir()
    mistake("migrate", "empty", says="is neither a run nor a bundle")
