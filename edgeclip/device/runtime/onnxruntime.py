"""ONNX Runtime: providers are asked for by name and read back, threads are the session's.

Of providers without the CPU's among them no node may run on the CPU; with it, those may that the
others refuse.
"""

import io
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgeclip.device.records import Ran
from edgeclip.device.runtime import Port, Session
from edgeclip.device.runtime.protobuf import fields
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

UNSAFE_IN_HALF = ("NchwcTransformer", "WeightBiasQuantization")
"""What ONNX Runtime 1.31 does wrongly to float16 graphs (docs/targets.md, Known).

NchwcTransformer ends the process on some vision transformers (x86, a MatMul behind a Transpose).
WeightBiasQuantization, of the basic level, rounds the float16 biases of a Q/DQ graph to rubbish.
"""
GRAPH = 7
"""of onnx.proto: ModelProto.graph"""
INITIALIZER = 5
"""GraphProto.initializer"""
DATA_TYPE = 2
"""TensorProto.data_type"""
FLOAT16 = 10
"""a value of TensorProto.data_type"""


def session_options(model: Path | bytes) -> dict[str, str]:
    """Return the session's configuration entries that the answers of this ONNX file depend on.

    model: its path, or its content. `open_session` sets these, and a bundle's manifest names them,
    so that a session without edgeclip answers the same.
    """
    # S8S8 is for ARM, and there every quantized convolution is one integer kernel. By default x86
    # leaves some of them between Q and DQ in float, which is faster and rounds otherwise; with this
    # it computes what the board will, bit for bit. U8S8 does not change.
    options = {"session.qdqisint8allowed": "1"}
    if disabled := disabled_optimizers(model):
        options["optimization.disable_specified_optimizers"] = ";".join(disabled)
    return options


def disabled_optimizers(model: Path | bytes) -> list[str]:
    """Return the graph transformers that ONNX Runtime must leave out for this ONNX file.

    model: its path, or its content. Every session leaves these out. What the graph holds
    decides, not what it is called: one float16 initializer makes it a float16 graph.
    """
    if isinstance(model, bytes):
        return _disabled(io.BytesIO(model), len(model))
    with model.open("rb") as file:
        return _disabled(file, model.stat().st_size)


def _disabled(file: io.BufferedIOBase, size: int) -> list[str]:
    for graph_end in fields(file, size, GRAPH):
        for initializer_end in fields(file, graph_end, INITIALIZER):
            if FLOAT16 in fields(file, initializer_end, DATA_TYPE):
                return list(UNSAFE_IN_HALF)
    return []


def open_session(
    model: Path, threads: int, optimization: str, providers: tuple[str, ...] = (CPU,)
) -> Session:
    """Return a session. Raises `EdgeclipError` where a provider is missing or takes no part."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = LEVELS[optimization]
    options.log_severity_level = 3
    if missing := [p for p in providers if p not in ort.get_available_providers()]:
        raise EdgeclipError(
            model,
            f"this ONNX Runtime {ort.__version__} has no {', '.join(missing)}",
            "install the build that has it, or change the profile's providers",
        )
    if CPU not in providers:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # Else the file's own first bytes choose another reader.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        for key, value in session_options(model).items():
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(str(model), options, providers=list(providers))
    except Exception as e:  # pybind raises a different type for every failure
        raise EdgeclipError(
            model,
            f"ONNX Runtime {ort.__version__} cannot load it ({str(e)[:200]})",
            "export it again for this runtime version",
        ) from None
    # The CPU's is always listed.
    found = [p for p in session.get_providers() if p in providers or p != CPU]
    if found != list(providers):
        raise EdgeclipError(
            model,
            f"runs on {session.get_providers()}, not on {list(providers)}",
            "install a runtime that has them",
        )
    i, o = _ports(session, model)
    taken, given = _port(i, model), _port(o, model)

    def run(x: np.ndarray) -> np.ndarray:
        try:
            out: np.ndarray = session.run([given.name], {taken.name: x})[0]
        except Exception as e:  # as above
            what = f"ONNX Runtime {ort.__version__} cannot run it ({str(e)[:300]})"
            raise EdgeclipError(model, what, "export it again") from None
        return out

    used = session.get_session_options().intra_op_num_threads
    facts = Ran(
        runtime="onnxruntime",
        version=ort.__version__,
        threads=used,
        providers=found,
        optimization=optimization,
    )
    return Session(run, taken, given, facts)


def _ports(session: ort.InferenceSession, model: Path) -> tuple[ort.NodeArg, ort.NodeArg]:
    """Return the input and the output. Raises `EdgeclipError` where there are more, or none."""
    inputs = session.get_inputs()
    outputs = session.get_outputs()
    if (len(inputs), len(outputs)) != (1, 1):
        what = f"has {len(inputs)} inputs and {len(outputs)} outputs, not one of each"
        raise EdgeclipError(model, what, "export it again")
    return inputs[0], outputs[0]


def _port(node: ort.NodeArg, model: Path) -> Port:
    """Return an end of the graph. Raises `EdgeclipError` for a name that is no text."""
    try:
        shape = [d if isinstance(d, int) else None for d in node.shape]
        return Port(node.name, shape, DTYPES.get(node.type, node.type))
    except UnicodeDecodeError:
        what = "has an input or output whose name is not UTF-8"
        raise EdgeclipError(model, what, "export it again") from None
