"""The history of engines: what an upgrade did to accuracy, and which parity report is of an
engine.
"""

import msgspec

from edgeclip import disk
from edgeclip.device.records import EngineConditions, Ran
from edgeclip.reports.engines import remember, validated
from tests.support.reports import accuracy, bench_report, parity_report

CONDITIONS = EngineConditions(
    onnx="o",
    tensorrt="10.3.0",
    sm="8.7",
    jetpack="6.1",
    l4t=None,
    power_mode="MAXN",
    options={},
)


def parity(key, top1, jetpack, verdict="holds"):
    conditions = msgspec.structs.replace(CONDITIONS, jetpack=jetpack)
    ran = Ran(
        runtime="tensorrt",
        version="10.3.0",
        threads=1,
        engine=key,
        conditions=conditions,
        layers={"fp16": 3},
    )
    return parity_report(ran=ran, accuracy=accuracy(top1), verdict=verdict)


def test_a_jetpack_upgrade_that_moves_accuracy_is_seen(tmp_path):
    path = tmp_path / "h.json"
    assert remember(path, parity("k1", 0.716, "6.1"), "monday") is None
    assert remember(path, parity("k1", 0.716, "6.1"), "tuesday") is None
    line = remember(path, parity("k2", 0.684, "6.2", "fails"), "friday")
    moved = "top-1 0.7160 -> 0.6840 (-3.20 pp), holds -> fails"
    assert line == f"t: a new engine (jetpack 6.1 -> 6.2): {moved}"
    assert [e["when"] for e in disk.read_entries(path)] == ["monday", "tuesday", "friday"]


def test_a_benchmark_counts_for_the_engine_that_was_validated():
    bench = bench_report(ran=Ran(runtime="tensorrt", version="10.3.0", threads=1, engine="k1"))
    assert validated(parity("k1", 0.7, "6.1"), bench)
    assert not validated(parity("k2", 0.7, "6.1"), bench)
    assert not validated(None, bench)
    assert not validated(msgspec.structs.replace(parity("k1", 0.7, "6.1"), bundle="other"), bench)


def test_a_report_without_an_engine_leaves_no_history(tmp_path):
    assert remember(tmp_path / "h.json", parity_report(), "now") is None
    assert not (tmp_path / "h.json").exists()
