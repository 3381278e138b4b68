"""OpenVINO IR: float, or int8 through NNCF (`model_type: transformer` for ViT towers, none for convolutional ones)."""

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import onnx

from edgeclip.errors import EdgeclipError
from edgeclip.export import graph
from edgeclip.export.policy import Quantisation
from edgeclip.target import Target

PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")


def write(model: onnx.ModelProto, target: Target, quantisation: Quantisation | None, folder: Path) -> str:
    """Writes the image encoder into `folder`, returns its file name. `quantisation` is given for int8 targets."""
    ov_model = _convert(model if quantisation is None else quantisation.calibrated.model, folder)
    if target.precision == "int8":
        nncf = _nncf()
        from nncf.quantization.advanced_parameters import OverflowFix

        assert quantisation is not None
        form = quantisation.form
        with contextlib.redirect_stdout(sys.stderr):  # its progress bars: stdout is data
            ov_model = nncf.quantize(
                ov_model, nncf.Dataset([row[None] for row in quantisation.calibration]),
                model_type={"transformer": nncf.ModelType.TRANSFORMER, None: None}[form.model_type], subset_size=len(quantisation.calibration),
                preset=None if form.model_type else nncf.QuantizationPreset.PERFORMANCE, ignored_scope=_ignored(ov_model, quantisation, nncf),
                advanced_parameters=nncf.AdvancedQuantizationParameters(
                    smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1),  # ours has been done, and folds
                    activations_range_estimator_params=_ranges(form.method),
                    # NNCF's own choice gives 7 bits to the weights of the first layer alone
                    overflow_fix=OverflowFix.ENABLE if quantisation.reduce_range else None,
                ),
            )  # fmt: skip
    return _save(ov_model, folder / "image_encoder.xml", fp16=target.precision != "fp32")


def _ranges(method: str) -> Any:
    from nncf.quantization.range_estimator import AggregatorType, RangeEstimatorParameters, StatisticsCollectorParameters, StatisticsType

    if method not in ("minmax", "mean"):
        raise EdgeclipError(f"calibration.methods: {method}", "is no method for openvino", "use minmax or mean")
    over = AggregatorType.MEAN if method == "mean" else None
    return RangeEstimatorParameters(
        min=StatisticsCollectorParameters(StatisticsType.MIN, over or AggregatorType.MIN),
        max=StatisticsCollectorParameters(StatisticsType.MAX, over or AggregatorType.MAX),
    )


def _ignored(ov_model: Any, quantisation: Quantisation, nncf: Any) -> Any:
    """What stays in float: residual additions unless the form takes them, and the layers that the policy names, by OpenVINO's
    names, which end in the ONNX node's output name."""
    outputs = {n.output[0]: n.name for n in quantisation.calibrated.model.graph.node if n.name in quantisation.float_layers}
    found: dict[str, str] = {}
    for op in ov_model.get_ordered_ops():
        for name in (n for o in op.outputs() for n in o.get_names()):
            if name in outputs:
                # a bias is an addition of its own here: the product is the operation that feeds it
                while op.get_type_name() not in PRODUCTS:
                    op = op.input_value(0).get_node()
                found[outputs[name]] = op.get_friendly_name()
    if missing := quantisation.float_layers.keys() - found.keys():
        raise EdgeclipError("openvino", f"layers to keep in float were not found after conversion ({', '.join(sorted(missing))})", "report this")
    names = [*found.values(), *_after_last_product(ov_model)]
    # NNCF would put residual additions and pooling into int8 too. validate=False: a tower may have none.
    types = ["ReduceMean"] if quantisation.form.layers == "residual" else ["Add", "ReduceMean"]
    return nncf.IgnoredScope(names=names, types=types, validate=False)


def _after_last_product(ov_model: Any) -> list[str]:
    """Names of the operations between the last product and the output: the L2 norm, which must stay exact."""
    names, todo = [], [ov_model.get_results()[0].input_value(0).get_node()]
    while todo:
        op = todo.pop()
        if op.get_type_name() not in (*PRODUCTS, "Constant", "Parameter") and op.get_friendly_name() not in names:
            names.append(op.get_friendly_name())
            todo += [v.get_node() for v in op.input_values()]
    return names


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
