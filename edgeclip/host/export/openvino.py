"""OpenVINO IR: float, or int8 through NNCF.

`model_type: transformer` is for ViT towers, none for convolutional ones.
"""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgeclip.device.target import Target
from edgeclip.errors import EdgeclipError
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.policy import Quantization

PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")
BEFORE_TAIL = (*PRODUCTS, "Constant", "Parameter")


def write(
    model: onnx.ModelProto, target: Target, quantization: Quantization | None, folder: Path
) -> str:
    """Write the image encoder into `folder`; return its file name.

    quantization: the map of an int8 target.
    """
    if quantization is None:
        ov_model = _convert(model, folder)
    else:
        ov_model = _quantize(_convert(quantization.calibrated.model, folder), quantization)
    return _save(ov_model, folder / "image_encoder.xml", fp16=target.precision != "fp32")


def _quantize(ov_model: Any, quantization: Quantization) -> Any:
    """Return the model in int8, without NNCF's own smoothing: ours has been done, and folds."""
    nncf = _nncf()
    from nncf.quantization.advanced_parameters import OverflowFix

    candidate = quantization.candidate
    model_type = None
    preset = nncf.QuantizationPreset.PERFORMANCE
    if candidate.model_type == "transformer":
        model_type = nncf.ModelType.TRANSFORMER
        preset = None
    images: list[np.ndarray] = [row[None] for row in quantization.calibration]
    # NNCF's own choice gives 7 bits to the weights of the first layer alone.
    overflow_fix = OverflowFix.DISABLE
    if quantization.reduce_range:
        overflow_fix = OverflowFix.ENABLE
    advanced = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1),
        activations_range_estimator_params=_ranges(candidate.method),
        overflow_fix=overflow_fix,
    )
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars: stdout is data
        return nncf.quantize(
            ov_model,
            nncf.Dataset(images),
            model_type=model_type,
            subset_size=len(images),
            preset=preset,
            ignored_scope=_ignored(ov_model, quantization, nncf),
            advanced_parameters=advanced,
        )


def _ranges(method: str) -> Any:
    """NNCF's way to take ranges: of all images, or the mean of each image's."""
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    if method == "minmax":
        lowest = AggregatorType.MIN
        highest = AggregatorType.MAX
    elif method == "mean":
        lowest = highest = AggregatorType.MEAN
    else:
        raise EdgeclipError(
            f"calibration.methods: {method}", "openvino has no such method", "use minmax or mean"
        )
    return RangeEstimatorParameters(
        min=StatisticsCollectorParameters(StatisticsType.MIN, lowest),
        max=StatisticsCollectorParameters(StatisticsType.MAX, highest),
    )


def _ignored(ov_model: Any, quantization: Quantization, nncf: Any) -> Any:
    """Return what stays in float: the policy's layers, the L2 norm, and most additions."""
    names = [*_float_products(ov_model, quantization).values(), *_after_last_product(ov_model)]
    # NNCF would put residual additions and pooling into int8 too.
    types = ["Add", "ReduceMean"]
    if quantization.candidate.layers == "residual":
        types = ["ReduceMean"]
    # validate=False: a tower may have none of a type.
    return nncf.IgnoredScope(names=names, types=types, validate=False)


def _float_products(ov_model: Any, quantization: Quantization) -> dict[str, str]:
    """Each layer that stays in float to its operation's name here.

    A tensor has the name of the ONNX node's output. A bias is an addition of its own in OpenVINO:
    the product is the operation that feeds it.
    """
    layers = {}
    for node in quantization.calibrated.model.graph.node:
        if node.name in quantization.float_layers:
            layers[node.output[0]] = node.name
    found: dict[str, str] = {}
    for op in ov_model.get_ordered_ops():
        for name in _tensor_names(op):
            if name in layers:
                found[layers[name]] = _product_before(op).get_friendly_name()
    missing = quantization.float_layers.keys() - found.keys()
    if missing:
        raise EdgeclipError(
            "openvino",
            f"the converted graph lacks layers to keep in float ({', '.join(sorted(missing))})",
            "report this",
        )
    return found


def _tensor_names(op: Any) -> list[str]:
    names: list[str] = []
    for output in op.outputs():
        names += output.get_names()
    return names


def _product_before(op: Any) -> Any:
    while op.get_type_name() not in PRODUCTS:
        op = op.input_value(0).get_node()
    return op


def _after_last_product(ov_model: Any) -> list[str]:
    """Names of the operations between the last product and the output: the L2 norm, kept exact."""
    names: list[str] = []
    todo = [ov_model.get_results()[0].input_value(0).get_node()]
    while todo:
        op = todo.pop()
        name = op.get_friendly_name()
        if op.get_type_name() in BEFORE_TAIL or name in names:
            continue
        names.append(name)
        todo += [value.get_node() for value in op.input_values()]
    return names


def write_text(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    """Write the text encoder into `folder`; return its file name."""
    ov_model = _convert(model, folder)
    if target.text == "int8":
        nncf = _nncf()
        ov_model = nncf.compress_weights(ov_model, mode=nncf.CompressWeightsMode.INT8_SYM)
    return _save(ov_model, folder / "text_encoder.xml", fp16=target.text != "fp32")


def _convert(model: onnx.ModelProto, folder: Path) -> Any:
    try:
        import openvino as ov
    except ImportError:
        raise EdgeclipError(
            "openvino", "is not installed", "pip install 'edgeclip[openvino]'"
        ) from None
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
        raise EdgeclipError(
            "nncf", "is not installed", "pip install 'edgeclip[openvino]'"
        ) from None
    nncf.set_log_level(logging.ERROR)
    return nncf


def _save(ov_model: Any, path: Path, fp16: bool) -> str:
    import openvino as ov

    ov.save_model(ov_model, path, compress_to_fp16=fp16)
    return path.name
