"""The front holds what nothing else beats, and an axis that was not measured everywhere is left
out.
"""

from edgeclip.device.machine import Facts
from edgeclip.device.records import Ran
from edgeclip.reports.comparison import Row, int8_gain, pareto, rows, scope
from tests.support.reports import accuracy, bench_report, energy, parity_report, scenario


def row(name, accuracy, latency, energy=None, size=10):
    return Row(
        target=name,
        accuracy=accuracy,
        latency_ms_p90=latency,
        energy_mj_per_image=energy,
        image_encoder_bytes=size,
    )


def front(*table):
    return [r.target for r in pareto(list(table)) if r.on_front]


def test_a_front_by_hand():
    assert front(
        row("fast", 0.8, 1.0),
        row("right", 0.9, 5.0),
        row("worse", 0.8, 2.0),
        row("between", 0.85, 3.0),
    ) == ["fast", "right", "between"]


def test_equals_do_not_beat_each_other():
    assert front(row("a", 0.8, 1.0), row("b", 0.8, 1.0)) == ["a", "b"]


def test_smaller_counts_where_all_else_is_equal():
    assert front(row("a", 0.8, 1.0, size=9), row("b", 0.8, 1.0)) == ["a"]


def test_an_axis_that_one_row_lacks_takes_no_part():
    table = pareto([row("a", 0.8, 1.0, energy=9.0), row("b", 0.8, 2.0, energy=1.0)])
    assert [r.on_front for r in table] == [True, True]
    assert "energy_mj_per_image" in table[0].axes
    table = pareto([row("a", 0.8, 1.0, energy=9.0), row("b", 0.8, 2.0)])
    assert [r.on_front for r in table] == [True, False]
    assert "energy_mj_per_image" not in table[0].axes


def test_axes_on_other_terms_take_no_part():
    """1 mJ of a chip is not less than 2 mJ of a whole board, nor is 0.9 of 10 images more than 0.8
    of 400.
    """
    pair = [
        report("n100", "a", 1.0, [], "fp32"),
        report("pi", "b", 1.0, [], "fp32", energy("meter: m.csv")),
    ]
    parities = [
        parity_report(accuracy=accuracy(top1), images=n) for top1, n in ((0.9, 10), (0.8, 400))
    ]
    found = rows(pair, parities)[0]
    assert found.axes == ["latency_ms_p90", "image_encoder_bytes"]
    assert found.left_out == {
        "accuracy": "images differ: 10, 400",
        "energy_mj_per_image": "energy scope differ: all that the meter sees, the chip by RAPL",
    }
    same = rows([pair[0], pair[0]], [parities[0], parities[0]])[0]
    assert same.axes == ["accuracy", "latency_ms_p90", "energy_mj_per_image", "image_encoder_bytes"]
    assert same.left_out == {}
    assert (scope("ina3221: VDD_IN"), scope("tegrastats: VDD_IN")) == ("the rails VDD_IN",) * 2


def test_refused_timings_are_neither_on_the_front_nor_off_it():
    table = pareto([row("a", 0.8, 1.0), row("emulated", 0.9, None)])
    assert [r.on_front for r in table] == [True, None]


def report(device, target, p50, isa, precision, measured=None):
    measured = measured or energy()
    return bench_report(
        device=device,
        target=target,
        single_stream=scenario(p50, p50),
        energy=measured,
        energy_mj_per_image=measured.mj_per_image,
        machine=Facts(arch="aarch64", python="3.11.2", os="an os", isa=isa),
        ran=Ran(runtime="onnxruntime", version="1", threads=1, precision=precision),
    )


def test_int8_is_held_against_fp32_of_the_same_core():
    pi5 = [
        report("pi-5", "onnx-fp32", 10.0, ["asimddp"], "fp32"),
        report("pi-5", "onnx-int8-arm", 4.0, ["asimddp"], "int8"),
    ]
    pi4 = [
        report("pi-4", "onnx-fp32", 20.0, [], "fp32"),
        report("pi-4", "onnx-int8-arm", 25.0, [], "int8"),
    ]
    assert int8_gain(pi5 + pi4) == [
        "pi-5: onnx-int8-arm is 2.50 times as fast as onnx-fp32; this core has dot-product",
        "pi-4: onnx-int8-arm is slower than (0.80 times as fast as) onnx-fp32; this core has no dot-product",
    ]


def test_energy_of_a_right_answer_needs_the_parity_report_of_the_same_bundle():
    bench = report("d", "t", 1.0, [], "int8")
    parity = parity_report(accuracy=accuracy(0.6))
    assert rows([bench], [parity])[0].energy_mj_per_correct == 5.0
    assert rows([bench], [parity_report(bundle="old")])[0].energy_mj_per_correct is None
    assert rows([bench], [None])[0].accuracy is None
