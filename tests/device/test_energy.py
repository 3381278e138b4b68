"""Power is read from files in the kernel's documented layouts, and an energy is what arithmetic
says it is.
"""

import math
import os
import sys
import time

import numpy as np
import pytest

from edgeclip.device import energy, power
from edgeclip.device.bench_report import (
    EnergyMarks,
    Reading,
)
from edgeclip.device.energy import by_the_hosts_meter, half_width, per_image, steady_from
from edgeclip.device.power import find, meter
from edgeclip.errors import EdgeclipError
from tests.support.machine_files import fake

INA3221 = {
    "sys/class/hwmon/hwmon4/name": "ina3221\n",
    "sys/class/hwmon/hwmon4/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon4/in1_input": "5056\n",
    "sys/class/hwmon/hwmon4/curr1_input": "1232\n",
    "sys/class/hwmon/hwmon4/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon4/in2_input": "5056\n",
    "sys/class/hwmon/hwmon4/curr2_input": "240\n",
    "sys/class/hwmon/hwmon4/in7_label": "sum of shunt voltages\n",
    "sys/class/hwmon/hwmon4/in7_input": "12\n",
}
INA238 = {
    "sys/class/hwmon/hwmon3/name": "ina238\n",
    "sys/class/hwmon/hwmon3/in1_label": "VIN\n",
    "sys/class/hwmon/hwmon3/power1_input": "23500000\n",
}


def test_a_jetsons_rail_is_volts_times_amperes(tmp_path):
    source = find(("VDD_IN",), fake(tmp_path, INA3221))
    assert source.name == "ina3221: VDD_IN" and source.read() == pytest.approx(5.056 * 1.232)
    assert find(("VDD_IN", "VDD_CPU_GPU_CV"), tmp_path).read() == pytest.approx(
        5.056 * (1.232 + 0.240)
    )


def test_thors_input_is_read_in_microwatts(tmp_path):
    assert find(("VIN",), fake(tmp_path, INA238)).read() == pytest.approx(23.5)


def test_a_part_of_the_rails_is_not_measured(tmp_path):
    fake(tmp_path, INA3221)
    assert find(("VDD_IN", "VDD_SOC"), tmp_path) is None and find((), tmp_path) is None
    (tmp_path / "sys/class/hwmon/hwmon4/curr1_input").unlink()
    assert find(("VDD_IN",), tmp_path) is None


def test_a_rail_that_is_switched_off_meanwhile_reads_as_nothing(tmp_path):
    source = find(("VDD_IN",), fake(tmp_path, INA3221))
    (tmp_path / "sys/class/hwmon/hwmon4/curr1_input").unlink()
    assert source.read() is None


def rapl(root, microjoules, package=0):
    zone = f"sys/class/powercap/intel-rapl:{package}"
    return fake(
        root,
        {
            f"{zone}/name": f"package-{package}\n",
            f"{zone}/energy_uj": f"{microjoules}\n",
            f"{zone}/max_energy_range_uj": "262143328850\n",
        },
    )


def test_rapl_is_a_counter_that_wraps(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(power.time, "perf_counter", lambda: next(clock))
    source = find(("package",), rapl(tmp_path, 262143000000))
    assert source.name == "RAPL: package" and source.read() is None  # one reading is no power
    rapl(tmp_path, 262143328850)
    assert source.read() == pytest.approx(0.328850 / 2)
    rapl(tmp_path, 5000000)
    assert source.read() == pytest.approx(5.0)  # over the wrap


def test_rapl_of_two_packages_is_their_sum(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 1.0])
    monkeypatch.setattr(power.time, "perf_counter", lambda: next(clock))
    rapl(tmp_path, 0)
    source = find(("package",), rapl(tmp_path, 0, 1))
    source.read()
    rapl(tmp_path, 3000000)
    rapl(tmp_path, 4000000, 1)
    assert source.read() == pytest.approx(7.0)


TEGRASTATS = """#!{python}
import os, time
open("{folder}/pid", "w").write(str(os.getpid()))
for i in range(100):
    print(f"RAM 3012/7620MB GR3D_FREQ 0% cpu@48C VDD_IN {{i}}mW/4902mW VDD_SOC 1418mW/1411mW", flush=True)
    time.sleep(0.01)
open("{folder}/done", "w").close()
while True:
    print("nothing", flush=True)
    time.sleep(0.01)
"""


def test_tegrastats_is_read_as_it_writes_and_ended(tmp_path, monkeypatch):
    program = tmp_path / "tegrastats"
    program.write_text(TEGRASTATS.format(python=sys.executable, folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    source = power.tegrastats(("VDD_IN", "VDD_SOC"))
    assert (
        source.name == "tegrastats: VDD_IN + VDD_SOC" and not (tmp_path / "pid").exists()
    )  # nothing runs before it is read
    with power.Sampler(source) as sampler:
        while not (tmp_path / "done").exists():
            time.sleep(0.01)
        time.sleep(1)
    assert [s.watts for s in sampler.samples] == pytest.approx(
        [(i + 1418) / 1e3 for i in range(100)]
    )  # none is waiting in the pipe
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_meters_csv(tmp_path):
    (tmp_path / "m.csv").write_text(
        "timestamp,watts\n2026-11-22T12:00:01Z,5.5\n1795348800.5,4.5\n2026-11-22T13:00:02+01:00,6\n"
    )
    assert [(s.time, s.watts) for s in meter(tmp_path / "m.csv")] == [
        (1795348800.5, 4.5),
        (1795348801.0, 5.5),
        (1795348802.0, 6.0),
    ]


def test_a_moment_for_which_the_meter_had_no_reading_does_not_count(tmp_path):
    (tmp_path / "m.csv").write_text(
        "timestamp,watts\n1795348801,5.5\n1795348802,nan\n1795348803,6.5\n"
    )
    assert [s.watts for s in meter(tmp_path / "m.csv")] == [5.5, 6.5]


@pytest.mark.parametrize(
    "content",
    [
        b"timestamp,watts\n" + b"9" * 400 + b",4\n",
        b'timestamp,watts\n"' + b"x" * 200_000 + b'",4\n',
        b"timestamp,watts\n0001-01-01T00:00:00+23:59,4\n",
        b"timestamp,watts\n9999-12-31T23:59:59-23:59,4\n",
        b"\xff\xfe,\n1\n",
        b"timestamp,timestamp,watts,watts\n1,2\n",
    ],
)
def test_whatever_a_meter_writes_is_finite_readings_or_one_line(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content)
    try:
        readings = meter(tmp_path / "m.csv")
        assert all(math.isfinite(r.time) and math.isfinite(r.watts) for r in readings)
    except EdgeclipError as e:
        assert str(e).startswith(str(tmp_path / "m.csv"))
        assert "\n" not in str(e)
    with pytest.raises(EdgeclipError, match="cannot be read"):
        meter(tmp_path)


@pytest.mark.parametrize("half", ["1795348", "1795348803,", "1795348803,7", '"17953'])
def test_the_row_that_a_meter_is_just_writing_does_not_count(tmp_path, half):
    (tmp_path / "m.csv").write_text(f"timestamp,watts\n1795348801,5.5\n1795348802,6.5\n{half}")
    assert [s.watts for s in meter(tmp_path / "m.csv")] == [5.5, 6.5]


@pytest.mark.parametrize(
    "text",
    [
        "time,watts\n1,2\n",
        "timestamp,watts\n1\n",
        "timestamp,watts\n1,two\n",
        "timestamp,watts\nyesterday,2\n",
        "timestamp,watts\n2026-11-22T12:00:01,2\n",
    ],
)
def test_a_csv_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(EdgeclipError, match=r"m\.csv"):
        meter(tmp_path / "m.csv")


def samples(start, seconds, watts, noise=0.0, celsius=None, hz=10):
    rng = np.random.default_rng(0)
    n = int(seconds * hz)
    return [
        Reading(start + i / hz, watts + noise * rng.normal(), celsius(i / hz) if celsius else None)
        for i in range(n)
    ]


def test_energy_is_power_above_idle_over_images():
    every = samples(0, 10, 4.0) + samples(10, 60, 9.0)
    r = per_image(every, EnergyMarks((0.0, 10.0, 70.0), [(10.0, 0), (70.0, 600)], every), "s")
    assert r.mj_per_image == pytest.approx(500)
    assert r.mj_per_image_half_width == pytest.approx(0, abs=1e-9)
    assert (r.idle_w, r.load_w, r.rate_hz, r.steady) == (
        4.0,
        pytest.approx(9.0),
        pytest.approx(10.0),
        None,
    )


@pytest.mark.parametrize("alike_s", [0.0, 1.0])
def test_the_half_width_holds_the_truth_nineteen_times_of_twenty(alike_s):
    """Ten readings a second for 30 s idle and 60 s of load, whose noise is white, or stays alike
    for a second (an AR(1)).
    """
    rng, inside, runs = np.random.default_rng(1), 0, 2000
    rho = math.exp(-0.1 / alike_s) if alike_s else 0.0
    noise = rng.normal(size=(900, runs))
    for i in range(1, 900):
        noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    for idle, load in zip(noise[:300].T.tolist(), noise[300:].T.tolist(), strict=True):
        inside += abs(np.mean(load) - np.mean(idle)) <= half_width(idle, load)
    assert 0.93 <= inside / runs <= 0.97


def test_the_half_width_is_welchs():
    even, spread = (
        [2.0] * 5,
        [0.0, 1.0, 2.0, 3.0, 4.0],
    )  # of variance 2.5, .5 of the mean; one in each block
    assert half_width(even, spread) == pytest.approx(
        2.776445 * math.sqrt(0.5), rel=4e-3
    )  # t of 4 degrees of freedom, by the tables
    assert half_width(spread, spread) == pytest.approx(2.306004 * math.sqrt(1.0), rel=1e-3)  # of 8
    assert half_width([4.0] * 10, [9.0] * 10) == 0


def test_images_count_from_the_moment_that_the_watts_do():
    """Slow and thirsty while cold, then 10 images a second of 5 W: half a joule each."""
    warm = samples(0, 30, 4.0) + samples(30, 600, 9.0, celsius=lambda t: 40 + min(t, 100) / 2)
    done = [(30.0 + t, t if t < 100 else 100 + 10 * (t - 100)) for t in range(601)]
    r = per_image(warm, EnergyMarks((0.0, 30.0, 630.0), done, warm), "s")
    assert r.steady is True
    assert r.mj_per_image == pytest.approx(500)
    assert r.images == pytest.approx(10 * r.seconds, abs=1)


def test_only_the_part_after_the_board_is_warm_counts():
    warm = samples(10, 600, 9.0, celsius=lambda t: 70 - 30 * math.exp(-t / 60))
    every = samples(0, 10, 4.0) + [
        Reading(s.time, 9.0 - 3 * math.exp(-(s.time - 10) / 60), s.celsius) for s in warm
    ]
    begin = steady_from(warm)
    slope = 30 / 60 * math.exp(-(begin - 10) / 60) * 60  # kelvin a minute at that moment
    assert 10 < begin < 400 and slope < 6
    r = per_image(every, EnergyMarks((0.0, 10.0, 610.0), [(10.0, 0), (610.0, 6000)], every), "s")
    assert r.steady is True and 490 < r.mj_per_image <= 500


def test_a_board_that_never_comes_to_rest_is_called_so():
    rising = samples(10, 60, 9.0, celsius=lambda t: 40 + t / 10)
    assert math.isinf(steady_from(rising))
    marks = EnergyMarks((0.0, 10.0, 70.0), [(10.0, 0), (70.0, 600)], rising)
    r = per_image(samples(0, 10, 4.0) + rising, marks, "s")
    assert r.steady is False and r.mj_per_image == pytest.approx(500)


def test_too_few_samples_are_no_figure():
    marks = EnergyMarks((0.0, 10.0, 70.0), [(10.0, 0), (70.0, 600)], [])
    r = per_image(samples(0, 1, 4.0, hz=1), marks, "s")
    assert r.mj_per_image is None and r.idle_w is None


def test_a_load_is_sampled_while_it_runs(monkeypatch):
    monkeypatch.setattr(energy, "IDLE_S", 1.0)
    busy = [False]

    def query(x):
        busy[0] = True
        energy.time.sleep(0.005)

    source = power.Source("toy", lambda: 9.0 if busy[0] else 4.0)
    r = energy.measure(energy.Load(query, [0], 3.0), source)
    assert r.idle_w == pytest.approx(4.0)
    assert r.load_w == pytest.approx(9.0, abs=0.3)
    assert r.samples_load >= 20
    assert (
        r.mj_per_image == pytest.approx(5e3 * r.seconds / r.images, rel=0.1)
        and r.images <= 3.0 / 0.005 + 1
    )


@pytest.mark.parametrize("ahead", [0.0, 100.0, -7.5])
def test_a_meter_on_the_hosts_clock_is_read_by_the_boards_marks(tmp_path, ahead):
    """2 W idle for 10 s, 5 W for 20 s of 400 images: 3 W of 50 ms are 150 mJ, whatever the board's
    clock says.
    """
    rows = [f"{1000 + t / 10},{2 if t < 100 else 5}" for t in range(300)]
    (tmp_path / "m.csv").write_text("timestamp,watts\n" + "\n".join(rows) + "\n")
    marks = EnergyMarks(
        (1000 + ahead, 1010 + ahead, 1030 + ahead),
        [(1010 + ahead, 0), (1030 + ahead, 400)],
        [],
    )
    found = by_the_hosts_meter(
        tmp_path / "m.csv", marks, (ahead - 0.02, 0.05), (ahead + 0.02, 0.03)
    )
    assert found.mj_per_image == pytest.approx(150) and found.clock_offset_s == pytest.approx(ahead)
    assert found.clock_half_width_s == pytest.approx(0.07)
    assert found.samples_idle == 99
    assert found.samples_load == 199
    late = by_the_hosts_meter(tmp_path / "m.csv", marks, (ahead + 100, 0.05), (ahead + 100, 0.05))
    assert late.mj_per_image is None  # nothing of the file lies in that time
