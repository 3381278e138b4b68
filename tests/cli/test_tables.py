"""A table that the terminal is too narrow for is a list: name and verdict first."""

import pytest

from edgeclip.cli.tables import measured, plain
from tests.support.reports import bench_report, parity_report

ROWS = [["onnx-int8", 1.5, None, "holds"], ["onnx-fp32", 3.0, 4, "cannot tell"]]
HEADERS = ("target", "p90 ms", "peak MiB", "verdict")


def printed(capsys, monkeypatch, columns, show):
    monkeypatch.setenv("COLUMNS", str(columns))
    show()
    return capsys.readouterr().out.splitlines()


def test_a_narrow_terminal_gets_a_list(capsys, monkeypatch):
    lines = printed(capsys, monkeypatch, 30, lambda: plain.table(ROWS, HEADERS))
    assert lines[:3] == ["onnx-int8: holds", "  p90 ms    1.5", "  peak MiB  not measured"]
    assert lines[3] == "onnx-fp32: cannot tell"
    wide = printed(capsys, monkeypatch, 60, lambda: plain.table(ROWS, HEADERS))
    assert wide[0].split() == ["target", "p90", "ms", "peak", "MiB", "verdict"]


@pytest.mark.parametrize("columns", [80, 119])
@pytest.mark.parametrize(
    ("show", "first"),
    [
        (lambda: measured.parity([parity_report(target="onnx-int8")]), "onnx-int8: holds"),
        (lambda: measured.bench([bench_report(target="onnx-int8")]), "onnx-int8: holds"),
    ],
    ids=["validate", "bench"],
)
def test_validate_and_bench_fit_a_terminal(capsys, monkeypatch, columns, show, first):
    lines = printed(capsys, monkeypatch, columns, show)
    assert lines[0] == first
    assert max(len(line) for line in lines[:10]) <= columns


def test_a_p99_that_was_withheld_says_why(capsys, monkeypatch):
    few = bench_report(target="t")
    single = plain_single(few)
    lines = printed(capsys, monkeypatch, 80, lambda: measured.bench([single]))
    assert any("p99 ms" in line and "too few: 381 of 1,000" in line for line in lines)


def plain_single(report):
    import msgspec

    few = msgspec.structs.replace(report.single_stream, queries=381, latency_ms_p99=None)
    return msgspec.structs.replace(report, single_stream=few)
