"""A kit for the first GPU: what edgeclip does on CUDA, in at most 9 minutes, into one file.

**It has never run on a GPU.** On a machine without one every step that needs it says "not
installed", and the others run; `--device cpu` tries them all on the CPU.

Each step runs in a process of its own with a limit of its own, and says `done` (with its figures),
`failed` (with the reason and its last lines), `not installed` (with what is missing) or `no time
left`; the next one goes on. The file is written after every step. No network: photos and weights
are arguments, else images are generated and weights are random.

    training      the smoke and clothing recipes and a ViT-L/14 teacher's, by `distill`: fp32, bf16 and fp16 on the device,
                  fp32 on the CPU. Required: the largest relative difference of a step's loss to the CPU's, over the first
                  20 steps, is at most .02 (fp32), .2 (bf16, fp16)
    live teacher  the same teacher's images a second in each precision, and its features against the cache's
    trainer       open_clip's own with a live teacher beside edgeclip's with its cache, one epoch each
    processes     NCCL (on a CPU gloo): one process, and as many as there are GPUs; the loss curve must be that of none
    tower         a training step channels-last, and by torch.compile, against the plain one
    bundles       ONNX Runtime's CPU and CUDA provider, TensorRT, TensorRT-RTX: build, execute, precisions of layers, latency.
                  Required: cosine to onnx-fp32's answers at least .9999 (fp32), .999 (fp16), .9 (int8)
    energy        of an image above idle, by NVML

Images and batches are few, so that nine minutes do: curves, parity and statuses are what it is for.
Throughput is the trainers' and the tower's alone. With --check a failed step is a missed figure.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --data clothing=DIR --teacher FILE --check
    python benchmarks/gpu.py --only 'tensorrt: int8' --only bundles
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import common
import compare
from gpu_job import DONE, FAILED, STATUSES, Job
from gpu_runner import Result, Step, run_all

from edgeclip import disk

BUDGET_S = {"whole": 525.0, "quick": 240.0, "smoke": 1800.0}
"""of all steps together; the rest of the nine minutes is start and end"""
SHARED = 4
"""times a step's limit in the smoke form, which runs beside other tests"""
RECIPES = {"smoke": 45.0, "clothing": 60.0, "vit-l-14": 75.0}
"""the limit of one training, seconds"""
COMPARED = 20
"""first steps whose losses are compared: rounding grows with every step"""
TINY = 1e-9
"""a loss below it counts as this"""
CURVES = {"fp32": 0.02, "bf16": 0.2, "fp16": 0.2}
COSINES = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.9}
SMALL = (
    "device",
    "smoke: reference",
    "smoke: bf16",
    "vit-l-14: reference",
    "live teacher",
    "processes: all",
    "bundles",
    "onnxruntime CPU: fp32",
    "tensorrt: int8",
    "energy",
    "tower: channels-last",
)
"""steps of the smoke form, unless --only names others; one of each kind that is quick"""


# --- what is done


def steps_of(device: str) -> list[Step]:
    """Return the steps, the most telling first."""
    steps = [Step("device", "gpu_runtimes:device", 20.0)]
    for name, limit in RECIPES.items():
        steps += _trainings(name, limit, device)
    several = {"several": True}
    steps += [
        Step("live teacher", "gpu_training:live_teacher", 45.0),
        Step("trainer", "gpu_training:open_clip", 90.0),
        Step("processes: 1", "gpu_training:processes", 45.0, {"several": False}),
        Step("processes: all", "gpu_training:processes", 60.0, several),
        Step("bundles", "gpu_runtimes:export", 120.0),
    ]
    steps += _sessions()
    steps += [
        Step("energy", "gpu_runtimes:energy", 45.0),
        Step("tower: channels-last", "gpu_runtimes:layout", 30.0, {"form": "channels-last"}),
        Step("tower: compile", "gpu_runtimes:layout", 90.0, {"form": "compile"}),
    ]
    return steps


def _trainings(name: str, limit: float, device: str) -> list[Step]:
    """Return a recipe's trainings. The device is first: it makes the teacher's cache, which the CPU
    then reads.
    """
    steps = []
    asked = [(device, "fp32"), ("cpu", "fp32"), (device, "bf16"), (device, "fp16")]
    for where, precision in asked:
        title = f"{name}: {precision}"
        if (where, precision) == ("cpu", "fp32"):
            title = f"{name}: reference"
        if title in [step.name for step in steps]:  # with --device cpu it is the device's own
            continue
        given = {"name": name, "device": where, "precision": precision}
        steps.append(Step(title, "gpu_training:train", limit, given))
    return steps


def _sessions() -> list[Step]:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    steps = []
    for target, provider in (("onnx-fp32", cpu), ("onnx-fp32", cuda), ("onnx-fp16", cuda)):
        given = {"target": target, "provider": provider}
        title = f"onnxruntime {provider.removesuffix('ExecutionProvider')}: {target[5:]}"
        steps.append(Step(title, "gpu_runtimes:onnxruntime", 20.0, given))
    for precision in ("fp16", "int8"):
        given = {"target": f"tensorrt-{precision}"}
        steps.append(Step(f"tensorrt: {precision}", "gpu_runtimes:tensorrt", 75.0, given))
    for precision in ("fp16", "int8"):
        given = {"target": f"tensorrt-{precision}"}
        steps.append(Step(f"tensorrt-rtx: {precision}", "gpu_runtimes:tensorrt_rtx", 60.0, given))
    return steps


# --- what it says


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Return the largest relative difference of two curves over the first steps that both have."""
    pairs = list(zip(losses, reference, strict=False))[:COMPARED]
    return max(abs(a - b) / max(abs(b), TINY) for a, b in pairs)


def required_of(results: list[Result]) -> list[dict[str, Any]]:
    """Return the required figures; what was not measured is none of them."""
    figures = {r["name"]: r["figures"] for r in results if r["status"] == DONE}
    required = []
    for name in RECIPES:
        if f"{name}: reference" not in figures:
            continue
        reference = figures[f"{name}: reference"]["losses"]
        for precision, limit in CURVES.items():
            if f"{name}: {precision}" in figures:
                found = figures[f"{name}: {precision}"]["losses"]
                required += _curve(f"{name}: {precision}", found, reference, limit)
    alone = figures.get("smoke: fp32", figures.get("smoke: reference"))
    for name in ("processes: 1", "processes: all"):
        if alone is not None and name in figures:
            found = figures[name]["losses"]
            required += _curve(name, found, alone["losses"], CURVES["fp32"])
    for name, found in figures.items():
        if "cosine_min" in found:
            what = f"{name}: least cosine to onnx-fp32 on the CPU"
            limit = COSINES[name.rpartition(" ")[2]]
            required.append(compare.exact(what, found["cosine_min"], at_least=limit))
    failed = sum(r["status"] == FAILED for r in results)
    required.append(compare.exact("steps that failed", failed, n=len(results), at_most=0))
    return required


def _curve(
    name: str, found: list[float], reference: list[float], limit: float
) -> list[dict[str, Any]]:
    """Return what is required of a curve: the reference's number of steps, and its losses."""
    longer = abs(len(found) - len(reference))
    steps = compare.exact(f"{name}: steps more or fewer than the reference", longer, at_most=0)
    if not found or not reference:
        return [steps]
    difference = largest_difference(found, reference)
    what = f"{name}: largest relative difference of a step's loss"
    return [steps, compare.exact(what, difference, n=min(COMPARED, len(found)), at_most=limit)]


def everything(job: Job, planned: list[Step], results: list[Result]) -> dict[str, Any]:
    """Return what the file holds, but for what common.py adds to every benchmark's."""
    counts = {status: sum(r["status"] == status for r in results) for status in STATUSES}
    return {
        "benchmark": "gpu",
        "device": job.device,
        "card": card_of(results),
        "planned": [step.name for step in planned],
        "finished": len(results) == len(planned),
        "counts": counts,
        "steps": results,
    }


def card_of(results: list[Result]) -> str | None:
    """Return the GPU's name; None: there is none, or it was not asked."""
    for result in results:
        if "card" in result.get("figures", {}):
            card: str | None = result["figures"]["card"]
            return card
    return None


def noting(
    job: Job, planned: list[Step], options: Any, here: Any
) -> Callable[[list[Result]], None]:
    """Return what is called after every step: it prints a line and writes the file anew."""

    def note(results: list[Result]) -> None:
        last = results[-1]
        reason = last.get("reason", "")
        print(f"{last['name']}: {last['status']} {reason}".rstrip(), file=sys.stderr)
        if options.json:
            so_far = everything(job, planned, results)
            more = {"required": required_of(results), "machine": here, "form": options.form}
            disk.write_json(options.json, so_far | more)

    return note


def shown(result: Result) -> list[Any]:
    """Return a step's row of the table."""
    found = result.get("figures", {})
    said = [result.get("reason")]
    if found.get("seconds_a_step"):
        said = [
            f"{1e3 * found['seconds_a_step']:.1f} ms a step of {found['batch']}, {found['images']}"
        ]
    if "latency_ms" in found:
        said = [f"{found['latency_ms']['p50']:.2f} ms", f"layers {found['layers']}"]
    if isinstance(found.get("times_as_fast"), float):
        said = [f"{found['times_as_fast']:.2f} times as fast"]
    if isinstance(found.get("times_as_fast"), dict):
        said = [f"{found['times_as_fast']['median']:.2f} times as fast"]
    if found.get("gpu_memory_mib") is not None:
        said.append(f"{found['gpu_memory_mib']:.0f} MiB on the GPU")
    words = ", ".join(part for part in said if part)
    return [result["name"], result["status"], result.get("seconds"), words[:100]]


def interrupted(number: int, frame: FrameType | None) -> None:
    """End as a Ctrl-C does, so that the running step and the working folder go too."""
    sys.exit(128 + number)


def arguments() -> Any:
    parser = common.arguments(__doc__)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="what is tried  [default: cuda; cpu with --smoke]",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="photos in CLIP_benchmark's layout for clothing or vit-l-14  [default: generated]",
    )
    parser.add_argument(
        "--teacher", default="random", help="weights file of the ViT-L/14  [default: random]"
    )
    parser.add_argument(
        "--run", type=common.absolute, help="a finished run with its bundles  [default: made]"
    )
    parser.add_argument(
        "--open-clip-python",
        default=sys.executable,
        help="the interpreter that open_clip's trainer runs in",
    )
    parser.add_argument(
        "--only", action="append", metavar="STEP", help="this step alone; may be repeated"
    )
    return parser.parse_args()


def job_of(options: Any) -> Job:
    """Return what the steps are given. Exits for data of a recipe that there is not."""
    roots = {}
    for given in options.data:
        name, _, folder = given.partition("=")
        if name not in ("clothing", "vit-l-14") or not folder or not Path(folder).is_dir():
            sys.exit(f"--data {given}: needs clothing=DIR or vit-l-14=DIR, and DIR a folder")
        roots[name] = str(common.absolute(folder))
    teacher = options.teacher
    if teacher != "random":
        teacher = str(common.absolute(teacher))
    device = options.device or ("cpu" if options.form == common.SMOKE else "cuda")
    run = options.run and str(options.run)
    return Job(device, options.form, roots, teacher, run, options.open_clip_python)


def main() -> None:
    options = arguments()
    job = job_of(options)
    planned = steps_of(job.device)
    if job.smoke:
        planned = [step._replace(limit_s=SHARED * step.limit_s) for step in planned]
        options.only = options.only or SMALL
    if options.only:
        unknown = set(options.only) - {step.name for step in planned}
        if unknown:
            names = ", ".join(step.name for step in planned)
            sys.exit(f"--only {unknown.pop()}: is no step; the steps are: {names}")
        planned = [step for step in planned if step.name in options.only]
    signal.signal(signal.SIGTERM, interrupted)
    here = common.this_machine()
    with common.workplace():
        note = noting(job, planned, options, here)
        results = run_all(planned, job, BUDGET_S[options.form], note)
    common.table([shown(r) for r in results], ["step", "status", "s", ""])
    for result in results:
        if job.smoke and result["status"] == FAILED:  # it judges nothing, but it runs
            sys.exit(f"{result['name']}: {result['reason']}")
    common.finish(everything(job, planned, results), required_of(results), here, options)


if __name__ == "__main__":
    main()
