"""TensorRT: the engine of a bundle's ONNX, built where it runs, kept by what it depends on, never replaced by something else.

tensorrt_build.py builds it (the same file goes into every TensorRT bundle), engine.py keeps it, this file runs it: input
copied in, executed on a stream, answer copied out. Execution has not met a GPU yet: docs/devices.md says what of it was
tested, and with what.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.device.runtime import INSTALL, Port, Session, tensorrt_build
from edgeclip.device.runtime import engine as cache
from edgeclip.device.runtime.cuda import TO_DEVICE, TO_HOST, Cuda
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

BATCH = (1, 4, 8)
"""smallest, best and largest batch of the optimization profile"""
WORKSPACE_MIB = 1024
OPTIONS = {"batch": list(BATCH), "workspace_mib": WORKSPACE_MIB}


def open_session(model: Path, threads: int, optimization: str) -> Session:
    """Builds the engine, or takes the kept one that was built under the same conditions."""
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as e:
        raise EdgeclipError("tensorrt", f"is not installed ({e})", INSTALL["tensorrt"]) from None
    cuda = Cuda()
    conditions = cache.conditions(model, trt.__version__, cuda.compute_capability(), OPTIONS)
    kept, built = cache.engine(conditions, lambda folder: make(trt, model, folder))
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine((kept / "engine.plan").read_bytes())
    if engine is None:
        raise EdgeclipError(
            kept,
            "TensorRT cannot load the engine that it built",
            "remove the folder and run the command again",
        )
    counts = tensorrt_build.counts(built["layers"] or [])
    facts = {
        "version": trt.__version__,
        "threads": threads,
        "engine": kept.name,
        "conditions": conditions,
        "layers": counts,
    }
    return session(trt, cuda, runtime, engine, facts)


def make(trt: Any, model: Path, folder: Path) -> dict[str, Any]:
    """Builds engine.plan in `folder`, with and into its timing.cache; returns what is known of it."""
    say(f"building the TensorRT {trt.__version__} engine of {model.name} (minutes)")
    try:
        return tensorrt_build.build(
            model, folder / "engine.plan", BATCH, WORKSPACE_MIB, folder / "timing.cache", trt
        )
    except tensorrt_build.BuildError as e:
        where, _, what = str(e).partition(": ")
        raise EdgeclipError(where, *what.rsplit("; ", 1)) from None


def session(trt: Any, cuda: Any, runtime: Any, engine: Any, facts: dict[str, Any]) -> Session:
    """One input, one output, on a stream of its own; answers are float32 on the host."""
    context, stream = engine.create_execution_context(), cuda.stream()
    if context is None:
        raise EdgeclipError(
            "TensorRT", "cannot make an execution context", "is the GPU's memory full?"
        )
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    ports = {}
    for name in names:
        shape = [None if d < 0 else int(d) for d in tuple(engine.get_tensor_shape(name))]
        ports[engine.get_tensor_mode(name)] = Port(
            name, shape, np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        )
    i, o = ports[trt.TensorIOMode.INPUT], ports[trt.TensorIOMode.OUTPUT]
    buffers: dict[str, tuple[int, int]] = {}

    def place(name: str, size: int) -> int:
        if size > buffers.get(name, (0, 0))[1]:
            if name in buffers:
                cuda.free(buffers[name][0])
            buffers[name] = (cuda.allocate(size), size)
            context.set_tensor_address(name, buffers[name][0])
        return buffers[name][0]

    def run(x: np.ndarray) -> np.ndarray:
        if len(x) > BATCH[-1]:
            return np.concatenate(
                [run(x[at : at + BATCH[-1]]) for at in range(0, len(x), BATCH[-1])]
            )
        x = np.ascontiguousarray(x, i.dtype)
        if not context.set_input_shape(i.name, x.shape):
            raise EdgeclipError(
                "TensorRT",
                f"the engine takes no batch of {len(x)} (it was built for {BATCH[0]} to {BATCH[-1]})",
                "use smaller batches",
            )
        out = np.empty(tuple(context.get_tensor_shape(o.name)), o.dtype)
        cuda.copy(place(i.name, x.nbytes), x.ctypes.data, x.nbytes, TO_DEVICE, stream)
        address = place(o.name, out.nbytes)
        if not context.execute_async_v3(stream):
            raise EdgeclipError("TensorRT", "execution failed", "see its own messages above")
        cuda.copy(out.ctypes.data, address, out.nbytes, TO_HOST, stream)
        cuda.wait(stream)
        return out

    run.__dict__["alive"] = (runtime, engine)  # an engine must not outlive its runtime
    return Session(
        run,
        i,
        o,
        {
            "runtime": "tensorrt",
            "providers": ["TensorRT"],
            "optimization": None,
            "largest_batch": BATCH[-1],
            **facts,
        },
    )
