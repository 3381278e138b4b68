"""A target: how a student is exported, and how much it may lose on the way. `export/*.yaml` are read into this."""

from typing import Annotated, Literal

from msgspec import Meta

from edgeclip import config
from edgeclip.config import Config
from edgeclip.errors import EdgeclipError

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]


PRECISIONS = {"onnxruntime": ("fp32", "fp16", "int8"), "openvino": ("fp32", "fp16", "int8"), "tensorrt": ("fp16", "int8", "fp8")}
TEXT_PRECISIONS = {"onnxruntime": ("fp32", "fp16", "int8"), "openvino": ("fp32", "fp16", "int8"), "tensorrt": ("fp16",)}


class Calibration(Config):
    """Pictures that give the ranges, and the candidates that are tried on this machine: of those that hold the tolerance the fastest ships."""

    pictures: Annotated[int, Meta(ge=8)] = 256
    """from the training part only, picked by `seed`"""
    seed: int = 0
    judged_on: Annotated[int, Meta(ge=0)] = 128
    """so many further training pictures, none of which gave ranges, are what candidates are judged on; 0: the pictures of the ranges"""
    judged_cosine_p1: Fraction = 0.0
    """what the search asks of the centred cosine on those pictures where it is more than the tolerance: pictures that training has
    seen are answered with a wider lead than new ones, so their answers survive a rounding that costs new ones theirs"""
    methods: tuple[Literal["minmax", "mean", "percentile", "entropy"], ...] = ("minmax", "mean")
    """how ranges are taken: over everything; the mean of each picture's; a histogram's 99.999 %; by least entropy loss"""
    smoothing: tuple[Fraction | None, ...] = (None, 0.5)
    """SmoothQuant's alpha, how far outlier channels behind a LayerNorm are moved into the weights; null: not at all"""
    layers: tuple[Literal["all", "dense", "residual"], ...] = ("all",)
    """all: what the policy allows; dense: depthwise convolutions stay in float; residual, openvino only: all, and the residual
    additions too, which it computes with the convolution before them"""
    model_types: tuple[Literal["transformer"] | None, ...] = (None,)
    """openvino only: NNCF's pattern sets; transformer suits ViT towers, null convolutional ones"""
    probe_layers: Annotated[int, Meta(ge=0)] = 12
    """so many first and last layers are quantised alone to see what each costs"""
    layer_cosine: Fraction = 0.998
    """a probed layer that alone leaves less centred cosine than this stays in float"""
    min_int8_share: Fraction = 0.7
    """of the multiply-accumulates; with less an int8 target is refused"""
    min_speedup: Annotated[float, Meta(ge=0.0)] = 1.0
    """over float32 in the same runtime, where it is measured; with less an int8 target is refused"""


class Tolerance(Config, kw_only=True):
    """Limits on error, each against the fp32 torch student on the same pictures."""

    centred_cosine_p1: Fraction
    """first percentile of the cosine after the mean feature is taken away"""
    top1_agreement: Fraction
    """share of pictures with the same first answer"""
    agreement_where_right: Fraction | None = None
    """the same over the pictures that the student answers rightly, which needs labels; null: not asked for"""
    accuracy_drop_pp: Annotated[float, Meta(ge=0.0)]
    """margin in percentage points; the one-sided 95 % limit of the paired drop must lie below it"""
    optimisation_agreement: Fraction | None = None
    """ONNX Runtime only: top-1 agreement of the graph optimisations BASIC and ALL; null: not compared"""


class Target(Config, kw_only=True):
    runtime: Literal["onnxruntime", "openvino", "tensorrt"]
    precision: Literal["fp32", "fp16", "int8", "fp8"]
    opset: Annotated[int, Meta(ge=17, le=20)] = 18
    """of the ONNX graph; TensorRT 10.3 (JetPack 6) stops at 20"""
    tolerance: Tolerance
    calibration: Calibration | None = None
    """int8 and fp8 only"""
    activations: Literal["uint8", "int8"] | None = None
    """int8 on onnxruntime: uint8 is the fast form on x86 with VNNI, int8 that of ARM"""
    reduce_range: Literal["never", "always", "as_host"] | None = None
    """uint8 activations, and int8 on openvino: 7-bit weights, because an x86 without VNNI adds pairs of 8-bit products in 16 bits,
    which saturates; as_host: by the instruction set of the machine that exports, which the bundle records; openvino: null is never"""
    text: Literal["fp32", "fp16", "int8"] = "int8"
    """weights of the text encoder, whose embedding table is most of its bytes"""


def load(name: str) -> tuple[str, Target]:
    """(name, target) for a bare name or a path; raises `EdgeclipError` with a did-you-mean."""
    path = config.find("target", name)
    target = config.load(path, Target)
    if (target.precision in ("int8", "fp8")) != (target.calibration is not None):
        raise EdgeclipError(f"{path}: calibration", "belongs to precision int8 and fp8, and only to them", "add or remove it")
    if target.runtime == "onnxruntime" and target.precision == "int8" and target.activations is None:
        raise EdgeclipError(f"{path}: activations", "is missing", "say uint8 (x86) or int8 (ARM)")
    if target.calibration is not None:
        if field := next(
            (f for f in ("methods", "smoothing", "layers", "model_types") if not (v := getattr(target.calibration, f)) or len(set(v)) < len(v)), None
        ):
            raise EdgeclipError(f"{path}: calibration.{field}", "is empty or names something twice", "give each candidate once")
        if target.runtime != "openvino" and target.calibration.model_types != (None,):
            raise EdgeclipError(f"{path}: calibration.model_types", "belongs to openvino", "remove it")
        if target.runtime != "openvino" and "residual" in target.calibration.layers:
            raise EdgeclipError(f"{path}: calibration.layers", "residual belongs to openvino", "remove it")
    on_openvino = target.runtime == "openvino" and target.precision == "int8"
    if (target.activations == "uint8") != (target.reduce_range is not None) and not on_openvino:
        what = "belongs to activations: uint8 and to int8 on openvino, and only to them"
        raise EdgeclipError(f"{path}: reduce_range", what, "say never, always or as_host, or remove it")
    if target.tolerance.optimisation_agreement is not None and target.runtime != "onnxruntime":
        raise EdgeclipError(f"{path}: tolerance.optimisation_agreement", "belongs to onnxruntime: elsewhere there is no BASIC and ALL", "remove it")
    if target.runtime == "tensorrt" and target.calibration and target.opset < 19:
        raise EdgeclipError(f"{path}: opset", f"opset {target.opset} has neither fp8 nor Q/DQ with float16 scales", "use opset 19 or 20")
    for field, allowed in (("precision", PRECISIONS), ("text", TEXT_PRECISIONS)):
        asked = getattr(target, field)
        if asked not in allowed[target.runtime]:
            raise EdgeclipError(
                f"{path}: {field}", f"{target.runtime} bundles have no {field} {asked} here", f"use one of: {', '.join(allowed[target.runtime])}"
            )
    return path.stem, target
