"""ONNX Runtime. Providers are asked for by name and read back, threads are those of the session's options.

Of providers without the CPU's among them no node may run on the CPU; with it, those may that the others refuse.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgeclip.device.runtime import Port, Session
from edgeclip.errors import EdgeclipError

CPU = "CPUExecutionProvider"
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
}

UNSAFE_IN_HALF = ["NchwcTransformer"]
"""ends the process on some float16 vision transformers (1.31, x86, a MatMul behind a Transpose); such files are called *.fp16.onnx"""


def open_session(
    model: Path, threads: int, optimization: str, providers: tuple[str, ...] = (CPU,)
) -> Session:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = LEVELS[optimization]
    options.log_severity_level = 3
    # S8S8 is for ARM, and there every quantized convolution is one integer kernel. By default x86 leaves some of them between Q and DQ
    # in float, which is faster and rounds otherwise; with this it computes what the board will, bit for bit. U8S8 does not change.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if missing := [p for p in providers if p not in ort.get_available_providers()]:
        raise EdgeclipError(
            model,
            f"this ONNX Runtime {ort.__version__} has no {', '.join(missing)}",
            "install the build that has it, or change the profile's providers",
        )
    if CPU not in providers:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        unsafe = UNSAFE_IN_HALF if ".fp16" in model.suffixes else None
        session = ort.InferenceSession(
            str(model), options, providers=list(providers), disabled_optimizers=unsafe
        )
    except Exception as e:  # pybind raises a different type for every failure
        raise EdgeclipError(
            model,
            f"ONNX Runtime {ort.__version__} cannot load it ({str(e)[:200]})",
            "export it anew for this runtime version",
        ) from None
    found = [
        p for p in session.get_providers() if p in providers or p != CPU
    ]  # the CPU's is always listed
    if found != list(providers):
        raise EdgeclipError(
            model,
            f"runs on {session.get_providers()}, not on {list(providers)}",
            "install a runtime that has them",
        )
    (i,), (o,) = session.get_inputs(), session.get_outputs()

    def run(x: np.ndarray) -> np.ndarray:
        out: np.ndarray = session.run([o.name], {i.name: x})[0]
        return out

    used = session.get_session_options().intra_op_num_threads
    facts = {
        "runtime": "onnxruntime",
        "version": ort.__version__,
        "providers": found,
        "threads": used,
        "optimization": optimization,
    }
    return Session(run, _port(i), _port(o), facts)


def _port(node: ort.NodeArg) -> Port:
    return Port(
        node.name,
        [d if isinstance(d, int) else None for d in node.shape],
        DTYPES.get(node.type, node.type),
    )
