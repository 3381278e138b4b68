"""A bundle's line says ship, do not ship or cannot say, and every reason."""

import pytest

from edgeclip.device.records import Rule
from edgeclip.reports.headline import headline
from edgeclip.reports.targets import answer, collect, verdict
from tests.support.finished_run import make_run
from tests.support.reports import host_bench as bench
from tests.support.reports import host_parity as parity


def test_what_passed_and_was_measured_ships():
    line = verdict(parity(), bench())
    assert line.startswith("ship: ")
    assert "0.25 pp" in line
    assert "0.75" in line
    assert "400 unseen images" in line
    assert "2.25 ms" in line


SLOW = Rule(rule="p90", unit="ms", allowed=1.0, answer="cannot tell", why="too few queries: 9")
UNTOLD = Rule(rule="accuracy lost", unit="pp", allowed=1.0, answer="cannot tell", needed=900)


@pytest.mark.parametrize(
    ("p", "b", "reasons"),
    [
        (None, None, ["not validated", "not benchmarked"]),
        (parity(), None, ["not benchmarked"]),
        (parity(), bench(single_stream=None), ["single_stream not measured"]),
        (None, bench(), ["not validated"]),
        (parity(), bench(others_busy=1.5), ["times unknown", "1.5 processors", "repeat"]),
        (parity(), bench(rules=[SLOW], verdict="cannot tell"), ["p90", "too few queries"]),
        (parity(verdict="cannot tell", rules=[UNTOLD]), bench(), ["about 900 images would tell"]),
        (
            parity(verdict="cannot tell", accuracy=None, not_compared="no run beside it"),
            bench(),
            ["no run beside it"],
        ),
        (parity(verdict="cannot tell"), bench(), ["validated by an older edgeclip"]),
    ],
)
def test_what_is_not_known_of_a_bundle_is_on_the_line(p, b, reasons):
    line = verdict(p, b)
    assert line.startswith("cannot say: ") and answer(p, b) == "cannot tell"
    assert all(r in line for r in reasons)
    assert "\n" not in line


@pytest.mark.parametrize(
    ("p", "b", "reasons"),
    [
        (
            parity(
                verdict="fails",
                failures=["top-1 agreement 0.5, below 0.9", "accuracy drop 9 pp, above 1"],
            ),
            bench(),
            ["top-1 agreement", "accuracy drop"],
        ),
        (
            parity(),
            bench(failures=["p90 of the model alone: fails, 9.00 ms, allowed 5"]),
            ["p90 of the model alone: fails", "allowed 5"],
        ),
    ],
)
def test_every_reason_against_shipping_is_on_the_line(p, b, reasons):
    line = verdict(p, b)
    assert line.startswith("do not ship: ")
    assert all(r in line for r in reasons)
    assert "\n" not in line


def test_only_a_bundle_whose_files_are_those_that_were_measured_ships(tmp_path):
    run = make_run(tmp_path / "run")
    (target,) = collect(run)
    assert target.damage is None
    file = run / "bundles" / "t" / "image_encoder.onnx"
    whole = file.read_bytes()
    for content in (b"y", None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        (target,) = collect(run)
        assert target.answer == "fails"
        assert target.verdict.startswith("do not ship: ")
        assert "image_encoder.onnx" in target.verdict
        found = headline("run", [target])
        assert found.word == "DO NOT SHIP"
        assert found.next_step == "edgeclip export --run run --target t"
        file.write_bytes(whole)
