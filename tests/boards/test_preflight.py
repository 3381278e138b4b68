"""The preflight says what is known to be well, and calls what is unknown a warning."""

import dataclasses
import json

import pytest

from edgeclip.boards.preflight import Needs, preflight
from edgeclip.device import machine
from edgeclip.device import profile as device
from tests.support.command import mistake, run
from tests.support.machine_files import FACTS, JETSON, fake

WELL = {"free_disk_mib": 9000, "available_mib": 5000, "swap_mib": 4000, "load_average": 0.1, "time": 1000.0, "temperature_c": 45.0, "critical_c": 105.0,
        "throttled": {"cooling_device1 cpufreq-cpu0": 0, "cpu0/core_throttle_count": 7, "oc1_event_cnt": 3}, "governors": ["performance"], "clocks_locked": True,
        "power_mode": "MAXN_SUPER", "l4t": "36.4.3", "jetpack": "6.2+b77", "tensorrt": "10.3.0", "cuda": "12.6.68"}  # fmt: skip
NANO = dataclasses.replace(FACTS, device_tree_model="NVIDIA Jetson Orin Nano", glibc="2.35")


def status(state, facts=NANO, need=100.0, engines=True, builds=True, name="jetson-orin-nano"):
    needs = Needs(need, engines, builds)
    rows = preflight(device.load(name)[1], facts, machine.State(**state), needs, 1000.0)
    return {row.check: row.status for row in rows}


def test_a_board_that_is_well_passes_throughout():
    assert set(status(WELL).values()) == {"pass"}


@pytest.mark.parametrize(
    ("change", "check", "verdict"),
    [
        ({"free_disk_mib": 50}, "free disk", "fail"),
        ({"available_mib": 1000, "swap_mib": 0}, "memory", "fail"),
        ({"available_mib": 1000, "swap_mib": 4000}, "memory", "pass"),
        ({"tensorrt": None}, "tensorrt", "fail"),
        ({"jetpack": None}, "jetpack", "warn"),
        ({"power_mode": None}, "power mode", "warn"),
        ({"clocks_locked": False}, "clocks", "warn"),
        ({"clocks_locked": None}, "clocks", "warn"),
        ({"temperature_c": 86.0}, "temperature", "warn"),
        ({"temperature_c": 66.0, "critical_c": 80.0}, "temperature", "warn"),
        ({"temperature_c": None}, "temperature", "warn"),
        ({"throttled": {"cooling_device1 cpufreq-cpu0": 2}}, "throttling", "warn"),
        ({"throttled": {"get_throttled": 0x50005}}, "throttling", "warn"),
        ({"throttled": None}, "throttling", "warn"),
        ({"load_average": 2.5}, "other load", "warn"),
        ({"time": 86400.0}, "clock", "warn"),
    ],
)
def test_one_thing_is_wrong_and_only_that_is_named(change, check, verdict):
    found = status(WELL | change)
    assert found.pop(check) == verdict and set(found.values()) == {"pass"}


def test_memory_counts_against_what_has_to_be_built():
    assert status(WELL | {"available_mib": 1000, "swap_mib": 0}, builds=False)["memory"] == "pass"


def test_another_board_and_an_old_python_fail():
    found = status(
        WELL, dataclasses.replace(NANO, device_tree_model="Raspberry Pi 5", python="3.8.10")
    )
    assert found["board"] == found["python"] == "fail"


def test_an_emulated_processor_is_named():
    assert status(WELL, dataclasses.replace(NANO, emulated=True))["processor"] == "warn"
    assert status(WELL, NANO, name="arm64-emulated")["processor"] == "warn"


def test_a_jetson_without_tensorrt_may_still_run_cpu_bundles():
    assert status(WELL | {"tensorrt": None}, engines=False, builds=False)["tensorrt"] == "warn"
    assert (
        status(WELL | {"tensorrt": None}, builds=False)["tensorrt"] == "fail"
    )  # a kept engine needs it too


def test_the_rows_come_from_the_machines_own_files(tmp_path):
    state = machine.state(str(tmp_path), fake(tmp_path, JETSON))
    found = status(vars(state))
    assert found["clocks"] == "warn"
    assert found["temperature"] == "pass"
    assert found["power mode"] == found["tensorrt"] == "pass"
    assert found["memory"] == found["throttling"] == "pass"


def test_a_benchmark_on_the_board_itself_keeps_its_state_too(shipped_bundle, tmp_path, monkeypatch):
    state = dataclasses.replace(
        machine.state(str(tmp_path)),
        power_mode="MAXN_SUPER",
        clocks_locked=False,
        load_average=9.5,
    )
    monkeypatch.setattr(machine, "state", lambda *_: state)
    (tmp_path / "d.yaml").write_text(
        "runtimes: [onnxruntime, tensorrt]\nbench: {min_duration_s: 0.01, min_query_count: 5}\n"
    )
    ask = (
        "bench",
        "--bundle",
        shipped_bundle("onnx-fp32"),
        "--device",
        tmp_path / "d.yaml",
        "--scenario",
        "offline",
        "--json",
    )
    result = run(*ask)
    found = {r["check"]: r["found"] for r in json.loads(result.stdout)[0]["preflight"]}
    assert found["power mode"] == "MAXN_SUPER"
    assert found["clocks"].startswith("free")
    assert {"jetpack", "throttling"} <= set(found)
    assert "d: warning: other load: 9.5, should be at most 0.5" in result.stderr
    state = dataclasses.replace(state, available_mib=10, swap_mib=0)
    mistake(
        *ask,
        says="d: not fit to be measured (memory: 10 MiB free, 0 MiB swap, needs 300 MiB",
        only_line=False,
    )
