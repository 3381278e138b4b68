"""The waterfall of a run: do its steps sum to the whole way, and is each planted fault named by its
step?

    resize filter        the int8 bundle resizes bilinearly where training did bicubically      preprocess
    swapped channels     the device hands over blue, green, red                                 preprocess
    corrupted weight     one weight in 20 of a layer of the float graph is another one's         export
    residual additions   the image encoder with its sums rounded as well, by ONNX Runtime's own  int8
                         quantizer from eight images
    lost mask            the text encoder attends to padding as to words                         typed words

Required of each run: what the steps of every bundle lost less what they won is what the whole way
did; every fault changes its own step and no earlier one, and the sentence names that step: as what
lost most, or where these images cannot tell that anything was lost, as what moved the features
most.

    python benchmarks/waterfall.py --run runs/clothing --run runs/grocery --check \\
        --json results/waterfall.json

Bundles onnx-fp32 and onnx-int8 must be exported.
"""

import argparse
import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import compare
import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import nn

from edgeclip import disk
from edgeclip.boards.judging import Judge
from edgeclip.device import machine, profile, target
from edgeclip.device import validate as V
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import Evaluation, load_evaluation
from edgeclip.device.records import Waterfall
from edgeclip.host.export import calibration, export
from edgeclip.host.export.source import from_run

FLOAT, INT8 = "onnx-fp32", "onnx-int8"
PAD, WORD = 0, 1012
"""token ids of MiniLM: padding, and a word"""


def steps(run: Path, name: str, observe: Callable[..., V.Observed] = V.observe) -> Waterfall:
    """Return the waterfall of a bundle of a run on this machine."""
    evaluation = load_evaluation(run / "evaluation")
    bundle = Bundle.load(run / "bundles" / name)
    judge = Judge(run, profile.load("host-cpu")[1], evaluation)
    judged = judge.judged(bundle, observe(bundle, evaluation), machine.facts())
    found = judged.report.waterfall
    if found is None:
        sys.exit(f"{run}: was distilled by an older edgeclip; distill it again")
    return found


# --- faults, each planted in a copy


def resize_filter(run: Path) -> tuple[str, Callable[..., V.Observed]]:
    folder = run / "bundles" / INT8
    preprocess = disk.read_json(folder / disk.MANIFEST)["preprocess"]
    rewrite(folder, {"preprocess": preprocess | {"interpolation": "bilinear"}})
    return INT8, V.observe


def swapped_channels(run: Path) -> tuple[str, Callable[..., V.Observed]]:
    own = Bundle.pixels  # a device's decoder has no hook

    def observe(bundle: Bundle, evaluation: Evaluation | None) -> V.Observed:
        Bundle.pixels = lambda self, image: own(self, image)[..., ::-1]  # type: ignore[method-assign]
        try:
            return V.observe(bundle, evaluation)
        finally:
            Bundle.pixels = own  # type: ignore[method-assign]

    return INT8, observe


def corrupted_weight(run: Path) -> tuple[str, Callable[..., V.Observed]]:
    folder = run / "bundles" / FLOAT
    path = folder / "image_encoder.onnx"
    model = onnx.load(path)
    stored = [s for s in model.graph.initializer if numpy_helper.to_array(s).ndim == 4]
    middle = stored[len(stored) // 2]
    value = numpy_helper.to_array(middle).copy()
    rng = np.random.default_rng(0)
    places = rng.choice(value.size, value.size // 20, replace=False)
    value.reshape(-1)[places] = rng.permutation(value.reshape(-1)[places]) * 8
    middle.CopyFrom(numpy_helper.from_array(value, middle.name))
    onnx.save(model, path)
    rewrite(folder, {})
    return FLOAT, V.observe


def residual_additions(run: Path) -> tuple[str, Callable[..., V.Observed]]:
    source = from_run(run)
    spec = target.load(INT8)[1].calibration
    assert spec is not None
    images = calibration.draw(source, spec).ranges[:8]

    class Reader(CalibrationDataReader):
        left = iter([{"pixels": image[None]} for image in images])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    folder = run / "bundles" / INT8
    quantize_static(
        run / "bundles" / FLOAT / "image_encoder.onnx",
        folder / "image_encoder.onnx",
        Reader(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Clip", "Relu"],
    )
    rewrite(folder, {})
    return INT8, V.observe


def lost_mask(run: Path) -> tuple[str, Callable[..., V.Observed]]:
    source = from_run(run)
    assert source.load_text is not None
    text = source.load_text()

    class Unmasked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = text.module

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.own(torch.where(input_ids == PAD, WORD, input_ids))

    broken = dataclasses.replace(text, module=Unmasked().eval())
    folder = run / "bundles" / FLOAT
    shutil.rmtree(folder)
    export(source._replace(load_text=lambda: broken), *target.load(FLOAT), folder)
    return FLOAT, V.observe


FAULTS = {
    "resize filter": (resize_filter, "preprocess"),
    "swapped channels": (swapped_channels, "preprocess"),
    "corrupted weight": (corrupted_weight, "export"),
    "residual additions": (residual_additions, "int8"),
    "lost mask": (lost_mask, "typed words"),
}


def rewrite(bundle: Path, changes: dict[str, Any]) -> None:
    """Write a bundle's manifest anew, as an export that went wrong would have."""
    manifest = disk.read_json(bundle / disk.MANIFEST) | changes
    kept = {k: v for k, v in manifest.items() if k not in ("kind", "files")}
    disk.write_manifest(bundle, "bundle", kept)


@contextlib.contextmanager
def copied(run: Path) -> Iterator[Path]:
    """Yield a copy of a run with the two bundles."""
    with tempfile.TemporaryDirectory(prefix="edgeclip-waterfall-") as folder:
        copy = Path(folder) / run.name
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("bundles", "reports"))
        for name in (FLOAT, INT8):
            shutil.copytree(run / "bundles" / name, copy / "bundles" / name)
        yield copy


def row(run: str, what: str, found: Waterfall, at: str | None) -> dict[str, Any]:
    """Return one waterfall's line; at: the step that a fault was planted in."""
    every = [*found.steps, *([found.typed_words] if found.typed_words else [])]
    summed = sum(s.lost - s.won for s in found.steps)
    return {
        "run": run,
        "fault": what,
        "at": at,
        "images": found.whole.images,
        "start": found.start,
        "start_top1": found.start_top1,
        "steps": {
            s.name: {
                "lost": s.lost, "won": s.won, "drop_pp": s.drop_pp, "low": s.lower_pp,
                "high": s.upper_pp, "cosine": s.centered_cosine_p1,
            }
            for s in every
        },
        "apart": summed - (found.whole.lost - found.whole.won),
        "most": found.most,
    }  # fmt: skip


def measure(runs: list[Path], faults: list[str]) -> list[dict[str, Any]]:
    """Return a line per bundle as it is, and per fault."""
    rows = []
    for run in runs:
        for name in (FLOAT, INT8):
            rows.append(row(run.name, name, steps(run, name), None))
        for fault in faults:
            plant, at = FAULTS[fault]
            with copied(run) as copy:
                rows.append(row(run.name, fault, steps(copy, *plant(copy)), at))
            print(f"{run.name}, {fault}: {rows[-1]['most']}", file=sys.stderr, flush=True)
    return rows


def named(r: dict[str, Any]) -> str:
    """Return the step that a sentence blames for what was lost; empty: none."""
    return r["most"].partition("most was lost by ")[2].partition(":")[0]


def moved(r: dict[str, Any]) -> str:
    """Return the step that moved the features most where these images lost too little to tell."""
    return r["most"].partition("; ")[2].rpartition("; ")[2].partition(" moved the features")[0]


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the required figures."""
    apart = max(abs(r["apart"]) for r in rows)
    required = [
        compare.exact("images that steps and whole way differ by", apart, n=len(rows), at_most=0)
    ]
    for r in rows:
        if r["at"] is None:
            continue
        sound = next(x for x in rows if x["run"] == r["run"] and x["fault"] in (FLOAT, INT8))
        wrong = []
        for name, step in r["steps"].items():
            if name == r["at"]:
                break
            before = sound["steps"].get(name)
            if before and (step["lost"], step["won"]) != (before["lost"], before["won"]):
                wrong.append(name)
        if r["at"] not in (named(r), moved(r)):
            wrong.append(r["at"])
        what = f"{r['run']}, {r['fault']}: steps that are blamed wrongly"
        required.append(compare.exact(what, len(wrong), n=r["images"], at_most=0))
    return required


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--run", action="append", type=common.absolute, help="a run; repeat it")
    options = parser.parse_args()
    here = common.this_machine()
    if options.form == common.SMOKE:
        toy = argparse.Namespace(run=None, form=options.form)
        with common.measured_run(toy, (FLOAT, INT8)) as run:
            rows = measure([run], ["resize filter", "swapped channels", "corrupted weight"])
    elif options.run:
        rows = measure(options.run, list(FAULTS))
    else:
        parser.error("give --run, once or several times")
    headers = ["run", "bundle or fault", "images", "named step", "lost pp there", "sentence"]
    common.table([cells(r) for r in rows], headers)
    common.finish({"benchmark": "waterfall", "rows": rows}, judged(rows), here, options)


def cells(r: dict[str, Any]) -> list[Any]:
    at = r["steps"].get(r["at"]) if r["at"] else None
    lost = f"{at['drop_pp']:.2f} ({at['low']:.2f} to {at['high']:.2f})" if at else None
    return [r["run"], r["fault"], r["images"], r["at"], lost, r["most"]]


if __name__ == "__main__":
    main()
