"""The self-test tries each step on its own, and its report says of each what came of it."""

import json
from pathlib import Path

from edgeclip.device.bundle import Bundle
from edgeclip.device.profile import Device, Recognize
from edgeclip.device.records import to_json
from edgeclip.device.selftest import selftest, without_paths
from tests.support.command import run


def steps(report):
    return {s.step.split(" (")[0]: s.status for s in report.steps}


def test_a_sound_bundle_passes_each_step_that_this_machine_has(shipped_bundle):
    report = selftest(Bundle.load(shipped_bundle("onnx-fp32")), Device(runtimes=["onnxruntime"]))
    found = steps(report)
    for step in (
        "this is the device",
        "open the image encoder",
        "open it again",
        "golden images and texts",
        "one image in batches of 1, 3, 8 and 11",
        "200 queries",
    ):
        assert found[step] == "pass", report
    assert found["power rails"] == "not possible here" and json.dumps(to_json(report))


def test_another_device_fails_that_step_only(shipped_bundle):
    found = steps(
        selftest(
            Bundle.load(shipped_bundle("onnx-fp32")),
            Device(runtimes=["onnxruntime"], recognize=Recognize(device_tree_model="Orin")),
        )
    )
    assert [k for k, v in found.items() if v == "fail"] == ["this is the device"]


def test_without_tensorrt_the_engine_step_fails_and_the_rest_is_still_told(
    shipped_bundle, tmp_path, monkeypatch
):
    monkeypatch.setenv("EDGECLIP_ENGINES", str(tmp_path))
    report = selftest(Bundle.load(shipped_bundle("tensorrt-fp16")), Device(runtimes=["tensorrt"]))
    found = steps(report)
    assert found["open the image encoder"] == "fail"
    assert "golden images and texts" not in found
    assert "temperature" in found


def test_a_failure_names_no_folder_outside_the_bundle(own_bundle):
    folder = own_bundle("onnx-fp32")
    (folder / "image_encoder.onnx").write_bytes(b"broken")
    text = json.dumps(to_json(selftest(Bundle.load(folder), Device(runtimes=["onnxruntime"]))))
    assert "image_encoder.onnx was changed" in text
    assert str(folder.parent) not in text
    assert str(Path.home()) not in text
    said = f'File "{Path.home()}/venv/lib/x.py", line 3; {folder}/a.onnx: bad; /data/anna/run/b.npy; 3 ms/image; see https://a.b/c'
    assert (
        without_paths(said, folder)
        == 'File "x.py", line 3; bundle/a.onnx: bad; b.npy; 3 ms/image; see https://a.b/c'
    )


def test_the_command_writes_a_report_to_attach(shipped_bundle, here):
    result = run("selftest", "--bundle", shipped_bundle("onnx-fp32"), "--device", "host-cpu")
    assert result.exit_code == 0 and "selftest-host-cpu-onnx-fp32.json" in result.stdout
    report = json.loads((here / "selftest-host-cpu-onnx-fp32.json").read_text())
    assert report["device"] == "host-cpu"
    assert report["machine"]["arch"]
    assert {s["status"] for s in report["steps"]} <= {"pass", "not possible here"}
