"""Steps of gpu.py that ask no training: what the device is, how a tower's layout and compilation
pay, the bundles in ONNX Runtime and TensorRT, energy.

A bundle is opened by edgeclip's own sessions, which read back what really runs; its answers are
compared with those of onnx-fp32 on the CPU, on noise.
"""

import time
from pathlib import Path
from typing import Any

import compare
import gpu_job
import toy
from gpu_job import Job, NotInstalled

TOWERS = {"smoke": ("test_efficientnet", 32)}
"""timm's name and pixels a side of the student, by form"""
TOWER = ("tf_efficientnet_lite0", 224)
TARGETS = ("onnx-fp32", "onnx-fp16", "tensorrt-fp16", "tensorrt-int8")
BATCH = {"smoke": 4}
ROUNDS = {"smoke": 3}
IMAGES = 8
"""that a bundle answers: what an engine takes at once"""
LATENCY_S = {"smoke": 0.1}
LOAD_S = {"smoke": 2.0}
RECIPE = """
data: {kind: webdataset, name: shapes, root: ROOT, license: generated}
teacher: {kind: open_clip, model: tiny, weights: random, config: CONFIG}
views: {count: 1}
student:
  tower: {kind: timm, model: TOWER, weights: random, image_size: SIZE}
  projector_hidden: null
losses: {kl: {weight: 1}}
train: {warmup_steps: 0, epochs: 1, batch_size: 32, device: cpu}
text_encoder: false
bench: {min_duration_s: 0.1, min_query_count: 10}
"""


def device(job: Job) -> dict[str, Any]:
    """Return what every figure here depends on."""
    import torch

    gpu_job.need_device(job.device)
    figures: dict[str, Any] = {"torch": torch.__version__}
    if job.device == "cpu":
        return figures | {"card": None}
    card = torch.cuda.get_device_properties(0)
    return figures | {
        "card": card.name,
        "cards": torch.cuda.device_count(),
        "memory_mib": card.total_memory / 2**20,
        "compute_capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "bf16": torch.cuda.is_bf16_supported(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
    }


# --- a tower's training step in another form


def layout(job: Job, form: str) -> dict[str, Any]:
    """Time a training step of the student's tower as it is against channels-last, or compiled.

    Forward and backward in bf16, interleaved; times_as_fast is plain over changed. Compilation and
    the choice of kernels come before.
    """
    import timm
    import torch

    gpu_job.need_device(job.device)
    name, size = TOWERS.get(job.form, TOWER)
    batch = BATCH.get(job.form, {"cuda": 128, "cpu": 16}[job.device])
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False, num_classes=0).to(job.device).train()
    torch.manual_seed(0)
    changed = timm.create_model(name, pretrained=False, num_classes=0).to(job.device).train()
    x = torch.randn(batch, 3, size, size, device=job.device)
    other = x
    figures: dict[str, Any] = {"tower": name, "pixels": size, "batch": batch}
    if form == "channels-last":
        changed = changed.to(memory_format=torch.channels_last)
        other = x.to(memory_format=torch.channels_last)
    else:
        figures["backend"] = "inductor"
        if job.smoke:  # a compiler is not what seconds are for
            figures["backend"] = "aot_eager"
        changed = torch.compile(changed, backend=figures["backend"])

    def step(tower: Any, pixels: Any) -> float:
        before = time.perf_counter()
        with torch.autocast(job.device, torch.bfloat16):
            loss = tower(pixels).square().mean()
        loss.backward()
        gpu_job.wait_for(job.device)
        return 1e3 * (time.perf_counter() - before)

    start = time.perf_counter()
    step(changed, other)
    figures["first_step_s"] = time.perf_counter() - start
    for _ in range(2):
        step(plain, x)
        step(changed, other)
    forms = {"plain": lambda: step(plain, x), "changed": lambda: step(changed, other)}
    rounds = compare.interleave(forms, ROUNDS.get(job.form, 30))
    for who in forms:
        figures[f"{who}_ms"] = compare.interval(compare.column(rounds, who)).median
    faster = compare.interval(compare.ratios(rounds, "plain", "changed"))
    figures["times_as_fast"] = faster._asdict()
    return figures | {"gpu_memory_mib": gpu_job.gpu_memory_mib(job.device)}


# --- bundles


def export(job: Job) -> dict[str, Any]:
    """Make a student of random weights and its bundles, on the CPU; of a given run, name its own."""
    if job.run is None:
        from edgeclip.host.distill.run import distill
        from edgeclip.host.export import export as write
        from edgeclip.host.export.source import from_run

        name, size = TOWERS.get(job.form, TOWER)
        folder = gpu_job.working_folder()
        text = RECIPE.replace("TOWER", name).replace("SIZE", str(size))
        run = folder / "runs" / "bundles"
        distill(toy.write_recipe(folder, text), out=run)
        source = from_run(run)
        for target in TARGETS:
            write(source, target, toy.small_calibration(target), run / "bundles" / target)
    return {"run": job.run or "random weights", "bundles": sorted(_bundles(job))}


def _bundles(job: Job) -> dict[str, Path]:
    run = gpu_job.working_folder() / "runs" / "bundles"
    if job.run is not None:
        run = Path(job.run)
    return {path.parent.name: path.parent for path in run.glob("bundles/*/manifest.json")}


def _bundle(job: Job, target: str) -> Any:
    """Return the bundle of a target. Raises RuntimeError where the run has none."""
    from edgeclip.device.bundle import Bundle

    found = _bundles(job)
    if target not in found:
        raise RuntimeError(f"there is no bundle of {target}: see the step 'bundles'")
    return Bundle.load(found[target], threads=2)


def _noise(size: int, count: int) -> Any:
    """Return float32 [count, 3, size, size], coarse noise: as pixels after normalization."""
    import numpy as np

    coarse = np.random.default_rng(0).normal(0, 1, (count, 3, 8, 8)).astype(np.float32)
    times = -(-size // 8)
    large = np.kron(coarse, np.ones((1, 1, times, times), np.float32))
    return np.ascontiguousarray(large[..., :size, :size])


def onnxruntime(job: Job, target: str, provider: str) -> dict[str, Any]:
    """Open a bundle in ONNX Runtime with one execution provider; no node may run elsewhere."""
    import onnxruntime as ort

    from edgeclip.device.runtime import open_session

    if provider not in ort.get_available_providers():
        raise NotInstalled(f"{provider}: pip install onnxruntime-gpu")
    gpu_job.need_device({"CPUExecutionProvider": "cpu"}.get(provider, "cuda"))
    bundle = _bundle(job, target)
    model = bundle.file(bundle.manifest.image_encoder)
    session = open_session("onnxruntime", model, 2, "all", (provider,))
    return _answers(job, session, bundle)


def tensorrt(job: Job, target: str) -> dict[str, Any]:
    """Build the engine of a TensorRT bundle, execute it, say which precision its layers take."""
    gpu_job.need_device("cuda")
    gpu_job.need_module("tensorrt", "pip install tensorrt")
    bundle = _bundle(job, target)
    start = time.perf_counter()
    session = bundle.open_image_encoder()
    seconds = time.perf_counter() - start
    return {"open_s": seconds} | _answers(job, session, bundle)


def tensorrt_rtx(job: Job, target: str) -> dict[str, Any]:
    """Build the engine of a TensorRT bundle by TensorRT-RTX, which needs no GPU; with one, execute
    it and say which precision its layers take.
    """
    import torch

    from edgeclip.device.records import Ran
    from edgeclip.device.runtime import tensorrt as runtime
    from edgeclip.device.runtime import tensorrt_build

    gpu_job.need_module("tensorrt_rtx", "pip install 'edgeclip[lint]'")
    trt = tensorrt_build.module(("tensorrt_rtx",))
    bundle = _bundle(job, target)
    model = bundle.file(bundle.manifest.image_encoder)
    plan = gpu_job.working_folder() / f"{target}.rtx.plan"
    built = tensorrt_build.build(model, plan, runtime.BATCH, trt=trt)
    figures = {name: built[name] for name in ("engine_bytes", "seconds", "version")}
    if job.device == "cpu" or not torch.cuda.is_available():
        return figures | {"executed": False}
    cuda = runtime.Cuda()
    maker = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = maker.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise RuntimeError("TensorRT-RTX cannot load the engine that it built")
    layers = tensorrt_build.counts(built["layers"] or [])
    ran = Ran(runtime="tensorrt_rtx", version=trt.__version__, threads=2, layers=layers)
    session = runtime.session(trt, cuda, maker, engine, ran)
    return figures | {"executed": True} | _answers(job, session, bundle)


def _answers(job: Job, session: Any, bundle: Any) -> dict[str, Any]:
    """Return how near a session's answers are to onnx-fp32's on the CPU, its latency, its facts."""
    from edgeclip.device.metrics import cosine

    x = _noise(bundle.preprocess.size, IMAGES)
    close = cosine(session.run(x), _bundle(job, "onnx-fp32").open_image_encoder().run(x))
    seconds = LATENCY_S.get(job.form, 1.0)
    return {
        "version": session.facts.version,
        "providers": session.facts.providers,
        "layers": session.facts.layers,
        "cosine_min": close.raw_min,
        "centered_cosine_min": close.centered_min,
        "latency_ms": gpu_job.latency_ms(lambda: session.run(x[:1]), seconds),
        "latency_ms_of_8": gpu_job.latency_ms(lambda: session.run(x), seconds),
    }


# --- energy


def energy(job: Job) -> dict[str, Any]:
    """Measure the energy of an image above idle: the student's tower, one image a call.

    Of a GPU by NVML, which reads the whole card; of a CPU by RAPL where it may be read.
    """
    import timm
    import torch
    from msgspec.structs import asdict

    from edgeclip.device import energy as measuring

    gpu_job.need_device(job.device)
    source = _power(job.device)
    name, size = TOWERS.get(job.form, TOWER)
    tower = timm.create_model(name, pretrained=False, num_classes=0).to(job.device).eval()
    x = torch.randn(1, 3, size, size)

    @torch.inference_mode()
    def answer(pixels: Any) -> Any:
        return tower(pixels.to(job.device)).cpu()

    answer(x)
    load = measuring.Load(answer, [x], LOAD_S.get(job.form, 15.0))
    found = measuring.measure(load, source)
    return {"what": f"{name}, torch fp32, one image a call"} | asdict(found)


def _power(device: str) -> Any:
    """Return the source of watts. Raises `NotInstalled` where there is none."""
    from edgeclip.device import power

    if device == "cpu":
        source = power.find(("package",))
        if source is None:
            raise NotInstalled("no power sensor of this CPU that may be read (RAPL)")
        return source
    gpu_job.need_module("pynvml", "pip install nvidia-ml-py")
    import pynvml
    import torch

    pynvml.nvmlInit()
    # By its id: NVML counts cards that CUDA_VISIBLE_DEVICES hides.
    card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    return power.Source(
        "NVML: the whole card",
        lambda: pynvml.nvmlDeviceGetPowerUsage(card) / 1e3,
        close=pynvml.nvmlShutdown,
    )
