"""Quantization-aware distillation: the student learns on with exactly the rounding that its int8 target will do.

After stage 2 the student is folded, and the target's policy says which layers become int8 and with which ranges. Each of
them then rounds in training as the exported graph does: its input, and for ONNX Runtime most convolutions' outputs, per
tensor with a scale that is learned (Esser et al. 2020, LSQ); its weights per output channel. The losses, the cached
teacher and the views are stage 2's own, so an epoch costs little more than one of stage 2. The learned scales are what
`export` writes; nothing is calibrated again.
`graph.learned` has their files and reads them.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from msgspec.structs import replace
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgeclip import disk
from edgeclip.device import target as T
from edgeclip.device.images import read
from edgeclip.device.preprocess import Preprocess, normalize, open_image, to_pixels
from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.host import recipe as R
from edgeclip.host.cache import TeacherCache
from edgeclip.host.graph import learned, policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.policy import Candidate, Quantization
from edgeclip.host.graph.qdq import calibrate, rounded_outputs
from edgeclip.host.towers.fold import fold

SMALLEST = 1e-6


class FakeQuantize(nn.Module):
    """Per tensor, with a learned scale; the zero point is calibration's. Its gradient passes through the rounding."""

    def __init__(self, low: float, high: float, symmetric: bool):
        super().__init__()
        low, high = min(low, 0.0), max(high, 0.0)
        self.bottom, self.top = (-128, 127) if symmetric else (0, 255)
        scale = max(max(-low, high) / 127 if symmetric else (high - low) / 255, SMALLEST)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.zero_point = 0 if symmetric else round(-low / scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        q = x / scale
        q = (q + (q.round() - q).detach() + self.zero_point).clamp(self.bottom, self.top)
        return (q - self.zero_point) * scale

    def range(self) -> tuple[float, float]:
        """What ONNX Runtime's quantizer makes the same scale and zero point of: it spreads a symmetric range over 254 steps."""
        scale = self.log_scale.exp().item()
        if self.bottom:
            return -127 * scale, 127 * scale
        return -self.zero_point * scale, (255 - self.zero_point) * scale


class FakeQuantizeWeight(nn.Module):
    """Symmetric, a scale for each output channel from its largest weight."""

    def __init__(self, top: int):
        super().__init__()
        self.top = top

    def forward(self, weight: Tensor) -> Tensor:
        scale = (
            (weight.detach().flatten(1).abs().amax(dim=1) / self.top)
            .clamp(min=SMALLEST)
            .view(-1, *[1] * (weight.ndim - 1))
        )
        q = weight / scale
        return (q + (q.round() - q).detach()) * scale


def module_name(node: str) -> str:
    """The module that the exporter named a node after: '/tower/blocks/blocks.1/blocks.1.0/conv/Conv' to 'tower.blocks.1.0.conv'."""
    parts = node.strip("/").split("/")[:-1]
    return ".".join(
        p
        for i, p in enumerate(parts)
        if i + 1 == len(parts) or not parts[i + 1].startswith(p + ".")
    )


def traced_modules(folded: nn.Module) -> dict[str, nn.Module]:
    """Every module by the name that a tracer gives it; timm's FeatureGetterNet (a stem) runs its model's layers without calling the model."""
    return {
        name.replace(".backbone.model.", ".backbone."): module
        for name, module in folded.named_modules()
    }


def attach(
    folded: nn.Module, quantization: Quantization, target: T.Target
) -> dict[str, FakeQuantize]:
    """Makes the mapped layers of a folded student round; returns each quantized tensor's rounding.

    Raises `EdgeclipError` for a layer that is no module of its own (the packed projection of torch's MultiheadAttention).
    """
    modules = traced_modules(folded)
    found, ranges = dict[str, FakeQuantize](), quantization.calibrated.ranges
    symmetric = target.runtime == "tensorrt"

    def rounding(tensor: str) -> FakeQuantize:
        if tensor not in found:
            low, high = ranges[tensor].range_value
            found[tensor] = FakeQuantize(np.asarray(low).item(), np.asarray(high).item(), symmetric)
        return found[tensor]

    outputs = (
        rounded_outputs(quantization.calibrated.model, quantization.nodes)
        if target.runtime == "onnxruntime"
        else set()
    )
    for node in (
        n for n in quantization.calibrated.model.graph.node if n.name in set(quantization.nodes)
    ):
        module = modules.get(module_name(node.name))
        if not isinstance(module, nn.Conv2d | nn.Linear):
            raise EdgeclipError(
                f"qat.target: {node.name}",
                "is no Conv2d or Linear of the student's own",
                "use a tower of separate layers, or leave it out",
            )
        parametrize.register_parametrization(
            module, "weight", FakeQuantizeWeight(64 if quantization.reduce_range else 127)
        )
        module.input_rounding = rounding(node.input[0])
        module.register_forward_pre_hook(lambda m, x: (m.input_rounding(x[0]), *x[1:]))
        if node.name in outputs:
            module.output_rounding = rounding(node.output[0])
            module.register_forward_hook(lambda m, _, y: m.output_rounding(y))
    return found


def fine_tune(
    student: nn.Module,
    images: np.ndarray,
    path: str,
    folder: Path,
    train: Callable[[nn.Module], list[dict[str, Any]]],
    parents: dict[str, Any],
) -> list[dict[str, Any]]:
    """Fine-tunes a folded copy of `student` for the target at `path` and writes `folder`; returns the log.

    images: float32 [n, 3, H, W], training images that give the first ranges. train: trains a student in place.
    """
    name, target = T.load(path)
    check(name, target, len(images))
    assert target.calibration is not None
    folded, model = _traced(student.cpu(), torch.from_numpy(images[:1]), target)
    candidate = Candidate(target.calibration.methods[0], None, "all", None)
    chosen = policy.choose(
        model,
        images,
        candidate,
        None,
        target.calibration,
        policy.reduced_range(target),
        own_bias=False,
    )
    assert chosen is not None
    roundings = attach(folded, chosen, target)
    log = train(folded)
    folded.cpu()
    if distributed.rank():
        return log
    modules = dict(folded.named_modules())
    for module in modules.values():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    state = {
        k: v.detach().contiguous() for k, v in folded.state_dict().items() if "_rounding." not in k
    }
    with disk.new_folder(folder) as temporary:
        save_file(state, temporary / learned.WEIGHTS)
        record = learned.LearnedScales(
            target=learned.rounding_of(target),
            candidate=candidate._asdict(),
            nodes=chosen.nodes,
            float_layers=chosen.float_layers,
            ranges={tensor: r.range() for tensor, r in roundings.items()},
            log=log,
            reduce_range=chosen.reduce_range,
        )
        disk.write_json(temporary / learned.RECORD, msgspec.to_builtins(record))
        disk.write_manifest(temporary, "quantized student", {"parents": parents})
    return log


def _traced(student: nn.Module, x: Tensor, target: T.Target) -> tuple[nn.Module, onnx.ModelProto]:
    """A folded copy that can be trained, and its float graph."""
    folded = fold(student, x).requires_grad_(True)
    return folded, graph.to_onnx(folded, x, "pixels", "image_features", target.opset)


def check_student(student: nn.Module, size: int, path: str) -> None:
    """Raises, as `attach`, before hours of training have gone into a student that cannot round."""
    target = T.load(path)[1]
    x = torch.zeros(1, 3, size, size)
    folded, model = _traced(student, x, target)
    every_layer = policy.of_layers(
        Candidate("minmax", None, "all", None),
        x.numpy(),
        calibrate(model, x.numpy(), "minmax"),
        {},
        policy.reduced_range(target),
    )
    attach(folded, every_layer, target)


def after_stage_2(
    asked: R.Recipe,
    cached: TeacherCache,
    student: nn.Module,
    head: nn.Module | None,
    preprocess: Preprocess,
    folder: Path,
    parents: dict[str, Any],
    train: Callable[[nn.Module, nn.Module | None, R.Recipe], list[dict[str, Any]]],
) -> None:
    """Stage 2 once more, on a rounding copy of the student: what `qat` asks for. train: stage 2's own loop."""
    assert asked.qat is not None
    target = T.load(asked.qat.target)[1]
    assert target.calibration is not None
    order = np.random.default_rng(target.calibration.seed).permutation(len(cached.images))[
        : target.calibration.images
    ]
    chosen = [cached.images[i] for i in order.tolist()]  # of those that were readable
    images = [to_pixels(open_image(read(p), p.key), preprocess) for p in chosen]
    again = replace(
        asked.train,
        warmup_steps=0,
        pretrain=None,
        epochs=asked.qat.epochs,
        lr=asked.qat.lr,
        tower_lr_ratio=1.0,
        freeze_batch_norm=False,
    )
    recipe = replace(
        asked, train=again, student=replace(asked.student, text=None, visual_prompts=None)
    )
    fine_tune(
        student,
        normalize(np.stack(images), preprocess),
        asked.qat.target,
        folder,
        lambda m: train(m, copy.deepcopy(head), recipe),
        parents,
    )


def check(name: str, target: T.Target, images: int) -> None:
    """Raises where `target` takes no learned scales, or asks for more training images than there are."""
    if target.precision != "int8" or target.runtime == "openvino":
        raise EdgeclipError(
            f"qat.target: {name}",
            "takes no learned scales",
            "name an int8 target of onnxruntime or tensorrt",
        )
    assert target.calibration is not None
    if images < target.calibration.images:
        asks = f"asks for {target.calibration.images} training images, and there are {images}"
        raise EdgeclipError(
            f"qat.target: {name}",
            asks,
            "give more, or lower calibration.images in a target of your own",
        )
