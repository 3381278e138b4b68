"""Inference runtimes behind one record. One file a runtime, imported only when it is asked for.

`open_session` loads a model file and reports what really runs: after loading, providers or device
and, of OpenVINO, precision and threads are read back, and a difference from what was asked is an
error, never a quiet substitute. ONNX Runtime can only be asked for the threads in its session's
options; it keeps to them.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgeclip.device.records import Ran
from edgeclip.errors import EdgeclipError, did_you_mean

RUNTIMES = {
    "onnxruntime": "edgeclip.device.runtime.onnxruntime",
    "openvino": "edgeclip.device.runtime.openvino",
    "tensorrt": "edgeclip.device.runtime.tensorrt",
}
INSTALL = {
    "onnxruntime": "pip install 'edgeclip[onnxruntime]'",
    "openvino": "pip install 'edgeclip[openvino]'",
    "tensorrt": "it comes with JetPack: run on the board (--device jetson-orin-nano); "
    "on a GPU host: pip install tensorrt",
}


NULL = "null"
"""a runtime that does nothing: what a benchmark through it measures is the harness itself"""


class Port(NamedTuple):
    name: str
    shape: list[int | None]
    """None: any size"""
    dtype: str
    """numpy's name"""


class Session(NamedTuple):
    run: Callable[[np.ndarray], np.ndarray]
    """[B, ...] to [B, D]"""
    input: Port
    output: Port
    facts: Ran
    """what really runs; its precision is the bundle's to say"""


def open_session(
    runtime: str,
    model: Path,
    threads: int,
    optimization: str = "all",
    providers: tuple[str, ...] | None = None,
) -> Session:
    """Return a session of a model file.

    optimization: 'all' or 'basic', where the runtime knows the difference. providers: ONNX
    Runtime's; None: its CPU. Raises `EdgeclipError` when the runtime is unknown or not installed,
    or does not do what was asked.
    """
    if runtime == NULL:
        return _null_session(threads)
    if runtime not in RUNTIMES:
        do = INSTALL.get(runtime) or did_you_mean(runtime, RUNTIMES)
        raise EdgeclipError(runtime, "this runtime cannot run on this machine", do)
    try:
        module = importlib.import_module(RUNTIMES[runtime])
    except ImportError as e:
        raise EdgeclipError(runtime, f"is not installed ({e})", INSTALL[runtime]) from None
    more = {"providers": providers} if providers and runtime == "onnxruntime" else {}
    session: Session = module.open_session(model, threads, optimization, **more)
    return session


def session_options(runtime: str, model: Path) -> dict[str, str]:
    """Return the runtime's options that the answers of a model file depend on, by name.

    They are what `open_session` sets. TensorRT has none: what an engine computes is in its graph.
    Raises `ImportError` where the runtime is not installed.
    """
    if runtime == "tensorrt":
        return {}
    module = importlib.import_module(RUNTIMES[runtime])
    options: dict[str, str] = module.session_options(model)
    return options


def _null_session(threads: int) -> Session:
    """Return a session whose answer is always the same [1, 1] array."""
    answer = np.ones((1, 1), np.float32)
    return Session(
        lambda x: answer,
        Port("pixels", [None, 3, None, None], "float32"),
        Port("image_features", [None, 1], "float32"),
        Ran(runtime=NULL, version=None, threads=threads),
    )
