"""The commands that run on a device, this machine or a board: validate, bench, doctor."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edgeclip.cli import tables
from edgeclip.cli.options import json_option
from edgeclip.errors import EdgeclipError


def _options(f: Callable[..., Any]) -> Callable[..., Any]:
    @click.option(
        "--run",
        type=click.Path(path_type=Path),
        help="Every bundle of this run.  [default: runs/latest]",
    )
    @click.option("--bundle", type=click.Path(path_type=Path), help="One bundle folder.")
    @click.option(
        "--clean",
        is_flag=True,
        help="Afterwards remove everything that edgeclip left on the board.",
    )
    @functools.wraps(f)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs["run"] and kwargs["bundle"]:
            raise click.UsageError("--run and --bundle exclude each other")
        return f(*args, **kwargs)

    return wrapped


def _bundles(
    run: Path | None, bundle: Path | None, name: str, device: Any
) -> tuple[list[Any], Path | None]:
    """(bundles that the device can run, the run's folder or None); those that it cannot run are named."""
    from edgeclip import disk
    from edgeclip.device.bundle import Bundle
    from edgeclip.reports.store import latest_run

    if bundle is None:
        run = latest_run(run)
        folders = sorted(p for p in (run / "bundles").glob("*") if (p / disk.MANIFEST).exists())
        if not folders:
            raise EdgeclipError(
                run, "has no bundle", "make one with: edgeclip export --target onnx-int8"
            )
    else:
        folders = [bundle]
        run = next(
            (p for p in bundle.resolve().parents if (p / "evaluation" / disk.MANIFEST).exists()),
            None,
        )
    bundles = []
    for folder in folders:
        loaded = Bundle.load(folder, threads=device.threads, check=True, providers=device.providers)
        if loaded.manifest.runtime in device.runtimes:
            bundles.append(loaded)
        else:
            click.echo(f"{folder.name}: not run, {name} has no {loaded.manifest.runtime}", err=True)
    if not bundles:
        raise EdgeclipError(
            name,
            f"can run none of these bundles (it has {', '.join(device.runtimes)})",
            "choose another --device or --bundle",
        )
    return bundles, run


@contextlib.contextmanager
def _board(name: str, device: Any, clean: bool) -> Iterator[Any]:
    """An open board, or None where the device is this machine. clean: what the board holds goes, whatever happens meanwhile."""
    from edgeclip.device import profile as D

    if not D.is_remote(device):
        with D.pinned(device):
            yield None
        return
    from edgeclip.boards.board import Board

    with Board(name, device) as board:
        try:
            yield board
        except Exception:
            if clean:
                with contextlib.suppress(
                    EdgeclipError
                ):  # what went wrong first is what the user sees
                    board.clean()
            raise
        if clean:
            board.clean()


@click.command()
@_options
@click.option(
    "--device",
    "device_name",
    default="host-cpu",
    show_default=True,
    help="A name from `edgeclip list devices`, or a YAML file.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    help="So many evaluation images, always the same ones, where a device is slow.  [default: all]",
)
@json_option
def validate(
    run: Path | None,
    bundle: Path | None,
    clean: bool,
    device_name: str,
    images: int | None,
    as_json: bool,
) -> None:
    """Compare bundles with the fp32 student on a device: values, decisions, accuracy.

    \b
    A board is reached over ssh; what it lacks is copied there. Exits 3 when a tolerance failed, 4 when there are
    too few images to tell.
    Example:
        edgeclip validate --run runs/quickstart --device host-cpu
    """
    from edgeclip.device import profile as D
    from edgeclip.device.validate import load_evaluation
    from edgeclip.device.validate import validate as compare
    from edgeclip.reports import store

    name, device = D.load(device_name)
    bundles, run = _bundles(run, bundle, name, device)
    evaluation = load_evaluation(run / "evaluation", images) if run else None
    with _board(name, device, clean) as board:
        if board is None:
            here = D.require_here(name, device)
            reports = [store.write(compare(b, evaluation, here), name, run, b) for b in bundles]
        else:
            board.prepare(bundles, evaluation)
            reports = [store.write(board.validate(b, evaluation), name, run, b) for b in bundles]
    if as_json:
        click.echo(json.dumps(reports, indent=1))
    else:
        tables.parity(reports)
    sys.exit(store.exit_code(reports))


@click.command()
@_options
@click.option(
    "--device",
    "devices",
    multiple=True,
    help="A name from `edgeclip list devices`, or a YAML file; several are compared.  [default: host-cpu]",
)
@click.option(
    "--scenario",
    type=click.Choice(["single_stream", "multi_stream", "offline"]),
    help="MLPerf's; all three when omitted.",
)
@click.option(
    "--minutes",
    default=0.0,
    help="So many minutes of sustained load besides: temperature, throttling, drift of p90.",
)
@click.option(
    "--meter",
    "meter_csv",
    type=click.Path(path_type=Path),
    help="A CSV (timestamp, watts) that a power meter of the one --device is writing here meanwhile.",
)
@json_option
def bench(
    run: Path | None,
    bundle: Path | None,
    clean: bool,
    devices: tuple[str, ...],
    scenario: str | None,
    minutes: float,
    meter_csv: Path | None,
    as_json: bool,
) -> None:
    """Measure latency, throughput, stages, cold start, memory and energy on one device or several.

    \b
    Exits 3 when a device's budget is exceeded, or when its timings are refused.
    Examples:
        edgeclip bench --bundle runs/quickstart/bundles/onnx-int8 --scenario single_stream
        edgeclip bench --run runs/quickstart --device raspberry-pi-5 --device intel-n100
    """
    from edgeclip.device import energy
    from edgeclip.device.bench import SCENARIOS
    from edgeclip.reports import comparison, store

    if meter_csv and len(devices) > 1:
        raise click.UsageError("--meter is one power meter: give one --device")
    if meter_csv and scenario not in (None, "single_stream"):
        raise click.UsageError("--meter measures single_stream: leave --scenario out")
    if meter_csv:
        energy.meter(meter_csv)  # before the clock starts
    scenarios, reports, parities = (scenario,) if scenario else SCENARIOS, [], []
    for device_name in devices or ("host-cpu",):
        new, found = _bench_one(device_name, run, bundle, clean, scenarios, minutes, meter_csv)
        reports += new
        parities += found
        if not as_json:
            tables.bench(new)
    rows, lines = comparison.rows(reports, parities), comparison.int8_gain(reports)
    if as_json:
        click.echo(
            json.dumps(
                reports
                if len(devices) < 2
                else {"reports": reports, "comparison": rows, "int8": lines},
                indent=1,
            )
        )
    elif len(reports) > 1:
        tables.comparison(rows, lines)
    sys.exit(store.exit_code(reports))


def _bench_one(
    device_name: str,
    run: Path | None,
    bundle: Path | None,
    clean: bool,
    scenarios: tuple[str, ...],
    minutes: float,
    meter_csv: Path | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any] | None]]:
    """(the bench reports of one device, the parity report of each where there is one)"""
    from edgeclip import disk
    from edgeclip.boards import preflight
    from edgeclip.boards.doctor import preflight_here
    from edgeclip.device import profile as D
    from edgeclip.device.bench import bench as measure
    from edgeclip.device.bench import incomplete
    from edgeclip.device.validate import load_evaluation
    from edgeclip.device.validate import validate as compare
    from edgeclip.errors import LinkLost
    from edgeclip.reports import store
    from edgeclip.reports.engines import validated
    from edgeclip.reports.store import joined

    name, device = D.load(device_name)
    bundles, run = _bundles(run, bundle, name, device)
    short = (
        disk.read_json(run / "recipe.json").get("bench")
        if run and (run / "recipe.json").exists()
        else None
    )
    minimum = D.Minimum(**short) if short else device.bench
    evaluation = load_evaluation(run / "evaluation") if run else None
    reports, parities = [], []
    with _board(name, device, clean) as board:
        if board is None:
            D.require_here(name, device)
            here, rows = preflight_here(device, [b.manifest for b in bundles])
            preflight.require(name, rows)
        else:
            rows = board.prepare(bundles, evaluation)
        for b in bundles:
            earlier = store.read(run, b, name, "bench")
            try:
                if board is None:
                    report = measure(
                        b,
                        device,
                        here,
                        evaluation.folder if evaluation else None,
                        minimum,
                        scenarios,
                        minutes,
                        meter_csv,
                    )
                else:
                    report = board.bench(b, minimum, scenarios, minutes, meter_csv)
            except LinkLost as e:
                if (
                    earlier is None or "incomplete" in earlier
                ):  # a whole report of this bundle stays
                    store.write(incomplete(b, board.facts, minimum, str(e)), name, run, b)
                raise
            report = (joined(report, earlier, device) if earlier else report) | {
                "preflight": [r._asdict() for r in rows]
            }
            parity = store.read(run, b, name, "parity")
            if "engine" in report["ran"] and not validated(
                parity, report
            ):  # a benchmark of an engine counts once it is known to answer right
                parity = store.write(
                    compare(b, evaluation, here)
                    if board is None
                    else board.validate(b, evaluation),
                    name,
                    run,
                    b,
                )
            if "engine" in report["ran"] and parity is not None and parity["verdict"] == "fail":
                report["failures"] += [f"parity of this engine: {f}" for f in parity["failures"]]
            reports.append(store.write(report, name, run, b))
            parities.append(parity)
    return reports, parities


@click.command()
@_options
@click.option(
    "--device",
    "device_name",
    required=True,
    help="A name from `edgeclip list devices`, or a YAML file.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder of the reports.  [default: the working folder]",
)
@json_option
def selftest(
    run: Path | None, bundle: Path | None, clean: bool, device_name: str, out: Path, as_json: bool
) -> None:
    """Try on a device what could not be tried without one; writes a report to attach to an issue.

    \b
    Engine, golden answers, batches, power rails, counters: docs/devices.md says what is open. Exits 3 when a step failed.
    Example:
        edgeclip selftest --bundle runs/latest/bundles/tensorrt-fp16 --device jetson-orin-nano
    """
    from edgeclip.device import profile as D
    from edgeclip.device.selftest import selftest as examine
    from edgeclip.device.selftest import write
    from edgeclip.reports import store

    name, device = D.load(device_name)
    bundles, _ = _bundles(run, bundle, name, device)
    with _board(name, device, clean) as board:
        if board is not None:
            board.prepare(bundles, None)
        reports = [examine(b, device) if board is None else board.selftest(b) for b in bundles]
    paths = [str(write(r, name, out)) for r in reports]
    if as_json:
        click.echo(json.dumps(reports, indent=1))
    else:
        tables.selftest(reports, paths)
    sys.exit(store.exit_code(reports))


@click.command()
@click.option(
    "--device",
    "device_name",
    help="Look at that device instead: is it reached, is it what the profile says, is it fit to be measured?",
)
@click.option("--clean", is_flag=True, help="Remove everything that edgeclip left on the board.")
@json_option
def doctor(device_name: str | None, clean: bool, as_json: bool) -> None:
    """What this machine or a board can do, and how to install what is missing.

    \b
    With --device it prints the preflight: pass, warn, fail; exits 3 when something fails.
    Example:
        edgeclip doctor --device host-cpu
    """
    from edgeclip.boards.doctor import doctor as examine
    from edgeclip.boards.doctor import preflight_here
    from edgeclip.device import profile as D
    from edgeclip.reports.store import GATE_FAILED

    if device_name is None:
        found = examine()
        click.echo(json.dumps(found, indent=1)) if as_json else tables.doctor(found)
        return
    name, device = D.load(device_name)
    with _board(name, device, clean) as board:
        facts, rows = (
            preflight_here(device) if board is None else (board.facts, board.preflight([], None))
        )
    found = {
        **({"machine": facts} if D.is_remote(device) else examine()),
        "device": name,
        "preflight": [r._asdict() for r in rows],
    }
    click.echo(json.dumps(found, indent=1)) if as_json else tables.preflight(found)
    if any(r.status == "fail" for r in rows):
        sys.exit(GATE_FAILED)
