"""TensorRT: the engine of a bundle's ONNX, built where it runs, kept by what it depends on, never
replaced by something else.

tensorrt_build.py builds it (the same file goes into every TensorRT bundle), engine.py keeps it,
this file runs it: input copied in, executed on a stream, answer copied out. Execution has not met a
GPU yet: docs/devices.md says what of it was tested, and with what.
"""

import ctypes
import ctypes.util
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.device.records import BuildOptions, Ran
from edgeclip.device.runtime import INSTALL, Port, Session, tensorrt_build
from edgeclip.device.runtime import engine as engines
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say

BATCH = (1, 4, 8)
"""smallest, best and largest batch of the optimization profile"""
WORKSPACE_MIB = 1024
OPTIONS: BuildOptions = {"batch": list(BATCH), "workspace_mib": WORKSPACE_MIB}


def open_session(model: Path, threads: int, optimization: str) -> Session:
    """Build the engine, or take the kept one that was built under the same conditions; open it.

    Raises `EdgeclipError` where TensorRT or CUDA is missing, or the engine cannot be built.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as e:
        raise EdgeclipError("tensorrt", f"is not installed ({e})", INSTALL["tensorrt"]) from None
    cuda = Cuda()
    conditions = engines.conditions(model, trt.__version__, cuda.compute_capability(), OPTIONS)
    kept = engines.engine(conditions, lambda folder: make(trt, model, folder))
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine((kept.folder / "engine.plan").read_bytes())
    if engine is None:
        raise EdgeclipError(
            kept.folder,
            "TensorRT cannot load the engine that it built",
            "remove the folder and run the command again",
        )
    ran = Ran(
        runtime="tensorrt",
        version=trt.__version__,
        threads=threads,
        providers=["TensorRT"],
        largest_batch=BATCH[-1],
        engine=kept.folder.name,
        conditions=conditions,
        layers=tensorrt_build.counts(kept.built["layers"] or []),
    )
    return session(trt, cuda, runtime, engine, ran)


def make(trt: Any, model: Path, folder: Path) -> tensorrt_build.Built:
    """Build engine.plan in `folder`, with and into its timing.cache; return what is known of it.

    Raises `EdgeclipError` where TensorRT refuses the graph.
    """
    say(f"building the TensorRT {trt.__version__} engine of {model.name} (minutes)")
    try:
        return tensorrt_build.build(
            model, folder / "engine.plan", BATCH, WORKSPACE_MIB, folder / "timing.cache", trt
        )
    except tensorrt_build.BuildError as e:
        where, _, rest = str(e).partition(": ")
        what, _, do = rest.rpartition("; ")
        raise EdgeclipError(where, what, do) from None


def session(trt: Any, cuda: Any, runtime: Any, engine: Any, ran: Ran) -> Session:
    """Return a session of one input and one output on a stream of its own; answers are float32 on
    the host."""
    execution = _Execution(trt, cuda, runtime, engine)
    return Session(execution.run, execution.input, execution.output, ran)


class _Execution:
    """An engine's context, its stream, and its buffers on the GPU, which grow with the batch."""

    def __init__(self, trt: Any, cuda: Any, runtime: Any, engine: Any):
        # An engine must not outlive its runtime.
        self.runtime = runtime
        self.engine = engine
        self.cuda = cuda
        self.context = engine.create_execution_context()
        self.stream = cuda.stream()
        if self.context is None:
            raise EdgeclipError(
                "TensorRT", "cannot make an execution context", "is the GPU's memory full?"
            )
        ports = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            shape = [None if d < 0 else int(d) for d in tuple(engine.get_tensor_shape(name))]
            dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
            ports[engine.get_tensor_mode(name)] = Port(name, shape, dtype)
        self.input: Port = ports[trt.TensorIOMode.INPUT]
        self.output: Port = ports[trt.TensorIOMode.OUTPUT]
        self.addresses: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the answers of a batch [B, ...], in parts where it is larger than BATCH."""
        if len(x) <= BATCH[-1]:
            return self._execute(x)
        starts = range(0, len(x), BATCH[-1])
        return np.concatenate([self._execute(x[at : at + BATCH[-1]]) for at in starts])

    def _execute(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, self.input.dtype)
        if not self.context.set_input_shape(self.input.name, x.shape):
            built = f"it was built for {BATCH[0]} to {BATCH[-1]}"
            what = f"the engine takes no batch of {len(x)} ({built})"
            raise EdgeclipError("TensorRT", what, "use smaller batches")
        shape = tuple(self.context.get_tensor_shape(self.output.name))
        out = np.empty(shape, self.output.dtype)

        source = self._place(self.input.name, x.nbytes)
        self.cuda.copy(source, x.ctypes.data, x.nbytes, TO_DEVICE, self.stream)
        answer = self._place(self.output.name, out.nbytes)
        if not self.context.execute_async_v3(self.stream):
            raise EdgeclipError("TensorRT", "execution failed", "see its own messages above")
        self.cuda.copy(out.ctypes.data, answer, out.nbytes, TO_HOST, self.stream)
        self.cuda.wait(self.stream)
        return out

    def _place(self, name: str, size: int) -> int:
        """Return the address of a buffer of at least `size` bytes on the GPU, bound to the
        tensor."""
        if size > self.sizes.get(name, 0):
            if name in self.addresses:
                self.cuda.free(self.addresses[name])
            self.addresses[name] = self.cuda.allocate(size)
            self.sizes[name] = size
            self.context.set_tensor_address(name, self.addresses[name])
        return self.addresses[name]


# --- the six calls of CUDA's runtime library that an engine needs: JetPack brings no Python for it.
# Source: CUDA Runtime API, Memory Management, Stream Management, Device Management.

TO_DEVICE = 1
TO_HOST = 2
MAJOR = 75
"""cudaDevAttrComputeCapabilityMajor"""
MINOR = 76
"""cudaDevAttrComputeCapabilityMinor"""


def _of_pip() -> list[Path]:
    """Return where pip's own packages of CUDA, which torch brings, have the runtime library."""
    found = importlib.util.find_spec("nvidia")
    libraries: list[Path] = []
    if found is not None:
        for folder in found.submodule_search_locations or []:
            libraries += sorted(Path(folder).glob("*/lib/libcudart.so.*"))
    return libraries


class Cuda:  # hardware: NVIDIA GPU
    """Raises `EdgeclipError` with CUDA's own reason for every call that fails."""

    def __init__(self) -> None:
        places = [
            *sorted(Path("/usr/local/cuda/lib64").glob("libcudart.so.*")),
            ctypes.util.find_library("cudart"),
            *_of_pip(),
        ]
        for place in (p for p in places if p):
            try:
                self.library = ctypes.CDLL(str(place))
                break
            except OSError:
                continue
        else:
            raise EdgeclipError(
                "CUDA",
                "its runtime library (libcudart) is not on this machine",
                "it comes with JetPack; on a GPU host install the CUDA toolkit",
            )
        self.library.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: object) -> None:
        if code := getattr(self.library, name)(*arguments):
            raise EdgeclipError(
                "CUDA",
                f"{name}: {self.library.cudaGetErrorString(code).decode()}",
                "see dmesg, and whether another process fills the memory",
            )

    def compute_capability(self) -> str:
        """Return the GPU's compute capability, as "8.7"."""
        values = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(values, (MAJOR, MINOR), strict=True):
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
        return f"{values[0].value}.{values[1].value}"

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(handle))
        return handle.value or 0

    def allocate(self, size: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value or 0

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def copy(self, to: int, source: int, size: int, way: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            way,
            ctypes.c_void_p(stream),
        )

    def wait(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))
