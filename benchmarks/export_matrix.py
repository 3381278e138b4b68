"""Every family at full size through onnx-int8 and tensorrt-int8: sizes, times, and whether
TensorRT-RTX builds it.

Random weights: what is shown is that the graph exports, that its float form equals torch, that int8
runs in ONNX Runtime and that TensorRT-RTX parses and builds both towers; accuracy is for trained
students. Forms are the policy's own, without the search (8 calibration images, minmax, every
candidate layer), so that a family costs a minute or two.

    results/targets.jsonl  a line a family, appended when it is done; a family that is there is not run again
    docs/targets.md        the table, by benchmarks/figures.py

The short forms leave that file alone.

Required: the float form within 1e-5 of torch; every tower that TensorRT-RTX was asked to build,
built.

What bounds it: tracing and building; the latencies are single, on a machine that may be shared, and
only their ratio within a row means something.

    python benchmarks/export_matrix.py                    # all that are missing
    python benchmarks/export_matrix.py --families RN50    # one
"""

import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import compare
import numpy as np

LOG = Path(__file__).parent.parent / "results" / "targets.jsonl"
ROUNDS = {"whole": 25, "quick": 25, "smoke": 2}
SHOWN = (
    "image_size",
    "float_error",
    "int8_layers",
    "float_ms",
    "onnx-int8_ms",
    "tensorrt_mib",
    "tensorrt_builds",
)


def tiny(image: dict[str, Any], text: dict[str, Any], embed_dim: int = 512) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 224, "head_width": 64, **image},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **text},
    }


FAMILIES: dict[str, Any] = {
    "MobileCLIP2-S0": "MobileCLIP2-S0",
    "MobileCLIP2-S2": "MobileCLIP2-S2",
    "MobileCLIP-S1": "MobileCLIP-S1",
    "ViT-B-32": "ViT-B-32",
    "ViT-B-16": "ViT-B-16",
    "ViT-S-32-alt": "ViT-S-32-alt",
    "TinyCLIP 8M/3M": tiny(
        {"layers": 10, "width": 256, "patch_size": 16}, {"width": 256, "heads": 4, "layers": 3}
    ),
    "TinyCLIP 39M/19M": tiny(
        {"layers": 12, "width": 512, "patch_size": 16}, {"width": 512, "heads": 8, "layers": 6}
    ),
    "RN50": "RN50",
    "ViTamin-S": "ViTamin-S",
    "PE-Core-T-16": "PE-Core-T-16-384",
    "SigLIP ViT-B-16": "ViT-B-16-SigLIP",
    "timm vit_tiny": "vit_tiny_patch16_224",
    "timm repvit_m0_9": "repvit_m0_9",
    "timm mobilenetv4_conv_small": "mobilenetv4_conv_small",
    "timm efficientnet_lite0": "efficientnet_lite0",
}
TINY = {
    "tiny": tiny(
        {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
        32,
    )
}
CHOSEN = {
    "whole": tuple(FAMILIES),
    "quick": ("ViT-S-32-alt", "timm mobilenetv4_conv_small", "timm efficientnet_lite0"),
    "smoke": tuple(TINY),
}


def towers(model: Any) -> tuple[Any, Any, int, int]:
    """(image module, text module or None, image size, context length)"""
    import open_clip

    from edgeclip.host.export.source import from_model
    from edgeclip.host.recipe import OpenClip
    from edgeclip.host.teachers.open_clip import TextModule
    from edgeclip.host.towers import weights

    if isinstance(model, str) and model not in open_clip.list_models():
        found = from_model(model, "random", [], None)
        return found.image_encoder, None, found.preprocess.size, 0
    spec = OpenClip(
        model="own" if isinstance(model, dict) else model,
        weights="random",
        config=model if isinstance(model, dict) else None,
    )
    clip, preprocess = weights.open_clip_model(spec)
    from torch import nn
    from torch.nn import functional as F

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = clip.visual

        def forward(self, pixels: Any) -> Any:
            return F.normalize(self.visual(pixels), dim=-1)

    return Unit().eval(), TextModule(clip).eval(), preprocess.size, int(clip.context_length)


def latencies_ms(paths: list[Path], x: np.ndarray, rounds: int) -> list[float]:
    """Medians over rounds in which each graph runs once, so that other work on the machine meets
    them alike.
    """
    from edgeclip.device.runtime import open_session

    runs = [open_session("onnxruntime", path, 1).run for path in paths]
    laps: list[list[float]] = []
    for _ in range(rounds + 3):
        laps.append([])
        for run in runs:
            before = time.perf_counter()
            run(x)
            laps[-1].append(1e3 * (time.perf_counter() - before))
    return [round(v, 2) for v in np.median(laps[3:], axis=0).tolist()]


def measure(name: str, rounds: int) -> dict[str, Any]:
    import torch

    from edgeclip.device import target
    from edgeclip.device.metrics import cosine
    from edgeclip.host.export.lint import lint
    from edgeclip.host.export.onnxruntime import write_text
    from edgeclip.host.graph import trace as graph
    from edgeclip.host.graph.float16 import to_fp16
    from edgeclip.host.graph.qdq import calibrate, quantize
    from edgeclip.host.towers.fold import fold

    image, text, size, context = towers((FAMILIES | TINY)[name])
    x = np.random.default_rng(0).normal(size=(8, 3, size, size)).astype(np.float32)
    example = torch.from_numpy(x[:1])
    model = graph.to_onnx(fold(image, example), example, "pixels", "image_features", 19)
    with torch.inference_mode():
        expected = image(torch.from_numpy(x[:3])).numpy()
    row: dict[str, Any] = {"family": name, "image_size": size, "nodes": len(model.graph.node)}
    tensorrt = target.load("tensorrt-int8")[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = {
            n: folder / f"{n}.onnx"
            for n in ("float", "onnx-int8", "tensorrt-int8", "text", "text-tensorrt")
        }
        graph.save(model, paths["float"])
        from edgeclip.device.runtime import open_session

        run = open_session("onnxruntime", paths["float"], 1).run
        row["float_error"] = max(float(np.abs(run(x[:b]) - expected[:b]).max()) for b in (1, 3))
        calibrated = calibrate(model, x, "minmax")
        products = graph.matrix_products(calibrated.model)
        graph.save(quantize(calibrated, products, activations="uint8"), paths["onnx-int8"])
        graph.save(
            to_fp16(quantize(calibrated, products, activations="int8", for_tensorrt=True)),
            paths["tensorrt-int8"],
        )
        row["int8_layers"] = len(products)
        row["int8_cosine"] = cosine(
            open_session("onnxruntime", paths["onnx-int8"], 1).run(x[:3]), expected
        ).raw_min
        for n, ms in zip(
            ("float", "onnx-int8"),
            latencies_ms([paths["float"], paths["onnx-int8"]], x[:1], rounds),
            strict=True,
        ):
            row[f"{n}_ms"], row[f"{n}_mib"] = ms, round(paths[n].stat().st_size / 2**20, 1)
        before = time.perf_counter()
        verdict = lint(paths["tensorrt-int8"], tensorrt)
        row |= {
            "tensorrt_builds": verdict.builds,
            "tensorrt_s": round(time.perf_counter() - before, 1),
            "checked_by": verdict.checked_by,
            "errors": verdict.errors[:2],
        }
        row["tensorrt_mib"] = round(paths["tensorrt-int8"].stat().st_size / 2**20, 1)
        if text is not None:
            ids = torch.ones(2, context, dtype=torch.long)
            traced = graph.to_onnx(text, ids, "input_ids", "text_features", 19)
            shipped = folder / write_text(traced, target.load("onnx-int8")[1], folder)
            row["text_mib"] = round(shipped.stat().st_size / 2**20, 1)
            graph.save(to_fp16(traced), paths["text-tensorrt"])
            row["text_tensorrt_builds"] = lint(paths["text-tensorrt"], tensorrt).builds
    return row


def rows_of(log: Path) -> list[dict[str, Any]]:
    """Return the lines of `log`, a family each; none where there is no such file."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def append(row: dict[str, Any], log: Path) -> None:
    """Add a line to `log`, and see it on the disk."""
    with log.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the required figures of the families; a build that was not checked is none."""
    required = []
    for row in rows:
        name = row["family"]
        required.append(compare.exact(f"{name}: float error", row["float_error"], at_most=1e-5))
        builds = [
            row[key]
            for key in ("tensorrt_builds", "text_tensorrt_builds")
            if row.get(key) is not None
        ]
        if builds:
            required.append(
                compare.exact(
                    f"{name}: of its towers TensorRT builds", sum(builds) / len(builds), at_least=1
                )
            )
    return required


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), help="only these")
    options = parser.parse_args()
    here = common.this_machine()
    with contextlib.ExitStack() as stack:
        log = LOG
        if options.form != common.WHOLE:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "targets.jsonl"
        done = {row["family"] for row in rows_of(log)}
        for name in options.families or CHOSEN[options.form]:
            if name not in done:
                append(measure(name, ROUNDS[options.form]), log)
        rows = rows_of(log)
    cells = [[row["family"], *(row[key] for key in SHOWN)] for row in rows]
    common.table(cells, ["family", *SHOWN])
    common.finish({"benchmark": "export_matrix", "families": rows}, judged(rows), here, options)


if __name__ == "__main__":
    main()
