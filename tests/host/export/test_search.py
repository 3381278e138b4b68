"""The search keeps the answers, or refuses; smoothing and bias correction do what their equations
say.
"""

import dataclasses
import importlib

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from edgeclip.device import target
from edgeclip.device.compared import short_of_agreement
from edgeclip.device.metrics import cosine
from edgeclip.device.target import Calibration, Tolerance
from edgeclip.errors import EdgeclipError, Refused
from edgeclip.host.export import EXPORTERS, speed, trials
from edgeclip.host.export.calibration import CalibrationImages
from edgeclip.host.export.search import search
from edgeclip.host.export.speed import measured_here
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.qdq import quantize
from edgeclip.host.graph.smooth import smooth
from edgeclip.host.towers.fold import fold
from tests.support.command import run as cli
from tests.support.toy_bundle import toy_input

S = importlib.import_module("edgeclip.host.export.search")
"""the module: the package has a function of that name"""


def run(model, x):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {model.graph.input[0].name: x}
    )[0]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Tests that run beside these are other work, which is not what is tried."""
    monkeypatch.setattr(speed.OtherWork, "processors", lambda self: 0.0)


@pytest.fixture(scope="module")
def images():
    return np.stack([toy_input(i) for i in range(64)])


@pytest.fixture(scope="module")
def vit():
    """A small vision transformer whose features differ between images."""
    import timm
    from torch.nn import functional as F

    torch.manual_seed(1)
    tower = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=24
    )

    class Unit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = tower

        def forward(self, pixels):
            return F.normalize(self.tower(pixels), dim=-1)

    with torch.no_grad():
        for name, p in tower.named_parameters():
            p.add_(0.05 * torch.randn_like(p))  # the exporter would merge equal constants
            if name.endswith("weight") and p.ndim == 2:
                p.mul_(4)
    return Unit().eval()


def to_graph(module, opset=19):
    x = torch.zeros(1, 3, 32, 32)
    return graph.to_onnx(fold(module, x), x, "pixels", "image_features", opset)


def plant(model, layers, by, channels=3):
    """Outlier channels by rescaling that leaves the function as it is: a LayerNorm's channels grow,
    the next weights shrink.

    layers: which LayerNorms, counted from the input.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    values, stored = graph.initializers(model), {i.name: i for i in model.graph.initializer}
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    for i, norm in enumerate(norms[k] for k in layers):
        scale = np.ones(len(values[norm.input[1]]), np.float32)
        scale[np.random.default_rng(i).permutation(len(scale))[:channels]] = by
        (product,) = [n for n in model.graph.node if norm.output[0] in n.input]
        for name in norm.input[1:]:
            stored[name].CopyFrom(numpy_helper.from_array(values[name] * scale, name))
        stored[product.input[1]].CopyFrom(
            numpy_helper.from_array(values[product.input[1]] / scale[:, None], product.input[1])
        )
    return model


@pytest.fixture(scope="module")
def plain(vit):
    return to_graph(vit)


@pytest.fixture(scope="module")
def hard(plain):
    return plant(plain, range(6), by=300.0)


def test_planted_outliers_leave_the_function_as_it_was(plain, hard, images):
    np.testing.assert_allclose(run(hard, images), run(plain, images), atol=2e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_leaves_the_function_as_it_was(hard, images, alpha):
    smoothed = smooth(hard, images, alpha)
    np.testing.assert_allclose(run(smoothed, images), run(hard, images), atol=2e-5)
    assert [n.name for n in smoothed.graph.node] == [n.name for n in hard.graph.node]


def test_smoothing_at_alpha_one_makes_all_channels_of_a_norm_equally_large(hard, images):
    smoothed = smooth(hard, images, 1.0)
    norms = [n.output[0] for n in smoothed.graph.node if n.op_type == "LayerNormalization"]
    smoothed.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in norms[:-1]
    )
    session = ort.InferenceSession(smoothed.SerializeToString(), providers=["CPUExecutionProvider"])
    for value in session.run(norms[:-1], {"pixels": images}):
        largest = np.abs(value).reshape(-1, value.shape[-1]).max(axis=0)
        np.testing.assert_allclose(largest, largest[0], rtol=1e-3)


def test_a_convolutional_tower_has_nothing_to_smooth(student, images):
    model = to_graph(student)
    assert smooth(model, images, 0.5) is None and smooth(model, images, None) is model


def asked(name="onnx-int8", p1=0.95, **fields):
    loaded = target.load(name)[1]
    spec = {
        "images": 32,
        "judged_on": 32,
        "methods": ("minmax",),
        "smoothing": (None,),
        "probe_layers": 0,
        "min_speedup": 0,
    }
    return msgspec.structs.replace(
        loaded,
        calibration=Calibration(**{**spec, **fields}),
        tolerance=Tolerance(centered_cosine_p1=p1, top1_agreement=0.0, accuracy_drop_pp=1),
    )


def look(model, images, wanted):
    return search(
        model,
        CalibrationImages(images[:32], images[32:], [], np.full(32, -1)),
        wanted,
        importlib.import_module(EXPORTERS[wanted.runtime]),
        None,
    )


def test_right_answers_are_kept_where_labels_tell_which_they_are(plain, images):
    """Labels made of the float answers: all right, none known, and none right."""
    wanted = asked()
    classes = np.random.default_rng(0).normal(size=(40, 24)).astype(np.float32)
    answers = lambda features: (features @ classes.T).argmax(axis=1)  # noqa: E731
    own = answers(run(plain, images[32:]))
    seen = {}
    for name, labels in (("right", own), ("unknown", np.full(32, -1)), ("wrong", own + 1)):
        record = search(
            plain,
            CalibrationImages(images[:32], images[32:], [], labels),
            wanted,
            importlib.import_module(EXPORTERS["onnxruntime"]),
            answers,
        )[1]
        seen[name] = record.frontier[0]
    assert seen["right"].agreement_where_right == seen["right"].top1_agreement
    assert (
        seen["unknown"].agreement_where_right is None
        and seen["wrong"].agreement_where_right is None
    )
    flawed = answers(
        run(plain, images[32:]) + 0.05 * np.random.default_rng(1).normal(size=(32, 24))
    )
    assert 0 < (kept := float((flawed == own).mean())) < 1
    limits = Tolerance(
        centered_cosine_p1=0, top1_agreement=0, agreement_where_right=0.98, accuracy_drop_pp=1
    )
    assert short_of_agreement(limits, kept, kept) == [
        f"top-1 agreement where the student is right {kept:.4f}, below 0.98"
    ]
    assert short_of_agreement(limits, kept, None) == []
    assert len(short_of_agreement(limits, float("nan"), float("nan"))) == 2


def test_where_the_first_form_holds_nothing_is_given_back(plain, images):
    found, record = look(plain, images, asked())
    assert found.float_layers == {}
    assert found.int8_share == 1.0
    assert [r.verdict for r in record.frontier] == ["chosen"]


@pytest.mark.parametrize("name", ["onnx-int8", "onnx-int8-arm", "tensorrt-int8"])
def test_a_hard_tower_fails_the_default_and_smoothing_repairs_it(hard, images, name):
    found, record = look(hard, images, asked(name, smoothing=(None, 0.5)))
    failed, held = record.frontier
    assert failed.smoothing is None and "centered cosine p1" in failed.verdict
    assert held.verdict == "chosen"
    assert found.candidate.smoothing == 0.5
    assert found.int8_share == 1.0
    assert held.centered_cosine_p1 > 0.95 > failed.centered_cosine_p1


def test_without_smoothing_the_worst_layers_go_back_to_float_and_no_more(plain, images):
    model = plant(plain, (2, 3), by=1000.0)
    found, record = look(model, images, asked(min_int8_share=0.3))
    products = graph.matrix_products(found.calibrated.model)
    planted = [n for n in products if "blocks.1/" in n and ("qkv" in n or "fc1" in n)]
    assert len(planted) == 2
    assert set(planted) <= set(found.float_layers)
    assert len(found.float_layers) <= 4
    shipped = quantize(
        found.calibrated, found.nodes, activations="uint8", reduce_range=found.reduce_range
    )
    assert cosine(run(shipped, images), run(plain, images)).centered_p1 > 0.9
    verdicts = [r.verdict for r in record.frontier]
    assert verdicts.count("chosen") == 1
    assert "below 0.95" in verdicts[0]
    assert 0.3 <= found.int8_share < 1.0


def test_the_search_may_ask_more_of_the_judged_images_than_the_tolerance_does(plain, images):
    (loose,) = look(plain, images, asked(p1=0.0))[1].frontier
    least = (loose.centered_cosine_p1 + 1) / 2
    strict = look(plain, images, asked(p1=0.0, judged_cosine_p1=least, min_int8_share=0))[
        1
    ].frontier
    chosen = next(r for r in strict if r.verdict == "chosen")
    assert (
        loose.verdict == "chosen" and chosen.centered_cosine_p1 >= least > loose.centered_cosine_p1
    )
    assert f"below {least}" in strict[0].verdict and chosen.float_layers > 0


def test_what_cannot_be_repaired_is_refused_with_its_reason(hard, images):
    with pytest.raises(
        Refused,
        match=r"int8 does not hold: with the \d+ worst layers in float \(int8 share 0\.[78]\d+\) centered cosine p1 0\.\d+, below 0\.95",
    ):
        look(hard, images, asked())


def test_a_target_none_of_whose_forms_is_one_of_the_student_is_a_clear_error(plain, images):
    with pytest.raises(
        EdgeclipError,
        match="calibration: no quantization candidate of this target applies to this model",
    ):
        look(plain, images, asked(layers=("dense",)))


def test_int8_that_is_no_faster_is_refused_with_both_times(plain, images):
    if not measured_here(asked()):
        pytest.skip("the machine is no x86: onnx-int8 is not timed on it")
    with pytest.raises(
        Refused,
        match=r"int8 is \d+\.\d\d times as fast as float32 here \(\d+\.\d\d to \d+\.\d\d; .* ms\), below 1000",
    ):
        look(plain, images, asked(min_speedup=1000))


def timed(monkeypatch, *ratios, noise=0.0):
    """Searches that read these times in place of a clock: float32's and each candidate's, in
    milliseconds.
    """
    rng = np.random.default_rng(0)
    laps = np.array([1.0, *ratios]) * np.exp(
        noise * rng.normal(size=(speed.ROUNDS, 1 + len(ratios)))
    )
    monkeypatch.setattr(S, "_time", lambda task, candidates: laps)


TWO = {"p1": 0.0, "smoothing": (None, 0.5)}


def chosen(plain, images, **fields):
    found, record = look(plain, images, asked(**TWO, **fields))
    return found.candidate.smoothing, {r.smoothing: r for r in record.frontier}


def test_the_more_exact_form_is_chosen_unless_it_is_resolved_as_slower(plain, images, monkeypatch):
    timed(monkeypatch, 0.5, 0.5)
    exact, rows = chosen(plain, images)
    other = next(k for k in rows if k != exact)
    assert (
        rows[exact].centered_cosine_p1 > rows[other].centered_cosine_p1
        and rows[other].verdict == "less exact"
    )

    def among(exact_ms, noise):
        timed(
            monkeypatch, *(exact_ms if form == exact else 0.5 for form in (None, 0.5)), noise=noise
        )
        return chosen(plain, images)

    assert among(0.52, noise=0.0)[0] == exact  # 4 % is the same speed
    slow = among(0.6, noise=0.01)  # 20 %, and times that say so
    assert slow[0] == other and slow[1][exact].verdict == "slower"
    assert among(0.54, noise=0.3)[0] == exact  # 8 %, and times that cannot tell


def test_the_most_exact_form_is_tried_once_more_with_its_rounding_learned(vit, images):
    model = to_graph(vit, opset=18)
    many = np.concatenate([images, images[:, ::-1].copy()])
    for wanted in (asked(p1=0.0, images=64, reconstruction=20), asked(p1=0.0, reconstruction=0)):
        ranges = many[: wanted.calibration.images]
        drawn = CalibrationImages(ranges, many[96:], [], np.full(32, -1))
        exporter = importlib.import_module(EXPORTERS["onnxruntime"])
        found, record = search(model, drawn, wanted, exporter, None)
        roundings = [r.rounding for r in record.frontier]
        assert record.not_reconstructed is None
        if not wanted.calibration.reconstruction:
            assert roundings == ["nearest"]
            continue
        assert roundings == ["nearest", "learned"]
        near, learned = (r.centered_cosine_mean for r in record.frontier)
        assert learned > near
        assert found.candidate.rounding == record.rounding == "learned"


def test_with_too_few_images_biases_are_corrected_and_that_is_recorded(plain, images, capsys):
    found, record = look(plain, images, asked(p1=0.0, reconstruction=20))
    assert record.not_reconstructed == "32 calibration images, 64 are needed"
    assert "rounding is not learned, biases are corrected instead" in capsys.readouterr().err
    assert found.candidate.rounding == "nearest"


def test_equal_forms_are_decided_by_the_targets_order(plain, images, monkeypatch):
    monkeypatch.setattr(trials, "cosine", lambda features, reference: cosine(reference, reference))
    for ratios in ((0.5, 0.49), (0.49, 0.5)):
        timed(monkeypatch, *ratios)
        _, record = look(plain, images, asked(p1=0.0, methods=("minmax", "mean")))
        assert [r.verdict for r in record.frontier] == ["chosen", "less exact"]


def test_a_speed_is_refused_only_where_its_interval_excludes_the_limit(plain, images, monkeypatch):
    timed(monkeypatch, 1.02, noise=0.2)
    row = look(plain, images, asked(p1=0.0, min_speedup=1.0))[1].frontier[0].times_as_fast
    assert row.low < row.median < 1.0 < row.high
    timed(monkeypatch, 1.02, noise=0.001)
    with pytest.raises(
        Refused,
        match=r"int8 is 0\.98 times as fast as float32 here \(0\.98 to 0\.98; 1\.02 ms\), below 1",
    ):
        look(plain, images, asked(p1=0.0, min_speedup=1.0))


def test_every_run_is_timed_in_every_round_and_none_always_follows_the_same(images):
    calls = []
    laps = speed.interleaved([lambda x, i=i: calls.append(i) for i in range(3)], images[:1])
    turns = calls[:: 1 + speed.QUERIES]  # one that warms up, and those that are timed
    assert laps.shape == (speed.ROUNDS, 3) and (laps >= 0).all()
    assert turns[:9] == [0, 1, 2, 1, 2, 0, 2, 0, 1] and len(turns) == 3 * speed.ROUNDS


def test_times_under_load_are_repeated_and_then_unknown(plain, images, monkeypatch):
    busy = iter([1.2, 1.2, 0.1])
    monkeypatch.setattr(speed.OtherWork, "processors", lambda self: next(busy))
    runs = [lambda x: x, lambda x: x]
    assert speed.quiet(runs, images[:1]).shape == (speed.ROUNDS, 2)  # the third attempt was quiet
    monkeypatch.setattr(speed.OtherWork, "processors", lambda self: 1.2)
    assert speed.quiet(runs, images[:1]) is None
    # Then the more exact form is taken, whichever is quicker, and no figure is given.
    _, record = look(plain, images, asked(p1=0.0, min_speedup=1000, methods=("minmax", "mean")))
    closest = max(record.frontier, key=lambda row: row.centered_cosine_p1)
    assert closest.verdict == "chosen"
    assert record.latency_ms_float is None
    assert all(row.latency_ms is None for row in record.frontier)


def test_speed_is_measured_only_where_the_machine_is_of_the_targets_kind(monkeypatch):
    from edgeclip.device import machine

    targets = ("onnx-int8", "onnx-int8-arm", "openvino-int8", "tensorrt-int8")
    here = machine.facts()
    for arch, expected in (
        ("x86_64", [True, False, True, False]),
        ("aarch64", [False, True, False, False]),
    ):
        facts = dataclasses.replace(here, arch=arch)
        monkeypatch.setattr(machine, "facts", lambda facts=facts: facts)
        assert [measured_here(target.load(t)[1]) for t in targets] == expected


def test_a_refusal_writes_nothing_and_exits_3(source, tmp_path, monkeypatch):
    from edgeclip.cli import exporting as S

    monkeypatch.setattr(S, "from_run", lambda folder: source)
    limits = "tolerance: {centered_cosine_p1: 1.0, top1_agreement: 0.9, accuracy_drop_pp: 1}"
    spec = "calibration: {images: 16, judged_on: 16, methods: [minmax], smoothing: [null]}"
    (tmp_path / "strict.yaml").write_text(
        f"runtime: onnxruntime\nprecision: int8\nactivations: uint8\nreduce_range: never\n{spec}\n{limits}\n"
    )
    (tmp_path / "run").mkdir()
    result = cli("export", "--run", tmp_path / "run", "--target", tmp_path / "strict.yaml")
    assert result.exit_code == 3 and result.stdout == "", result.output
    assert (
        result.stderr.splitlines()[-1].startswith("Refused: onnxruntime: int8 does not hold: ")
        and "below 1.0; take a float16" in result.stderr
    )
    assert not list((tmp_path / "run").rglob("*"))
