"""NaN is never an answer, nor is an infinity: no limit holds for it, no metric is better for it, and
a bundle that has one is refused by name.

The limits are found, not listed: one that is added is walked too.
"""

import inspect
import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeclip import config, disk
from edgeclip.device import compared, metrics, per_class, rules
from edgeclip.device.bench_report import BenchReport
from edgeclip.device.bundle import Bundle
from edgeclip.device.finite import fault
from edgeclip.device.intervals import Limits, percentile_limits
from edgeclip.device.profile import Budget, Device
from edgeclip.device.target import Floor, Tolerance
from edgeclip.errors import EdgeclipError
from tests.support.damage import resign
from tests.support.images import toy_image
from tests.support.reports import energy, host_bench, scenario

BROKEN = (math.nan, math.inf, -math.inf)
TOLERANCE = Tolerance(
    centered_cosine_p1=0.5,
    top1_agreement=0.5,
    agreement_where_right=0.5,
    accuracy_drop_pp=20.0,
    worst_set_drop_pp=20.0,
    optimization_agreement=0.5,
)
FLOOR = Floor(top1=0.2, worst_class_top1=0.2)
N = 2000


def limits(*structs):
    """Every (struct, field) that is a limit: a number, or None."""
    return [(s, f.name) for s in structs for f in msgspec.structs.fields(s) if f.name != "kind"]


# --- limits


WALKED = limits(Tolerance, Floor, Budget)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize(("struct", "field"), WALKED)
def test_no_file_sets_a_limit_that_is_not_finite(struct, field, value):
    fields = {}
    if struct is Tolerance:
        fields = msgspec.structs.asdict(TOLERANCE)
    with pytest.raises(EdgeclipError, match=rf"file: {field}.*; give a number that is finite"):
        config.convert(fields | {field: value}, struct, "file")


def asked(tolerance: Tolerance, floor: Floor) -> list[rules.Rule]:
    """Every rule of the gate, of a bundle that answers as the student does."""
    same = np.ones(N, bool)
    labels = np.arange(N) % 2
    scores = np.full(N, 0.9)
    answered = per_class.Answered(np.arange(N), labels, labels, labels, scores, scores)
    parts = [rules.Part("a", True, same, same), rules.Part("b", True, same, same)]
    return [
        rules.closeness(tolerance, scores),
        compared._same(tolerance, same),
        *compared._same_where_right(tolerance, same, same),
        *rules.accuracy(tolerance, parts),
        compared._same_as_optimized(tolerance, same),
        *per_class.floors(floor, answered, ["x", "y"]),
    ]


def test_the_gate_holds_where_all_limits_are_finite():
    assert {rule.answer for rule in asked(TOLERANCE, FLOOR)} == {"holds"}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize(("struct", "field"), limits(Tolerance, Floor))
def test_no_rule_holds_for_a_limit_that_is_not_finite(struct, field, value):
    tolerance, floor = TOLERANCE, FLOOR
    if struct is Tolerance:
        tolerance = msgspec.structs.replace(TOLERANCE, **{field: value})
    else:
        floor = msgspec.structs.replace(FLOOR, **{field: value})
    assert "fails" in {rule.answer for rule in asked(tolerance, floor)}


@pytest.mark.parametrize("value", BROKEN)
def test_no_figure_that_is_not_finite_holds(value):
    for low, high, allowed in itertools.product((0.0, value), (0.0, value), (1.0, value)):
        expected = "holds" if (low, high, allowed) == (0.0, 0.0, 1.0) else "fails"
        assert Limits(low, high).answer(allowed) == expected


def broken(value: Any, by: float) -> Any:
    """A report's JSON, each of its floats replaced."""
    if isinstance(value, dict):
        return {key: broken(item, by) for key, item in value.items()}
    if isinstance(value, list):
        return [broken(item, by) for item in value]
    return by if isinstance(value, float) else value


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("name", [name for _, name in limits(Budget)])
def test_no_budget_holds_for_a_cost_that_is_not_finite(name, value):
    measured = host_bench(
        single_stream=scenario(),
        whole_image={"from_frame": to_latency(), "from_file": to_latency()},
        energy=energy(),
        energy_mj_per_image=3.0,
        bundle_bytes=1 << 20,
        others_busy=0.0,
    )
    fields = msgspec.to_builtins(measured)
    whole = {"reach": {}, "runtimes": ["onnxruntime"]}
    device = msgspec.convert(whole | {"budget": {name: 1e9}}, Device)
    (rule,) = rules.budgets(msgspec.convert(fields, BenchReport), device)
    assert rule.answer == "holds", rule
    kept = {key: fields[key] for key in ("others_busy", "min_duration_s")}
    with pytest.raises(msgspec.ValidationError):  # a report that holds such is refused already
        msgspec.convert(broken(fields, value) | kept, BenchReport)
    endless = msgspec.structs.replace(device, budget=Budget(**{name: value}))
    (rule,) = rules.budgets(msgspec.convert(fields, BenchReport), endless)
    assert rule.answer == "fails"


def to_latency():
    return msgspec.to_builtins(scenario())


# --- metrics


FEATURES = np.random.default_rng(0).normal(size=(12, 5))
LABELS = np.arange(12) % 5


def recall(features):
    found = metrics.recall_both_ways(features, FEATURES, np.arange(12), np.arange(12))
    return [found[way][k] for way in found for k in ("r1", "r5", "r10")]


def closeness(features):
    found = msgspec.structs.asdict(metrics.cosine(features, FEATURES))
    return list(found.values())


METRICS = {
    "hits": lambda x: [metrics.hits(x, x_labels(), k).mean() for k in (1, 2, 5)],
    "agreement": lambda x: [metrics.agreement(x[:, 0], FEATURES[:, 0])],
    "recall_both_ways": recall,
    "cosine": closeness,
    "centered_cosines": lambda x: [metrics.centered_cosines(x, FEATURES).min()],
    "l2_normalize": lambda x: [(metrics.l2_normalize(x) * metrics.l2_normalize(FEATURES)).sum()],
    "median_interval": lambda x: [-end for end in metrics.median_interval(-x[:, 0])],
}
"""how good features are by each metric; the larger the better, and NaN is no answer"""
OF_COUNTS = {"accuracy_drop", "chance_recall"}
"""functions of hits or of counts, which are finite"""
OF_LENGTHS = {"off_unit"}
"""of no answer where a row is not finite: test_a_length_that_is_none"""


def x_labels():
    return FEATURES.argmax(axis=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_length_that_is_none(value):
    rows = metrics.l2_normalize(FEATURES)
    assert metrics.off_unit(rows) < metrics.UNIT
    rows[3, 0] = value
    assert metrics.off_unit(rows) is None


def test_every_metric_is_walked():
    of_arrays = set()
    for name, function in inspect.getmembers(metrics, inspect.isfunction):
        own = function.__module__ == metrics.__name__ and not name.startswith("_")
        if own and "ndarray" in str(inspect.signature(function)):
            of_arrays.add(name)
    assert of_arrays == METRICS.keys() | OF_COUNTS | OF_LENGTHS


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_no_metric_is_better_for_a_row_that_is_not_finite(name, value):
    best = METRICS[name](FEATURES)
    one = FEATURES.copy()
    one[3] = value
    for found, limit in zip(METRICS[name](one), best, strict=True):
        assert not found >= limit
    for found in METRICS[name](np.full_like(FEATURES, value)):
        assert not found > 0 or name == "l2_normalize"


def test_no_percentile_is_taken_over_what_is_not_finite():
    values = np.arange(100.0)
    values[7] = math.nan
    assert all(math.isnan(limit) for limit in percentile_limits(values, 90.0))


def test_images_whose_cosine_is_not_finite_lie_below_every_limit():
    for value in BROKEN:
        cosines = np.full(N, 0.9)
        cosines[: N // 10] = value
        assert rules.closeness(TOLERANCE, cosines).answer == "fails"


# --- arrays


def test_what_is_wrong_with_an_array_is_named_by_its_row():
    rows = np.ones((4, 3))
    assert fault(rows, rows=True) is None
    assert fault(np.zeros((0, 3)), rows=True) is None
    assert fault(np.array(1.0)) is None
    rows[1] = 0
    assert fault(rows) is None
    assert fault(rows, rows=True) == "row 1 of 4 is all zeros, so it has no direction"
    for value in BROKEN:
        rows[2, 1] = value
        assert fault(rows) == "row 2 of 4 is not finite"
        assert fault(np.array(value)) == "row 0 of 1 is not finite"


@pytest.mark.parametrize("value", [*BROKEN, 0.0])
def test_a_bundle_whose_numbers_are_none_is_refused_by_name(own_bundle, value):
    folder = own_bundle("onnx-fp32")
    image = toy_image(1)
    features = np.load(folder / "class_features.npy")
    wrong = features.copy()
    wrong[1] = value
    disk.write_array(folder / "class_features.npy", wrong)
    resign(folder)
    with pytest.raises(EdgeclipError, match=r"class_features.npy: row 1 of \d+ is (not|all)"):
        Bundle.load(folder).classify(image)
    disk.write_array(folder / "class_features.npy", features)
    head = dict(np.load(folder / "head.npz"))
    for name in ("weight", "bias", "alpha", "temperature"):
        if value == 0.0:
            continue
        np.savez(folder / "head.npz", **head | {name: np.full_like(head[name], value)})
        resign(folder)
        with pytest.raises(EdgeclipError, match=rf"head.npz: {name}: .* not finite"):
            Bundle.load(folder).classify(image)
