"""Quantization-aware distillation: the student learns on with the rounding of its int8 target.

After stage 2 the student is folded, and the target's policy says which layers become int8 and with
which ranges. Each of them then rounds in training as the exported graph does: its input, and for
ONNX Runtime most convolutions' outputs, per tensor with a scale that is learned (LSQ, Esser et al.
2020); its weights per output channel. The losses, the cached teacher and the views are stage 2's
own, so an epoch costs little more than one of stage 2. The learned scales are what `export` writes;
nothing is calibrated again. `graph.learned` has their files and reads them.
"""

import copy
from collections.abc import Callable
from pathlib import Path

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
from edgeclip.device.images import load_pixels
from edgeclip.device.manifest import Parents
from edgeclip.device.preprocess import Preprocess, normalize
from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.host.cache import TeacherCache
from edgeclip.host.distill.log import Log
from edgeclip.host.distill.training import Learner
from edgeclip.host.graph import learned, policy
from edgeclip.host.graph import trace as graph
from edgeclip.host.graph.fake_quantize import SMALLEST, FakeQuantize
from edgeclip.host.graph.policy import Candidate, Quantization
from edgeclip.host.graph.qdq import calibrate, rounded_outputs
from edgeclip.host.recipe import Recipe
from edgeclip.host.towers import weights
from edgeclip.host.towers.fold import fold

TOP = 127
"""largest integer of a weight"""
TOP_7_BITS = 64
"""the same where the target's processor needs weights of 7 bits"""


class FakeQuantizeWeight(nn.Module):
    """Round weights symmetrically, with a scale for each output channel from its largest weight."""

    def __init__(self, top: int) -> None:
        """top: the largest integer."""
        super().__init__()
        self.top = top

    def forward(self, weight: Tensor) -> Tensor:
        largest = weight.detach().flatten(1).abs().amax(dim=1)
        scale = (largest / self.top).clamp(min=SMALLEST)
        scale = scale.view(-1, *[1] * (weight.ndim - 1))
        q = weight / scale
        return (q + (q.round() - q).detach()) * scale


def module_name(node: str) -> str:
    """Return the name of the module that the exporter named a node after.

    '/tower/blocks/blocks.1/blocks.1.0/conv/Conv' is of 'tower.blocks.1.0.conv'.
    """
    parts = node.strip("/").split("/")[:-1]
    names = []
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        if last or not parts[i + 1].startswith(part + "."):
            names.append(part)
    return ".".join(names)


def traced_modules(folded: nn.Module) -> dict[str, nn.Module]:
    """Return every module by the name that a tracer gives it.

    timm's FeatureGetterNet (a stem) runs its model's layers without calling the model.
    """
    modules = {}
    for name, module in folded.named_modules():
        modules[name.replace(".backbone.model.", ".backbone.")] = module
    return modules


def attach(
    folded: nn.Module, quantization: Quantization, target: T.Target
) -> dict[str, FakeQuantize]:
    """Make the mapped layers of a folded student round; return each quantized tensor's rounding.

    Raises `EdgeclipError` for a layer that is no module of its own (the packed projection of
    torch's MultiheadAttention).
    """
    modules = traced_modules(folded)
    ranges = quantization.calibrated.ranges
    model = quantization.calibrated.model
    symmetric = target.runtime == "tensorrt"
    found: dict[str, FakeQuantize] = {}

    def rounding(tensor: str) -> FakeQuantize:
        if tensor not in found:
            low, high = ranges[tensor].range_value
            found[tensor] = FakeQuantize(np.asarray(low).item(), np.asarray(high).item(), symmetric)
        return found[tensor]

    outputs: set[str] = set()
    if target.runtime == "onnxruntime":
        outputs = rounded_outputs(model, quantization.nodes)
    top = TOP
    if quantization.reduce_range:
        top = TOP_7_BITS
    for node in model.graph.node:
        if node.name not in quantization.nodes:
            continue
        module = modules.get(module_name(node.name))
        if not isinstance(module, nn.Conv2d | nn.Linear):
            raise EdgeclipError(
                f"qat.target: {node.name}",
                "is no Conv2d or Linear of the student's own",
                "use a tower of separate layers, or remove qat",
            )
        parametrize.register_parametrization(module, "weight", FakeQuantizeWeight(top))
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
    train: Callable[[nn.Module], Log],
    parents: Parents,
) -> Log:
    """Fine-tune a folded copy of `student` for the target at `path`; write it and return the log.

    images: float32 [n, 3, H, W], training images that give the first ranges. train: trains a
    student in place.
    """
    name, target = T.load(path)
    check(name, target, len(images))
    assert target.calibration is not None
    folded, model = _traced(student.cpu(), torch.from_numpy(images[:1]), target)
    candidate = Candidate(target.calibration.methods[0], None, "all", None)
    reduce_range = policy.reduced_range(target)
    chosen = policy.choose(
        model, images, candidate, None, target.calibration, reduce_range, own_bias=False
    )
    assert chosen is not None
    roundings = attach(folded, chosen, target)
    log = train(folded)
    folded.cpu()
    if distributed.rank():
        return log

    for module in list(folded.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    state = {}
    for key, value in folded.state_dict().items():
        if "_rounding." not in key:
            state[key] = value.detach().contiguous()
    again = "train it again with a lower learning rate"
    weights.refuse_broken(state, "the student that learned with rounding", again)
    record = learned.LearnedScales(
        target=learned.rounding_of(target),
        candidate=candidate._asdict(),
        nodes=chosen.nodes,
        float_layers=chosen.float_layers,
        ranges={tensor: r.range() for tensor, r in roundings.items()},
        log=log,
        reduce_range=chosen.reduce_range,
    )
    with disk.new_folder(folder) as temporary:
        save_file(state, temporary / learned.WEIGHTS)
        disk.write_json(temporary / learned.RECORD, msgspec.to_builtins(record))
        disk.write_manifest(temporary, "quantized student", {"parents": parents})
    return log


def _traced(student: nn.Module, x: Tensor, target: T.Target) -> tuple[nn.Module, onnx.ModelProto]:
    """Return a folded copy that can be trained, and its float graph."""
    folded = fold(student, x).requires_grad_(True)
    return folded, graph.to_onnx(folded, x, "pixels", "image_features", target.opset)


def check_student(student: nn.Module, size: int, path: str) -> None:
    """Raise, as `attach`, before hours of training have gone into a student that cannot round."""
    _, target = T.load(path)
    x = torch.zeros(1, 3, size, size)
    folded, model = _traced(student, x, target)
    candidate = Candidate("minmax", None, "all", None)
    calibrated = calibrate(model, x.numpy(), candidate.method)
    every_layer = policy.of_layers(
        candidate, x.numpy(), calibrated, {}, policy.reduced_range(target)
    )
    attach(folded, every_layer, target)


def after_stage_2(
    recipe: Recipe,
    cache: TeacherCache,
    learner: Learner,
    folder: Path,
    parents: Parents,
    train: Callable[[Learner, Recipe], Log],
) -> None:
    """Run stage 2 once more, on a rounding copy of the student, as the recipe's `qat` asks.

    train: stage 2's own loop.
    """
    assert recipe.qat is not None
    _, target = T.load(recipe.qat.target)
    again = replace(
        recipe.train,
        warmup_steps=0,
        pretrain=None,
        epochs=recipe.qat.epochs,
        lr=recipe.qat.lr,
        tower_lr_ratio=1.0,
        freeze_batch_norm=False,
    )
    image_side = replace(recipe.student, text=None, visual_prompts=None)
    adjusted = replace(recipe, train=again, student=image_side)

    def train_copy(folded: nn.Module) -> Log:
        head = copy.deepcopy(learner.head)
        return train(Learner(folded, head, learner.preprocess), adjusted)

    images = _calibration_images(cache, target, learner.preprocess)
    fine_tune(learner.student, images, recipe.qat.target, folder, train_copy, parents)


def _calibration_images(
    cache: TeacherCache, target: T.Target, preprocess: Preprocess
) -> np.ndarray:
    """Return float32 [n, 3, H, W] some training images, of those that were readable."""
    assert target.calibration is not None
    order = np.random.default_rng(target.calibration.seed).permutation(len(cache.images))
    pixels = []
    for i in order[: target.calibration.images].tolist():
        image = cache.images[i]
        pixels.append(load_pixels(image, preprocess))
    return normalize(np.stack(pixels), preprocess)


def check(name: str, target: T.Target, images: int) -> None:
    """Raise where `target` takes no learned scales, or there are too few training images for it."""
    where = f"qat.target: {name}"
    if target.precision != "int8" or target.runtime == "openvino":
        raise EdgeclipError(
            where, "takes no learned scales", "name an int8 target of onnxruntime or tensorrt"
        )
    assert target.calibration is not None
    if images < target.calibration.images:
        raise EdgeclipError(
            where,
            f"asks for {target.calibration.images} training images, and there are {images}",
            "give more, or lower calibration.images in a target of your own",
        )
