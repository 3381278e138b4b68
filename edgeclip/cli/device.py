"""The commands that run on a device, this machine or a board: validate, bench, selftest, doctor."""

import functools
import sys
from pathlib import Path
from typing import Any

import click

from edgeclip.cli.group import command
from edgeclip.cli.options import PATH, F, FiniteFloat, device_option, json_option, print_json

A_DEVICE = "A name from `edgeclip list devices`, or a YAML file."
SCENARIOS: tuple[str, ...] = ("single_stream", "multi_stream", "offline", "whole_image")


def selection_options(f: F) -> F:
    """Which bundles are measured, and whether the board is left clean."""

    @click.option("--run", type=PATH, help="Every bundle of this run.  [default: runs/latest]")
    @click.option("--bundle", type=PATH, help="One bundle folder.")
    @click.option(
        "--clean", is_flag=True, help="Afterwards remove everything edgeclip left on the board."
    )
    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs["run"] and kwargs["bundle"]:
            raise click.UsageError("--run and --bundle exclude each other")
        return f(*args, **kwargs)

    return wrapped


@command()
@selection_options
@device_option("device", A_DEVICE, default="host-cpu", show_default=True)
@click.option(
    "--images-limit",
    type=click.IntRange(min=1),
    help="Validate on a fixed random subset of N images, for a slow device.  [default: all]",
)
@json_option
def validate(images_limit: int | None, as_json: bool, **selection: Any) -> None:
    """Compare bundles with the fp32 student, on a device.

    Compares features, answers and accuracy on the run's evaluation images. A board is reached over
    ssh; what it lacks is copied there. Exits 3 when a tolerance fails, 4 when these images cannot
    tell whether all hold; then it says how many would.

    \b
    Example:
        edgeclip validate --run runs/quickstart --device host-cpu
    """
    from edgeclip.boards import measure
    from edgeclip.boards.selection import Selection
    from edgeclip.cli.tables import measured
    from edgeclip.reports.store import exit_code

    reports = measure.validate(Selection(**selection), images_limit)
    if as_json:
        print_json(reports)
    else:
        measured.parity(reports)
    sys.exit(exit_code(reports))


@command()
@selection_options
@device_option(
    "devices",
    f"{A_DEVICE} Repeat it to compare devices.  [default: host-cpu]",
    multiple=True,
)
@click.option(
    "--scenario",
    type=click.Choice(SCENARIOS),
    help="One of MLPerf's scenarios, or the whole way from an image to its label.  [default: all]",
)
@click.option(
    "--minutes",
    type=FiniteFloat(min=0),
    default=0.0,
    help="Also run N minutes of sustained load: temperature, throttling and p90 drift.",
)
@click.option(
    "--meter",
    "meter_csv",
    type=PATH,
    help="CSV (timestamp, watts) that a power meter of the one --device writes meanwhile.",
)
@json_option
def bench(
    devices: tuple[str, ...],
    scenario: str | None,
    minutes: float,
    meter_csv: Path | None,
    as_json: bool,
    **selection: Any,
) -> None:
    """Measure latency, throughput, memory and energy of bundles.

    Measures on one device or several: the image encoder in MLPerf's scenarios, the whole way from
    an image to its label, and cold start. Exits 3 when a device's budget is exceeded or its timings
    are refused, 4 when it cannot be told whether a budget holds: not measured, too few queries, or
    other work on the machine meanwhile.

    \b
    Examples:
        edgeclip bench --bundle runs/quickstart/bundles/onnx-int8 --scenario single_stream
        edgeclip bench --run runs/quickstart --device raspberry-pi-5 --device intel-n100
    """
    if meter_csv and len(devices) > 1:
        raise click.UsageError("--meter is one power meter: give one --device")
    if meter_csv and scenario not in (None, "single_stream"):
        raise click.UsageError("--meter measures single_stream: leave --scenario out")
    from edgeclip.boards import measure
    from edgeclip.boards.selection import Selection
    from edgeclip.cli.tables import measured
    from edgeclip.reports.store import exit_code

    scenarios = SCENARIOS
    if scenario is not None:
        scenarios = (scenario,)
    benched = []
    for device in devices or ("host-cpu",):
        chosen = Selection(device, **selection)
        benched.append(measure.bench(chosen, scenarios, minutes, meter_csv))
        if not as_json:
            measured.bench(benched[-1].reports, benched[-1].beside)
    reports = _compared(benched, as_json)
    sys.exit(exit_code(reports))


def _compared(benched: list[Any], as_json: bool) -> list[Any]:
    """Print the comparison of all devices' reports; return the reports."""
    from edgeclip.cli.tables import measured
    from edgeclip.reports import comparison

    reports: list[Any] = []
    parities: list[Any] = []
    for one in benched:
        reports += one.reports
        parities += one.parities
    rows = comparison.rows(reports, parities)
    lines: list[str] = []
    if not any(one.beside for one in benched):  # else they were timed turn by turn, which is better
        lines = comparison.int8_gain(reports)
    if as_json and len(benched) == 1:
        print_json(reports)
    elif as_json:
        print_json({"reports": reports, "comparison": rows, "int8": lines})
    elif len(reports) > 1:
        measured.comparison(rows, lines)
    return reports


@command()
@selection_options
@device_option("device", A_DEVICE, required=True)
@click.option(
    "--out", type=PATH, default=Path(), help="Folder of the reports.  [default: working folder]"
)
@json_option
def selftest(out: Path, as_json: bool, **selection: Any) -> None:
    """Try a device, and write a report to attach to an issue.

    Tries the engine, golden answers, batches, power rails and counters; docs/devices.md says what
    has never run on a board. Exits 3 when a step failed.

    \b
    Example:
        edgeclip selftest --bundle runs/latest/bundles/tensorrt-fp16 --device jetson-orin-nano
    """
    from edgeclip import disk
    from edgeclip.boards import measure
    from edgeclip.boards.selection import Selection
    from edgeclip.cli.tables import devices
    from edgeclip.device.profile import load
    from edgeclip.device.selftest import write
    from edgeclip.reports.store import exit_code

    disk.refuse_unwritable(out)
    chosen = Selection(**selection)
    reports = measure.selftest(chosen)
    name, _ = load(chosen.device)
    paths = [str(write(report, name, out)) for report in reports]
    if as_json:
        print_json(reports)
    else:
        devices.selftest(reports, paths)
    sys.exit(exit_code(reports))


@command()
@device_option("device", "Look at this device instead: is it reached, and fit to be measured?")
@click.option("--clean", is_flag=True, help="Remove everything edgeclip left on the board.")
@json_option
def doctor(device: str | None, clean: bool, as_json: bool) -> None:
    """Show what this machine or a board can do, and what is missing.

    With --device it prints the preflight checks (pass, warn, fail) and exits 3 when one fails.

    \b
    Example:
        edgeclip doctor --device host-cpu
    """
    from edgeclip.boards import doctor as library
    from edgeclip.cli.tables import devices

    if device is None:
        found = library.doctor()
        if as_json:
            print_json(found)
        else:
            devices.doctor(found)
        return
    _preflight(device, clean, as_json)


def _preflight(device: str, clean: bool, as_json: bool) -> None:
    from edgeclip.boards import doctor as library
    from edgeclip.boards.measure import preflight
    from edgeclip.cli.tables import devices
    from edgeclip.reports.store import GATE_FAILED

    checked = preflight(device, clean)
    if as_json:
        machine = {"machine": checked.facts}
        if not checked.remote:
            machine = library.doctor()
        print_json({**machine, "device": checked.name, "preflight": checked.rows})
    else:
        devices.preflight(checked.name, checked.rows)
    if any(row.status == "fail" for row in checked.rows):
        sys.exit(GATE_FAILED)
