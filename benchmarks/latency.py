"""Latency of one query, batch 1 and one thread: the exported bundles beside the torch student they
came from.

Each engine is a persistent process of its own that loads, warms up, and on request times QUERIES
single queries of the same image and answers with their median. The engines take turns, and a ratio
is formed within a round.

    torch fp32                 the student as it was trained: eager, not folded
    torch fp32, channels_last  the same in the memory layout that suits torch's convolutions: shown, not required
    onnx-fp32                  what folding and ONNX Runtime bring without quantization: shown, not required
    onnx-int8, openvino-int8   what ships

Only the image encoder is timed: normalized pixels in, features out. Each engine's features are
compared with torch's first, since a fast wrong model is none; accuracy itself is `edgeclip
validate`'s business.

What bounds it: with VNNI the int8 convolutions; depthwise ones and small feature maps are bound by
memory and by the cost of a call, so the ratio stays well below the fourfold of the arithmetic.

Required: onnx-int8 and openvino-int8 at least 1.3 times as fast as torch fp32; their image encoders
at most 0.3 of onnx-fp32's bytes.

    python benchmarks/latency.py --run runs/quickstart --check
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import compare

from edgeclip.errors import EdgeclipError

TORCH, CHANNELS_LAST = "torch fp32", "torch fp32, channels_last"
BUNDLES = ("onnx-fp32", "onnx-int8", "openvino-int8")
SMOKE_BUNDLES = BUNDLES[:2]
WARM_UP = 30
ROUNDS = {"whole": 2 * compare.MIN_PAIRS, "quick": compare.MIN_PAIRS, "smoke": 2}
QUERIES = {"whole": 20, "quick": 5, "smoke": 2}


def torch_student(run: Path, channels_last: bool) -> tuple[Callable[[], Any], str]:
    """(a function that answers one query, version)"""
    import torch

    from edgeclip.device.preprocess import normalize
    from edgeclip.host import student as students

    torch.set_num_threads(1)
    student, _, preprocess, _ = students.load(run / "student")
    x = torch.from_numpy(normalize(image(run), preprocess))
    if channels_last:
        student, x = (
            student.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )

    def query() -> Any:
        with torch.inference_mode():
            return student(x).numpy()

    return query, f"torch {torch.__version__}"


def bundled(run: Path, name: str) -> tuple[Callable[[], Any], str]:
    from edgeclip.device.bundle import Bundle
    from edgeclip.device.preprocess import normalize

    bundle = Bundle.load(run / "bundles" / name, threads=1)
    x, session = normalize(image(run), bundle.preprocess), bundle.image_encoder
    return lambda: session.run(x), f"{session.facts.runtime} {session.facts.version}"


def image(run: Path) -> Any:
    """uint8 [1, H, W, 3]: one and the same for every engine."""
    import numpy as np

    return np.load(run / "bundles" / BUNDLES[0] / "golden" / "pixels.npy")[:1]


def work(engine: str, run: Path) -> None:
    """A worker process: `{"queries": n}` is answered with the median of n queries in
    milliseconds.
    """
    query, version = (
        torch_student(run, engine == CHANNELS_LAST)
        if engine.startswith("torch")
        else bundled(run, engine)
    )
    for _ in range(WARM_UP):
        query()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "queries" not in request:
            return {"version": version, "features": query()[0].tolist()}
        query()  # caches that the other engines have emptied since the last round
        laps = []
        for _ in range(request["queries"]):
            before = time.perf_counter()
            query()
            laps.append(time.perf_counter() - before)
        return {"ms": 1e3 * sorted(laps)[len(laps) // 2]}

    compare.serve(answer)


def encoder_bytes(run: Path, bundles: tuple[str, ...]) -> dict[str, int]:
    """Of each bundle's image encoder. Stops where a bundle is missing or was made from another
    student.
    """
    from edgeclip import disk
    from edgeclip.device.manifest import read_manifest

    disk.read_manifest(run, "run")
    student = disk.sha256(run / "student" / disk.MANIFEST)
    found = {}
    for name in bundles:
        manifest = read_manifest(run / "bundles" / name)
        if manifest.parents.get("student") != student:
            sys.exit(
                f"{run / 'bundles' / name}: is not of this run's student; edgeclip export --run {run} --target {name}"
            )
        found[name] = manifest.image_encoder_bytes
    return found


def measure(run: Path, options: Any) -> None:
    here = common.this_machine()
    bundles = BUNDLES
    if options.form == common.SMOKE:
        bundles = SMOKE_BUNDLES
    sizes = encoder_bytes(run, bundles)
    rounds, queries = ROUNDS[options.form], QUERIES[options.form]
    engines = (TORCH, CHANNELS_LAST, *bundles)
    with compare.workers(
        {e: [sys.executable, __file__, "--worker", e, "--run", str(run)] for e in engines}
    ) as ask:
        facts = {e: ask[e]() for e in engines}

        def median_ms(engine: str) -> Callable[[], float]:
            return lambda: float(ask[engine](queries=queries)["ms"])

        results = compare.interleave({e: median_ms(e) for e in engines}, rounds)
    rows, figures = [], {}
    for e in engines:
        ms, faster = (
            compare.interval(compare.column(results, e)),
            compare.interval(compare.ratios(results, TORCH, e)),
        )
        # Unit rows: their product is the cosine.
        cosine = sum(
            a * b for a, b in zip(facts[e]["features"], facts[TORCH]["features"], strict=True)
        )
        size = sizes.get(e)
        figures[e] = {
            "latency_ms": ms._asdict(), "times_as_fast_as_torch": faster._asdict(), "cosine": cosine, "image_encoder_bytes": size,
            "times_as_fast_as_channels_last": compare.interval(compare.ratios(results, CHANNELS_LAST, e))._asdict(), "version": facts[e]["version"],
        }  # fmt: skip
        rows.append(
            [
                e,
                facts[e]["version"],
                str(ms),
                str(faster),
                f"{cosine:.4f}",
                None if size is None else f"{size:,}",
                None if size is None else f"{size / sizes['onnx-fp32']:.3f}",
            ]
        )
    common.table(
        rows,
        [
            "engine",
            "version",
            "ms (95 %)",
            "times as fast as torch",
            "cosine",
            "encoder bytes",
            "of onnx-fp32's",
        ],
    )
    print(
        f"batch 1, one thread, {rounds} rounds of {queries} queries an engine after {WARM_UP} for warm-up; run {run.resolve()}\n"
    )
    required = [
        compare.judge(
            f"{e}: times as fast as {TORCH}", compare.ratios(results, TORCH, e), at_least=1.3
        )
        for e in bundles[1:]
    ]
    required += [
        compare.exact(
            f"{e}: of onnx-fp32's image encoder bytes", sizes[e] / sizes["onnx-fp32"], at_most=0.3
        )
        for e in bundles[1:]
    ]
    common.finish(
        {"benchmark": "latency", "run": run.name, "engines": figures},
        required,
        here,
        options,
    )


def main() -> None:
    parser = common.arguments(__doc__)
    common.run_argument(parser)
    parser.add_argument("--worker", metavar="ENGINE", help="internal: be one engine's process")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.run)
    else:
        try:
            with common.measured_run(options, SMOKE_BUNDLES) as run:
                measure(run, options)
        except EdgeclipError as e:
            sys.exit(f"Error: {e}")


if __name__ == "__main__":
    main()
