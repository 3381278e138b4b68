"""The history of engines: what an upgrade did to accuracy, and which parity report is of an engine."""

import json

from edgeclip.reports.engines import remember, validated

CONDITIONS = {"onnx": "o", "tensorrt": "10.3.0", "jetpack": "6.1", "power_mode": "MAXN"}


def parity(key, top1, jetpack, verdict="pass"):
    ran = {
        "runtime": "tensorrt",
        "engine": key,
        "conditions": CONDITIONS | {"jetpack": jetpack},
        "layers": {"Half": 3},
    }
    return {
        "target": "t",
        "bundle": "b",
        "ran": ran,
        "accuracy": {"bundle_top1": top1},
        "cosine": {"centered_p1": 0.9},
        "verdict": verdict,
    }


def test_a_jetpack_upgrade_that_moves_accuracy_is_seen(tmp_path):
    path = tmp_path / "h.json"
    assert remember(path, parity("k1", 0.716, "6.1"), "monday") is None
    assert remember(path, parity("k1", 0.716, "6.1"), "tuesday") is None
    line = remember(path, parity("k2", 0.684, "6.2", "fail"), "friday")
    moved = "top-1 0.7160 -> 0.6840 (-3.20 pp), pass -> fail"
    assert line == f"t: a new engine (jetpack 6.1 -> 6.2): {moved}"
    assert [e["when"] for e in json.loads(path.read_text())] == ["monday", "tuesday", "friday"]


def test_a_benchmark_counts_for_the_engine_that_was_validated():
    bench = {"bundle": "b", "ran": {"engine": "k1"}}
    assert validated(parity("k1", 0.7, "6.1"), bench)
    assert not validated(parity("k2", 0.7, "6.1"), bench)
    assert not validated(None, bench)
    assert not validated(parity("k1", 0.7, "6.1") | {"bundle": "other"}, bench)


def test_a_report_without_an_engine_leaves_no_history(tmp_path):
    assert remember(tmp_path / "h.json", {"ran": {"runtime": "onnxruntime"}}, "now") is None
    assert not (tmp_path / "h.json").exists()
