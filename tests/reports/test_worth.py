"""Whether int8 is worth it is read off ratios with intervals, and a loaded machine answers
nothing.
"""

import msgspec

from edgeclip import disk
from edgeclip.device.bench_report import Beside, BesideRow, Ratio
from edgeclip.reports import store, worth
from edgeclip.reports.headline import headline
from edgeclip.reports.targets import collect
from tests.support.finished_run import make_run
from tests.support.manifests import manifest_fields
from tests.support.reports import MACHINE
from tests.support.reports import host_bench as bench
from tests.support.reports import host_parity as parity


def ratio(median: float, half: float = 0.1) -> Ratio:
    return Ratio(median=median, low=median - half, high=median + half)


def row(name: str, precision: str, times: float, ms: float, digest: str = "") -> BesideRow:
    return BesideRow(
        name=name, bundle=digest, precision=precision, whole_ms=ms, model_ms=ms / 2,
        whole=ratio(times), model=ratio(times),
    )  # fmt: skip


def beside(*rows: BesideRow, others: float = 0.0) -> Beside:
    return Beside(
        device="host-cpu", machine=MACHINE, rounds=41, others_busy=others, rows=list(rows)
    )


def test_each_of_three_answers():
    first = row("f", "fp32", 1.0, 4.0)
    for times, says in ((1.5, "Yes: "), (0.7, "No: "), (1.05, "Not by these rounds: ")):
        assert worth.answer(beside(first, row("i", "int8", times, 4 / times))).startswith(says)
    assert worth.answer(beside(first)) == "No int8 bundle was timed"
    assert worth.answer(beside(first, row("i", "int8", 1.5, 3.0), others=1.0)).startswith(
        "Not known"
    )


def test_the_quickest_of_equals_is_recommended_and_the_other_says_why_not(tmp_path):
    run = make_run(tmp_path / "run")
    with disk.new_folder(run / "bundles" / "u") as b:
        disk.write_text(b / "image_encoder.onnx", "x")
        disk.write_manifest(b, "bundle", manifest_fields("u"))
    digests = {n: disk.sha256(run / "bundles" / n / disk.MANIFEST) for n in ("t", "u")}
    for report in (parity(bundle=digests["u"]), bench(bundle=digests["u"])):
        disk.write_record(run / "reports" / f"u.host-cpu.{report.kind}.json", report)
    found = beside(
        row("t", "fp32", 1.0, 4.0, digests["t"]), row("u", "int8", 2.0, 2.0, digests["u"])
    )
    store.write_beside(found, "host-cpu", run)
    head = headline("runs/run", collect(run), worth.read(run))
    assert head.word == "SHIP" and head.target.name == "u"
    assert head.others == ["t on host-cpu: ship too; 4.00 ms from image to label, not 2.00"]
    # Bundles that were made anew were not timed.
    with disk.new_folder(run / "bundles" / "u") as b:
        disk.write_text(b / "image_encoder.onnx", "y")
        disk.write_manifest(b, "bundle", manifest_fields("u"))
    assert worth.read(run) == []


def test_times_under_load_do_not_replace_quiet_ones(tmp_path):
    run = make_run(tmp_path / "run")
    digest = disk.sha256(run / "bundles" / "t" / disk.MANIFEST)
    quiet = beside(row("t", "fp32", 1.0, 4.0, digest))
    store.write_beside(quiet, "host-cpu", run)
    store.write_beside(msgspec.structs.replace(quiet, others_busy=1.5), "host-cpu", run)
    (kept,) = worth.read(run)
    assert kept == quiet
    assert (run / "reports" / "host-cpu.beside-under-load.json").exists()
