"""OpenVINO on a CPU, latency hint, one stream. Float layers stay float32: bf16 is never taken by
default."""

import functools
from pathlib import Path

import numpy as np
import openvino as ov

from edgeclip.device.records import Ran
from edgeclip.device.runtime import Port, Session
from edgeclip.errors import EdgeclipError


@functools.cache
def _core() -> ov.Core:
    """One a process, never let go of: when the last one goes in another thread than the first came,
    OpenVINO unmaps the signal stack that it gave to the first (its plugin's set-up for AMX), and
    the next Ctrl-C there is a segmentation fault."""
    return ov.Core()


def session_options(model: Path) -> dict[str, str]:
    """Return the properties that the answers of a graph depend on; `open_session` sets them."""
    return {"INFERENCE_PRECISION_HINT": "f32"}


def open_session(model: Path, threads: int, optimization: str) -> Session:
    """Return a session. Raises `EdgeclipError` where OpenVINO does not do what is asked."""
    core = _core()
    asked = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        **session_options(model),
    }
    try:
        compiled = core.compile_model(_read(core, model), "CPU", asked)
    except Exception as e:  # RuntimeError with a page of text
        raise EdgeclipError(
            model,
            f"OpenVINO {ov.__version__} cannot load it ({' '.join(str(e).split())[:200]})",
            "export it again for this runtime version",
        ) from None
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    devices = compiled.get_property("EXECUTION_DEVICES")
    if devices != ["CPU"] or precision != "f32":
        raise EdgeclipError(
            model,
            f"runs on {devices} in {precision}, not on CPU in f32",
            "use a runtime that does what is asked",
        )
    used = compiled.get_property("INFERENCE_NUM_THREADS")
    if used != threads:
        raise EdgeclipError(
            model,
            f"runs on {used} thread(s), not on {threads}",
            "ask for no more than this process has cores",
        )
    request = compiled.create_infer_request()
    if len(compiled.inputs) != 1 or len(compiled.outputs) != 1:
        what = f"has {len(compiled.inputs)} inputs and {len(compiled.outputs)} outputs"
        raise EdgeclipError(model, f"{what}, not one each", "export it again")
    i = compiled.input(0)
    o = compiled.output(0)
    dtype = i.get_element_type().to_dtype()

    def run(x: np.ndarray) -> np.ndarray:
        # As infer({0: x})[o], without its dictionaries and its copies of both sides: a tenth of a
        # millisecond.
        pixels = np.require(
            x, dtype, ["C", "W"]
        )  # held until the answer is there: the tensor does not keep a copy alive
        try:
            request.set_input_tensor(ov.Tensor(pixels, shared_memory=True))
            request.infer(share_outputs=True)
        except Exception as e:  # as above
            what = f"OpenVINO {ov.__version__} cannot run it ({' '.join(str(e).split())[:300]})"
            raise EdgeclipError(model, what, "export it again") from None
        out: np.ndarray = (
            request.get_output_tensor().data.copy()
        )  # the request's buffer is used again
        return out

    version = ov.__version__.split("-")[0]
    facts = Ran(runtime="openvino", version=version, threads=used, providers=devices)
    return Session(run, _port(i), _port(o), facts)


def _read(core: ov.Core, model: Path) -> ov.Model:
    """Return a graph with the weights beside it: no file is looked for."""
    weights = model.with_suffix(".bin")
    if weights.is_file():
        return core.read_model(model, weights)
    return core.read_model(model)


def _port(port: ov.ConstOutput) -> Port:
    shape = [int(d.get_length()) if d.is_static else None for d in port.get_partial_shape()]
    return Port(port.get_any_name(), shape, np.dtype(port.get_element_type().to_dtype()).name)
