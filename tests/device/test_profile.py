"""A profile says what a board is, and a machine is held against it; the machine's facts come from
the kernel's files.
"""

import dataclasses
import os
import struct
import subprocess
import sys

import pytest

from edgeclip import config
from edgeclip.device import machine
from edgeclip.device import profile as device
from edgeclip.errors import EdgeclipError
from tests.support.files import REPO
from tests.support.machine_files import FACTS, JETSON, fake

NAMES = sorted(p.stem for p in (REPO / "devices").glob("*.yaml"))
SOURCES = (
    "sheet",
    "brief",
    "Intel ARK",
    "Developer Guide",
    "overview",
    "forums.",
    "Documentation/",
)
NO_BOARDS = {"host-cpu", "loopback", "arm64-emulated"}
BOARDS = set(NAMES) - NO_BOARDS


def test_this_machine_has_profiles_and_boards_have_too():
    assert set(NAMES) > NO_BOARDS


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_profile_loads_and_says_how_it_is_reached(name):
    _, loaded = device.load(str(REPO / "devices" / f"{name}.yaml"))
    assert (loaded.reach.ssh == name) == (name in BOARDS) and loaded.runtimes
    assert (loaded.recognize != device.Recognize()) == (name in BOARDS | {"arm64-emulated"})


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_every_hardware_figure_of_a_board_has_its_source_in_a_comment(name):
    for line in (REPO / "devices" / f"{name}.yaml").read_text().splitlines():
        field, _, value = line.partition(":")
        if field in (
            "rails",
            "threads",
        ):  # "4  # of its 14 cores" repeats the figure and names nothing
            source = (
                "null" in value
                or "[]" in value
                or any(word in value.partition("#")[2] for word in SOURCES)
            )
            assert source and "#" in value, line


def test_a_jetson_is_recognized_by_its_device_tree(tmp_path):
    _, nano = device.load("jetson-orin-nano")
    _, agx = device.load("jetson-agx-orin")
    facts = dataclasses.replace(machine.facts(fake(tmp_path, JETSON)), arch="aarch64")
    assert device.differences(nano, facts) == []
    assert "device_tree_model" in device.differences(agx, facts)[0]
    assert device.differences(nano, dataclasses.replace(facts, memory_mib=3600)) == [
        "it has 3600 MiB of memory, less than 6500"
    ]


def test_an_rk3588_is_recognized_by_its_chip_and_an_n100_by_its_name():
    _, rk = device.load("rk3588")
    assert (
        device.differences(
            rk, dataclasses.replace(FACTS, device_tree_compatible="radxa,rock-5b rockchip,rk3588")
        )
        == []
    )
    _, n100 = device.load("intel-n100")
    assert (
        device.differences(n100, dataclasses.replace(FACTS, arch="x86_64", cpu="Intel(R) N100"))
        == []
    )
    assert len(device.differences(n100, FACTS)) == 2


def test_the_state_of_a_jetson_is_read_from_its_files(tmp_path):
    s = machine.state(str(tmp_path), fake(tmp_path, JETSON))
    assert (s.l4t, s.jetpack, s.tensorrt, s.cuda) == (
        "36.4.3",
        "6.2+b77",
        "10.3.0.30-1+cuda12.5",
        None,
    )
    assert (s.power_mode, s.clocks_locked, s.governors) == (
        "MAXN_SUPER",
        False,
        ["schedutil"],
    )
    assert (
        s.temperature_c,
        s.critical_c,
        s.swap_mib,
        s.available_mib,
        s.load_average,
    ) == (51.187, 104.5, 3809, 5120, 0.31)
    assert s.throttled == {
        "oc1_event_cnt": 3,
        "cooling_device1 cpufreq-cpu0": 0,
    } and s.boot_id.startswith("3f1c0d3e")
    assert s.free_disk_mib > 0
    gpu = tmp_path / "sys/class/devfreq/17000000.gpu"
    (gpu / "min_freq").write_text("1020000000\n")
    assert machine.clocks_locked(tmp_path) is True and machine.facts(tmp_path).gpu == "nvidia,ga10b"
    for limit in ("min_freq", "max_freq"):
        (gpu / limit).unlink()
        (gpu / limit).mkdir()
    assert machine.clocks_locked(tmp_path) is None  # two limits that cannot be read are not equal


def test_a_machine_that_shows_nothing_is_unknown_not_well(tmp_path):
    s = machine.state(str(tmp_path), tmp_path)
    assert {k for k, v in vars(s).items() if v is None} >= {
        "throttled",
        "clocks_locked",
        "power_mode",
        "l4t",
        "temperature_c",
        "swap_mib",
        "boot_id",
    }


@pytest.mark.parametrize("soc", ["soc", "soc@107c000000"])  # a Pi 4's, a Pi 5's
def test_the_pis_firmware_bits_and_x86s_counters(tmp_path, soc):
    pi = fake(
        tmp_path / "pi",
        {
            "proc/device-tree/model": "Raspberry Pi\0",
            "sys/class/thermal/cooling_device0/cur_state": "0\n",
        },
    )
    assert machine.throttled(pi) is None  # without the bits it is unknown
    fake(pi, {f"sys/devices/platform/{soc}/{soc}:firmware/get_throttled": "50005\n"})
    assert machine.throttled(pi)["get_throttled"] == 0x50005
    fake(
        tmp_path / "x86",
        {"sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "7\n"},
    )
    assert machine.throttled(tmp_path / "x86") == {"cpu1/core_throttle_count": 7}


@pytest.mark.parametrize(
    ("before", "now", "held"),
    [
        ({"get_throttled": 0x50000}, {"get_throttled": 0x50000}, False),  # once, before
        ({"get_throttled": 0x50000}, {"get_throttled": 0x50004}, True),
        ({"get_throttled": 0x50005}, {"get_throttled": 0x50005}, True),
        ({"get_throttled": 0}, {"get_throttled": 0x20000}, True),  # within, over again
        ({"get_throttled": 0x50005}, {"get_throttled": 0xD0000}, True),
        ({"cooling_device1 cpufreq-cpu0": 2}, {"cooling_device1 cpufreq-cpu0": 2}, True),
        ({"cooling_device1 cpufreq-cpu0": 2}, {"cooling_device1 cpufreq-cpu0": 0}, False),
        (
            {"cpu0/core_throttle_count": 7, "oc1_event_cnt": 3},
            {"cpu0/core_throttle_count": 7, "oc1_event_cnt": 3},
            False,
        ),
        ({"oc1_event_cnt": 3}, {"oc1_event_cnt": 4}, True),
    ],
)
def test_what_holds_a_clock_down_is_told_from_what_once_did(before, now, held):
    assert machine.slowed(before, now) == (list(now) if held else [])
    assert machine.slowed(None, now) is machine.slowed(before, None) is None


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "isa"),
    [(0x8FB, 0, []), (0x119FFB, 0, ["asimddp"]), (0xECFFFFFB, 0x7F877FFF, ["asimddp", "i8mm"])],
)
def test_dot_product_is_read_from_the_processs_own_auxiliary_vector(
    tmp_path, monkeypatch, hwcap, hwcap2, isa
):
    # the vectors of qemu-aarch64 7.2 with -cpu cortex-a72, cortex-a76 and max
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    fake(
        tmp_path,
        {
            "proc/self/auxv": struct.pack("6Q", 16, hwcap, 26, hwcap2, 0, 0),
            "proc/cpuinfo": "vendor_id : AuthenticAMD\nflags : avx2\n",
        },
    )
    facts = machine.facts(tmp_path)
    assert facts.isa == isa and facts.emulated


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("reach: {ssh: a, sshd: true}\nruntimes: [onnxruntime]\n", "exclude each other"),
        ("reach: {ssh: a, emulate: max}\nruntimes: [onnxruntime]\n", "goes with sshd"),
        ("runtimes: [onnxruntme]\n", "did you mean 'onnxruntime'"),
        (
            "runtimes: [onnxruntime]\nproviders: [CUDAExecutionProvidr]\n",
            "did you mean 'CUDAExecutionProvider'",
        ),
        ("reach: local\nruntimes: [onnxruntime]\n", "reach"),
    ],
)
def test_a_wrong_profile_is_one_line(tmp_path, text, says):
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(EdgeclipError, match=says):
        device.load(str(tmp_path / "d.yaml"))


def test_a_board_that_is_this_machine_needs_no_link(tmp_path, monkeypatch):
    facts = dataclasses.replace(machine.facts(fake(tmp_path, JETSON)), arch="aarch64")
    _, nano = device.load("jetson-orin-nano")
    assert device.is_remote(nano)
    monkeypatch.setattr(machine, "facts", lambda: facts)
    assert not device.is_remote(nano) and device.require_here("jetson-orin-nano", nano) == facts
    assert device.is_remote(device.load("loopback")[1]) and not device.is_remote(
        device.load("host-cpu")[1]
    )


def test_a_run_keeps_to_the_profiles_processors_and_its_children_too():
    before = os.sched_getaffinity(0)
    one = min(before)
    ask = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    with device.pinned(device.Device(runtimes=["onnxruntime"], cpus=(one,))):
        assert (
            machine.facts().cores == 1 and subprocess.check_output(ask, text=True) == f"[{one}]\n"
        )
    with device.pinned(device.Device(runtimes=["onnxruntime"])):
        assert os.sched_getaffinity(0) == before
    for cpus in ((4000,), (one, 4000)):
        with (
            pytest.raises(EdgeclipError, match="not on all of"),
            device.pinned(device.Device(runtimes=[], cpus=cpus)),
        ):
            pass
        assert os.sched_getaffinity(0) == before
    assert device.load("rk3588")[1].cpus == (4, 5, 6, 7)


def test_what_would_start_a_boards_python_is_not_left_out_on_the_board_itself():
    reach = device.Reach(ssh="b", python=("taskset", "-c", "4-7", "python3"))
    here = device.Device(
        runtimes=["onnxruntime"],
        reach=reach,
        recognize=device.Recognize(arch=machine.facts().arch),
    )
    with pytest.raises(
        EdgeclipError,
        match=r"toy: reach\.python: 'taskset -c 4-7 python3' is ignored when running on the board itself",
    ):
        device.require_here("toy", here)


def test_the_configs_folder_names_every_profile():
    assert set(config.shipped("device")) >= set(NAMES)
