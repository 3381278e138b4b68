"""ONNX Runtime: the float graph, or static Q/DQ int8 with the policy of `graph.matrix_products`.

x86 with VNNI wants U8S8 (asymmetric uint8 activations, int8 weights per output channel); ARM wants S8S8. The text
encoder is quantised dynamically: its inputs are a handful of tokens, and its embedding table is most of its bytes.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx

from edgeclip.export import graph
from edgeclip.target import Target


def write(model: onnx.ModelProto, target: Target, calibration: np.ndarray | None, folder: Path) -> str:
    """Writes the image encoder into `folder`, returns its file name. calibration: float32 [n, 3, H, W] for int8."""
    path = folder / "image_encoder.onnx"
    if target.precision == "fp32":
        graph.save(model, path)
    elif target.precision == "int8":
        assert calibration is not None and target.calibration is not None
        graph.save(quantise(model, calibration, target.calibration.method, activations=target.activations or "uint8"), path)
    else:
        raise NotImplementedError(target.precision)
    return path.name


def write_text(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    path = folder / "text_encoder.onnx"
    if target.text == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as temporary:
            graph.save(model, Path(temporary) / "float.onnx")
            quantize_dynamic(
                Path(temporary) / "float.onnx", path, op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True, weight_type=QuantType.QInt8
            )
        graph.save(onnx.load(path), path)
    else:
        graph.save(model, path)
    return path.name


def quantise(model: onnx.ModelProto, calibration: np.ndarray, method: str, *, activations: str, float_bias: bool = False) -> onnx.ModelProto:
    """A static Q/DQ int8 copy of a float model: weights per channel and symmetric, activations per tensor.

    float_bias: leave biases in float, symmetric activations: what TensorRT accepts.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(calibration)
            self.name = model.graph.input[0].name

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {self.name: row[None]}

    methods = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy, "percentile": CalibrationMethod.Percentile}
    symmetric = activations == "int8"
    with tempfile.TemporaryDirectory() as temporary:
        plain, prepared, out = (Path(temporary) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        graph.save(model, plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        nodes = graph.matrix_products(onnx.load(prepared))
        quantize_static(
            prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, nodes_to_quantize=nodes,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=methods[method],
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not float_bias, "CalibMovingAverage": False},
        )  # fmt: skip
        return onnx.load(out)
