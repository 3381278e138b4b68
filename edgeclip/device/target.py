"""A target: how a student is exported, and how much it may lose on the way.

`export/*.yaml` are read into this; `edgeclip list targets` names them.
"""

from typing import Annotated, Literal

from msgspec import Meta

from edgeclip import config
from edgeclip.config import BrokenRule, Config
from edgeclip.device.bounds import Word

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Cosine = Annotated[float, Meta(ge=-1.0, le=1.0)]
Drop = Annotated[float, Meta(ge=0.0, le=100.0)]
"""in percentage points"""
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "int8"),
    "tensorrt": ("fp16", "int8", "fp8"),
}
TEXT_PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "int8"),
    "tensorrt": ("fp16",),
}


CANDIDATES = ("methods", "smoothing", "layers", "model_types")
"""fields of a calibration of which every combination is tried"""


class Calibration(Config):
    """Images that give the ranges, and the candidates that are tried on this machine.

    Of those that hold the tolerance the fastest ships.
    """

    images: Annotated[int, Meta(ge=8, le=10**6)] = 256
    """from the training part only, picked by `seed`"""
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    judged_on: Annotated[int, Meta(ge=0, le=10**6)] = 128
    """so many further training images, none of which gave ranges, are what candidates are judged
    on; 0: the images of the ranges"""
    judged_cosine_p1: Cosine = 0.0
    """what the search asks of the centered cosine on those images where it is more than the
    tolerance: images that training has seen are answered with a wider lead than new ones, so their
    answers survive a rounding that costs new ones theirs"""
    methods: tuple[Literal["minmax", "mean", "percentile", "entropy"], ...] = ("minmax", "mean")
    """how ranges are taken: over everything; the mean of each image's; a histogram's 99.999 %; by
    least entropy loss"""
    smoothing: tuple[Fraction | None, ...] = (None, 0.5)
    """SmoothQuant's alpha, how far outlier channels behind a LayerNorm are moved into the weights;
    null: not at all"""
    layers: tuple[Literal["all", "dense", "residual"], ...] = ("all",)
    """all: what the policy allows; dense: depthwise convolutions stay in float; residual, openvino
    only: all, and the residual additions too, which it computes with the convolution before them"""
    model_types: tuple[Literal["transformer"] | None, ...] = (None,)
    """openvino only: NNCF's pattern sets; transformer suits ViT towers, null convolutional ones"""
    reconstruction: Annotated[int, Meta(ge=0, le=10**6)] = 100
    """steps in which each block of the most exact candidate learns its rounding, scales and biases,
    half a minute to some minutes; 0: none"""
    probe_layers: Annotated[int, Meta(ge=0, le=10**6)] = 12
    """so many first and last layers are quantized alone to see what each costs"""
    layer_cosine: Fraction = 0.998
    """a probed layer that alone leaves less centered cosine than this stays in float"""
    min_int8_share: Fraction = 0.7
    """of the multiply-accumulates; with less an int8 target is refused"""
    min_speedup: Annotated[float, Meta(ge=0.0, le=1e6)] = 1.0
    """over float32 in the same runtime, where it is measured; with less an int8 target is
    refused"""

    def __post_init__(self) -> None:
        for field in CANDIDATES:
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise BrokenRule(
                    field, "is empty or names something twice", "give each candidate once"
                )


class Tolerance(Config, kw_only=True):
    """Limits on error, each against the fp32 torch student on the same images."""

    centered_cosine_p1: Cosine
    """first percentile of the cosine after the mean feature is taken away"""
    top1_agreement: Fraction
    """share of images with the same first answer"""
    agreement_where_right: Fraction | None = None
    """the same over the images that the student answers rightly, which needs labels; null: not
    asked for"""
    accuracy_drop_pp: Drop
    """margin in percentage points over all images that took no part in training; the one-sided 95 %
    limit of the paired drop must lie below it"""
    worst_set_drop_pp: Drop | None = None
    """the same for the evaluation set that loses most, at a level that all of them together keep;
    null: not asked for"""
    optimization_agreement: Fraction | None = None
    """ONNX Runtime only: top-1 agreement of the graph optimizations BASIC and ALL; null: not
    compared"""


class Floor(Config):
    """What a bundle must reach by itself on unseen images, over all its labels; null: not asked."""

    top1: Fraction | None = None
    worst_class_top1: Fraction | None = None
    """of the class that is worst off, at a level that all classes together keep"""


class Target(Config, kw_only=True):
    runtime: Literal["onnxruntime", "openvino", "tensorrt"]
    precision: Literal["fp32", "fp16", "int8", "fp8"]
    opset: Annotated[int, Meta(ge=17, le=20)] = 18
    """of the ONNX graph; TensorRT 10.3 (JetPack 6) stops at 20"""
    tolerance: Tolerance
    floor: Floor = Floor()
    """a recipe's `floor` counts where this is empty"""
    calibration: Calibration | None = None
    """int8 and fp8 only"""
    activations: Literal["uint8", "int8"] | None = None
    """int8 on onnxruntime: uint8 is the fast form on x86 with VNNI, int8 that of ARM"""
    reduce_range: Literal["never", "always", "as_host"] | None = None
    """uint8 activations, and int8 on openvino: 7-bit weights, because an x86 without VNNI adds
    pairs of 8-bit products in 16 bits, which saturates; as_host: by the instruction set of the
    machine that exports, which the bundle records; null on openvino: never"""
    text: Literal["fp32", "fp16", "int8"] = "int8"
    """weights of the text encoder, whose embedding table is most of its bytes"""

    def __post_init__(self) -> None:
        quantized = self.precision in ("int8", "fp8")
        if quantized != (self.calibration is not None):
            raise BrokenRule(
                "calibration",
                "belongs to precision int8 and fp8, and only to them",
                "add or remove it",
            )
        if self.runtime == "onnxruntime" and self.precision == "int8" and not self.activations:
            raise BrokenRule("activations", "is missing", "say uint8 (x86) or int8 (ARM)")
        if self.calibration is not None:
            self._check_calibration(self.calibration)
        on_openvino = self.runtime == "openvino" and self.precision == "int8"
        if not on_openvino and (self.activations == "uint8") != (self.reduce_range is not None):
            raise BrokenRule(
                "reduce_range",
                "belongs to activations: uint8 and to int8 on openvino, and only to them",
                "say never, always or as_host, or remove it",
            )
        if self.tolerance.optimization_agreement is not None and self.runtime != "onnxruntime":
            raise BrokenRule(
                "tolerance.optimization_agreement",
                "belongs to onnxruntime: elsewhere there is no BASIC and ALL",
                "remove it",
            )
        self._check_runtime_has("precision", self.precision, PRECISIONS)
        self._check_runtime_has("text", self.text, TEXT_PRECISIONS)

    def _check_calibration(self, calibration: Calibration) -> None:
        if self.runtime != "openvino" and calibration.model_types != (None,):
            raise BrokenRule("calibration.model_types", "belongs to openvino", "remove it")
        if self.runtime != "openvino" and "residual" in calibration.layers:
            raise BrokenRule("calibration.layers", "residual belongs to openvino", "remove it")
        if self.runtime == "tensorrt" and self.opset < 19:
            raise BrokenRule(
                "opset",
                f"opset {self.opset} has neither fp8 nor Q/DQ with float16 scales",
                "use opset 19 or 20",
            )

    def _check_runtime_has(
        self, field: str, value: str, allowed: dict[str, tuple[str, ...]]
    ) -> None:
        known = allowed[self.runtime]
        if value not in known:
            what = f"{self.runtime} bundles have no {field} {value} here"
            raise BrokenRule(field, what, f"use one of: {', '.join(known)}")


class NamedTarget(Target, kw_only=True):
    """A target as a bundle's manifest names it."""

    name: Word
    """of the target's YAML"""


def load(name: str) -> tuple[str, Target]:
    """Return (name, target) for a bare name or a path.

    Raises `EdgeclipError` with the field and the rule, or with a did-you-mean for the name.
    """
    path = config.find("target", name)
    return path.stem, config.load(path, Target)
