"""Int8 beside its rivals: latency, bytes, closeness to float32, and accuracy where the student is trained.

One float ONNX graph (folded, dynamic batch) is what every rival starts from, with the same calibration images:

    torch fp32, ORT fp32, OpenVINO fp32     what int8 is measured against
    ORT dynamic                             onnxruntime.quantization.quantize_dynamic, its defaults
    ORT static                              quantize_static, its defaults, after its own pre-processing
    NNCF                                    nncf.quantize, its defaults
    NNCF as optimum-intel                   model_type TRANSFORMER, its SmoothQuant alpha: optimum-intel's settings for CLIP,
                                            called on NNCF itself (optimum-intel adds loading and saving, no other step)
    ModelOpt                                modelopt.onnx.quantization.quantize, int8, its defaults (--modelopt PYTHON)
    edgeclip onnx-int8, openvino-int8       what `edgeclip export` writes, search and all

Each engine is a process of its own that answers single queries (batch 1); they take turns, and ratios are formed within
a round. Closeness is over images that gave no ranges and that no search has seen: first percentile of the centered cosine, share of equal top-1
answers. R@1 of a run is over up to 400 of the test images that it keeps for parity. Random weights (MobileCLIP2-S0, ViT-B-32) serve for speed and bytes alone: their cosines say little.

What bounds it: with VNNI the int8 products; depthwise convolutions and small maps are bound by memory.

Required: no plain rival of the same runtime is both faster and more exact than edgeclip's target; edgeclip's best is the
fastest of all whose centered cosine is no worse than its own by more than 0.005.

    python benchmarks/int8.py --run runs/quickstart --threads 1 --threads 2      # its own training images
    python benchmarks/int8.py --images DIR --model MobileCLIP2-S0 --model ViT-B-32 --threads 1 --threads 2
"""

import argparse
import contextlib
import importlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import compare
import int8_table
import numpy as np
import toy

WARM_UP, QUERIES = 10, 5
SCORED = 400
IMAGES = {"whole": 96, "quick": 32, "smoke": 16}
ROUNDS = {"whole": 2 * compare.MIN_PAIRS, "quick": compare.MIN_PAIRS, "smoke": 2}
SLOW_TO_MAKE = ("NNCF", "NNCF as optimum-intel", "ModelOpt", "edgeclip openvino-int8")
"""what the smoke form does without"""


def prepare(source: Any, images: list[Any], count: int, folder: Path) -> dict[str, np.ndarray]:
    """Writes float.onnx; returns the inputs: {"ranges", "judged" (by the search), "fresh" (for the table)}."""
    import torch

    from edgeclip.device.images import read
    from edgeclip.device.preprocess import normalize, open_image, to_pixels
    from edgeclip.host.graph import trace as graph
    from edgeclip.host.towers.fold import fold

    order = np.random.default_rng(0).permutation(len(images))[: 3 * count]
    x = normalize(
        np.stack([to_pixels(open_image(read(images[i])), source.preprocess) for i in order]),
        source.preprocess,
    )
    example = torch.from_numpy(x[:1])
    graph.save(
        graph.to_onnx(fold(source.image_encoder, example), example, "pixels", "image_features", 18),
        folder / "float.onnx",
    )
    np.save(folder / "ranges.npy", x[:count])
    return {"ranges": x[:count], "judged": x[count : 2 * count], "fresh": x[2 * count :]}


def rivals(folder: Path, ranges: np.ndarray, options: Any) -> dict[str, Path]:
    """Every plain rival's file; what fails is said and left out."""
    import nncf
    import openvino as ov
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(ranges)

        def get_next(self) -> Any:
            row = next(self.rows, None)
            return None if row is None else {"pixels": row[None]}

    def static(out: Path) -> None:
        quant_pre_process(folder / "float.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
        quantize_static(folder / "prepared.onnx", out, Reader())

    def by_nncf(out: Path, **options: Any) -> None:
        model = ov.convert_model(folder / "float.onnx")
        ov.save_model(
            nncf.quantize(model, nncf.Dataset([r[None] for r in ranges]), **options),
            out,
            compress_to_fp16=False,
        )

    def by_modelopt(out: Path) -> None:
        code = (
            "import sys, numpy as np\nfrom modelopt.onnx.quantization import quantize\n"
            "quantize(sys.argv[1], quantize_mode='int8', calibration_data={'pixels': np.load(sys.argv[2])}, calibration_eps=['cpu'], output_path=sys.argv[3])"
        )
        subprocess.run(
            [
                options.modelopt,
                "-c",
                code,
                str(folder / "float.onnx"),
                str(folder / "ranges.npy"),
                str(out),
            ],
            check=True,
            capture_output=True,
        )

    makers = {
        "ORT dynamic": ("dynamic.onnx", lambda out: quantize_dynamic(folder / "float.onnx", out)),
        "ORT static": ("static.onnx", static),
        "NNCF": ("nncf.xml", by_nncf),
        "NNCF as optimum-intel": (
            "optimum.xml",
            lambda out: by_nncf(out, model_type=nncf.ModelType.TRANSFORMER),
        ),
    }
    if options.modelopt:
        makers["ModelOpt"] = ("modelopt.onnx", by_modelopt)
    if options.form == common.SMOKE:
        makers = {name: made for name, made in makers.items() if name not in SLOW_TO_MAKE}
    found = {"ORT fp32": folder / "float.onnx"}
    ov.save_model(
        ov.convert_model(folder / "float.onnx"), folder / "float.xml", compress_to_fp16=False
    )
    found["OpenVINO fp32"] = folder / "float.xml"
    for name, (file, make) in makers.items():
        before = time.perf_counter()
        try:
            make(folder / file)
            found[name] = folder / file
            print(f"{name}: made in {time.perf_counter() - before:.0f} s", file=sys.stderr)
        except Exception as e:
            said = (
                e.stderr.decode().strip()
                if isinstance(e, subprocess.CalledProcessError)
                else str(e)
            )
            print(f"{name}: failed ({type(e).__name__}: {said[-300:]})", file=sys.stderr)
    return found


def ours(
    folder: Path, inputs: dict[str, np.ndarray], answers: Any, trained: bool, form: str
) -> dict[str, Path]:
    """What export's search chooses. trained: False asks no closeness of it, because random weights answer every image almost alike.

    In the smoke form it chooses as for a toy.
    """
    import msgspec
    import onnx

    from edgeclip.device import target as T
    from edgeclip.errors import Refused
    from edgeclip.host.export import EXPORTERS
    from edgeclip.host.export.calibration import CalibrationImages
    from edgeclip.host.export.search import search

    found = {}
    for name, target_name in int8_table.EDGECLIP.items():
        if form == common.SMOKE and name in SLOW_TO_MAKE:
            continue
        target = T.load(target_name)[1]
        assert target.calibration is not None
        target = msgspec.structs.replace(
            target, calibration=msgspec.structs.replace(target.calibration, probe_layers=6)
        )
        if form == common.SMOKE:
            target = toy.small_calibration(target_name)
        elif not trained:
            target = msgspec.structs.replace(
                target, tolerance=msgspec.structs.replace(target.tolerance, centered_cosine_p1=-1.0)
            )
        exporter = importlib.import_module(EXPORTERS[target.runtime])
        model, before = onnx.load(folder / "float.onnx"), time.perf_counter()
        try:
            chosen, record = search(
                model,
                CalibrationImages(
                    inputs["ranges"], inputs["judged"], [], np.full(len(inputs["judged"]), -1)
                ),
                target,
                exporter,
                answers,
            )
        except Refused as e:
            print(f"{name}: refused ({e})", file=sys.stderr)
            continue
        (folder / target_name).mkdir()
        found[name] = (
            folder / target_name / exporter.write(model, target, chosen, folder / target_name)
        )
        print(
            f"{name}: {chosen.candidate}, int8 share {record.int8_share_of_macs}, in {time.perf_counter() - before:.0f} s",
            file=sys.stderr,
        )
    return found


def work(path: Path, threads: int, inputs: Path) -> None:
    """One engine's process. inputs: a folder with fresh.npy and, for a trained student, scored.npy."""
    x = np.load(inputs / "fresh.npy")
    if path.suffix == ".torch":  # a file that says which student; it is loaded as everywhere
        import torch

        torch.set_num_threads(threads)
        module = student(path.read_text()).image_encoder

        def run(rows: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return module(torch.from_numpy(rows)).numpy()
    else:
        from edgeclip.device.runtime import open_session

        run = open_session(
            "openvino" if path.suffix == ".xml" else "onnxruntime", path, threads
        ).run
    for _ in range(WARM_UP):
        run(x[:1])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "features" in request:
            return {
                "features": [
                    run(row[None])[0].tolist()
                    for row in np.load(inputs / f"{request['features']}.npy", mmap_mode="r")
                ]
            }
        run(x[:1])
        laps = []
        for _ in range(request["queries"]):
            before = time.perf_counter()
            run(x[:1])
            laps.append(1e3 * (time.perf_counter() - before))
        return {"ms": sorted(laps)[len(laps) // 2]}

    compare.serve(answer)


def student(name: str) -> Any:
    from edgeclip.host.export.source import from_model, from_run

    return (
        from_run(Path(name))
        if Path(name).is_dir()
        else from_model(name, "random", [], None, text=False)
    )


def measure(
    name: str, photos: list[Any] | None, options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from edgeclip.device.evaluation import decide, load_evaluation
    from edgeclip.device.images import index_tar, read
    from edgeclip.device.metrics import cosine
    from edgeclip.device.preprocess import normalize, open_image, to_pixels

    label, source = Path(name).name, student(name)
    images = source.calibration() or photos
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "student.torch").write_text(name)
        inputs = prepare(source, images, IMAGES[options.form], folder)
        np.save(folder / "fresh.npy", inputs["fresh"])

        def answers(features: np.ndarray) -> np.ndarray:
            return source.scores(features).argmax(axis=1)

        labeled = answers if len(source.class_features) else None
        evaluation = (
            load_evaluation(Path(name) / "evaluation", SCORED) if Path(name).is_dir() else None
        )
        if evaluation:
            every = index_tar(evaluation.folder / "images.tar")
            pixels = np.stack(
                [
                    to_pixels(open_image(read(every[i])), source.preprocess)
                    for i in evaluation.chosen
                ]
            )
            np.save(folder / "scored.npy", normalize(pixels, source.preprocess))
            evaluation = evaluation._replace(sets=[s for s in evaluation.sets if s.unseen])

        def of(engine: Any, which: str) -> np.ndarray:
            return np.array(engine(features=which)["features"], np.float32)

        files = {
            "torch fp32": folder / "student.torch",
            **rivals(folder, inputs["ranges"], options),
            **ours(folder, inputs, labeled, evaluation is not None, options.form),
        }
        figures: dict[str, Any] = {}
        required: list[dict[str, Any]] = []
        for threads in options.threads:
            commands = {
                e: [sys.executable, __file__, "--worker", str(f), str(threads), str(folder)]
                for e, f in files.items()
            }
            with compare.workers(commands) as ask:
                if not figures:
                    reference = of(ask["torch fp32"], "fresh")
                    for e, f in files.items():
                        features = of(ask[e], "fresh")
                        size = f.stat().st_size + (
                            f.with_suffix(".bin").stat().st_size if f.suffix == ".xml" else 0
                        )
                        same = (
                            float((answers(features) == answers(reference)).mean())
                            if labeled
                            else None
                        )
                        right = None
                        if evaluation and any(s.rows for s in evaluation.sets):
                            scored = of(ask[e], "scored")
                            right = decide(source, evaluation, scored).right.mean()
                        figures[e] = {
                            "bytes": size,
                            "centered_cosine_p1": cosine(features, reference).centered_p1,
                            "top1_agreement": same,
                        }
                        figures[e]["accuracy"] = None if right is None else float(right)
                turns = {e: (lambda e=e: float(ask[e](queries=QUERIES)["ms"])) for e in files}
                laps = compare.interleave(turns, ROUNDS[options.form])
            for e in files:
                figures[e][f"latency_ms_{threads}"] = compare.interval(
                    compare.column(laps, e)
                )._asdict()
                figures[e][f"times_torch_{threads}"] = compare.interval(
                    compare.ratios(laps, "torch fp32", e)
                )._asdict()
            required += int8_table.judged(label, threads, figures, laps)
        int8_table.show(label, figures, options.threads)
    return figures, required


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--images",
        type=Path,
        help="a folder of photos, or a WebDataset shard, for calibration and closeness: a --model has none",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help="an open_clip model with random weights; may be repeated",
    )
    parser.add_argument(
        "--run", action="append", default=[], type=Path, help="a finished run; may be repeated"
    )
    parser.add_argument(
        "--threads", action="append", type=int, help="may be repeated  [default: 1]"
    )
    parser.add_argument("--modelopt", help="the Python of an environment that has nvidia-modelopt")
    options: argparse.Namespace = parser.parse_args()
    options.threads = options.threads or [1]
    names = [*options.model, *map(str, options.run)]
    if options.model and options.images is None:
        parser.error("a --model has no training images: give --images")
    if not names and options.form != common.SMOKE:
        parser.error("give --model or --run, once or several times")
    from edgeclip.device.images import index_folder, index_tar

    here = common.this_machine()
    if options.images is None:
        photos = None
    elif options.images.suffix == ".tar":
        photos = index_tar(options.images)
    else:
        photos = index_folder(options.images)
    figures, required = {}, []
    with contextlib.ExitStack() as stack:
        if not names:
            names.append(str(stack.enter_context(common.measured_run(options, ()))))
        for name in names:
            figures[Path(name).name], more = measure(name, photos, options)
            required += more
    common.finish({"benchmark": "int8", "models": figures}, required, here, options)


if __name__ == "__main__":
    main()
