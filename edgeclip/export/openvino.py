"""OpenVINO IR: float, or int8 through NNCF (`model_type: transformer` for ViT towers, none for convolutional ones)."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeclip.errors import EdgeclipError
from edgeclip.export import graph
from edgeclip.target import Target


def write(model: onnx.ModelProto, target: Target, calibration: np.ndarray | None, folder: Path) -> str:
    """Writes the image encoder into `folder`, returns its file name. calibration: float32 [n, 3, H, W] for int8."""
    ov_model = _convert(model, folder)
    if target.precision == "int8":
        nncf = _nncf()
        assert calibration is not None and target.calibration is not None
        types = {"transformer": nncf.ModelType.TRANSFORMER, None: None}
        ov_model = nncf.quantize(
            ov_model, nncf.Dataset([row[None] for row in calibration]), model_type=types[target.model_type],
            subset_size=len(calibration), preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip
    return _save(ov_model, folder / "image_encoder.xml", fp16=target.precision != "fp32")


def write_text(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    ov_model = _convert(model, folder)
    if target.text == "int8":
        nncf = _nncf()
        ov_model = nncf.compress_weights(ov_model, mode=nncf.CompressWeightsMode.INT8_SYM)
    return _save(ov_model, folder / "text_encoder.xml", fp16=target.text != "fp32")


def _convert(model: onnx.ModelProto, folder: Path) -> Any:
    try:
        import openvino as ov
    except ImportError:
        raise EdgeclipError("openvino", "is not installed", "pip install 'edgeclip[openvino]'") from None
    path = folder / ".float.onnx"
    try:
        graph.save(model, path)
        return ov.convert_model(path)
    finally:
        path.unlink(missing_ok=True)


def _nncf() -> Any:
    try:
        import nncf
    except ImportError:
        raise EdgeclipError("nncf", "is not installed", "pip install 'edgeclip[openvino]'") from None
    nncf.set_log_level(logging.ERROR)
    return nncf


def _save(ov_model: Any, path: Path, fp16: bool) -> str:
    import openvino as ov

    ov.save_model(ov_model, path, compress_to_fp16=fp16)
    return path.name
