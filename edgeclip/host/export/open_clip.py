"""`edgeclip export --layout open_clip`: the student as a checkpoint that open_clip itself loads.

    open_clip.add_model_config(FOLDER / "NAME.json")
    open_clip.create_model_and_transforms("NAME", pretrained="FOLDER/open_clip_model.safetensors")
    open_clip.create_model_and_transforms("local-dir:FOLDER")   with the student's preprocessing

A folder is open_clip's CustomTextCLIP in its own names; nothing of edgeclip is needed to load it.
The projector has no place of its own there, so it is folded into the layer that open_clip ends its
tower with, where algebra allows that:

    timm tower, one Linear        head.proj
    timm tower, MLP               head.mlp: batch norm folded in; ReLU is GELU's limit, so what goes
                                  in is multiplied by 2^16 and what comes out divided by it (exact
                                  in float32 and bfloat16, too large for float16)
    open_clip's own ViT, Linear   proj; the bias goes through it backwards into that of the last
                                  LayerNorm, where it has a preimage
    text tower, Linear            text_projection, with a bias

Before the folder is there, open_clip loads it and its features are compared with the student's.
EduAttention is no part of it: open_clip's class scores are plain cosines.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_linear_bn_weights

from edgeclip import disk
from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host import student as students
from edgeclip.host import teachers
from edgeclip.host.export.source import Source
from edgeclip.host.recipe import OpenClip, Recipe, Timm
from edgeclip.host.recipe.ingredients import ModelConfig
from edgeclip.host.student import Student, StudentText
from edgeclip.host.teachers import TextTower
from edgeclip.host.teachers.open_clip import ImageTower, TextModule
from edgeclip.host.towers.weights import open_clip_config

STEEP = 2.0**16
"""GELU(STEEP x) / STEEP differs from ReLU(x) by at most 0.17 / STEEP"""
MAX_ERROR = 1e-5
TEXTS = ["a photo of a cat", "a red umbrella", "the letter A", "shoes"]
"""what both text encoders are compared on"""
OTHERWISE = "use a bundle, or --layout optimum"

State = dict[str, Tensor]


class Affine(NamedTuple):
    """A map x -> weight x + bias."""

    weight: Tensor
    """[out, in]"""
    bias: Tensor
    """[out]"""

    def after(self, end: nn.Linear) -> "Affine":
        """Return this map behind the layer `end`, as one map."""
        if end.bias is None:
            return Affine(self.weight @ end.weight, self.bias)
        return Affine(self.weight @ end.weight, self.bias + self.weight @ end.bias)


class Projector(NamedTuple):
    """The student's projector."""

    hidden: Affine | None
    """the map before the ReLU; None: the projector is one map"""
    last: Affine


class Side(NamedTuple):
    """One of the two towers in open_clip's words."""

    config: ModelConfig
    """vision_cfg or text_cfg"""
    state: State
    quick_gelu: bool | None
    """None: a timm tower, which has none"""


def write(run: Path, source: Source, out: Path) -> Path:
    """Write the student of `run` for open_clip to `out`, a folder whose name is the model's.

    Raises `EdgeclipError` for a student that has no form in open_clip.
    """
    student = source.image_encoder
    assert isinstance(student, Student)
    recipe = R.of_run(run)
    text = _text(run, recipe)
    image_side = _image(student, recipe.student)
    text_side = _text_side(text, _text_spec(recipe))
    if image_side.quick_gelu not in (None, text_side.quick_gelu):
        raise _no(
            "its two towers differ in quick_gelu, which is one setting there",
            "take towers of one kind",
        )
    config = {
        "embed_dim": _width(student),
        "vision_cfg": image_side.config,
        "text_cfg": text_side.config,
        "quick_gelu": text_side.quick_gelu,
        "custom_text": True,
    }
    with disk.new_folder(out) as folder:
        state = _joined(image_side.state, text_side.state, source.logit_scale)
        save_file(state, folder / "open_clip_model.safetensors")
        disk.write_json(folder / f"{out.name}.json", config)
        whole = {"model_cfg": config, "preprocess_cfg": _preprocess(source.preprocess)}
        disk.write_json(folder / "open_clip_config.json", whole)
        _compare(folder, student, text, source.preprocess.size)
        origin = {"name": out.name, "licenses": source.licenses, "parents": source.parents}
        disk.write_manifest(folder, "open_clip", origin)
    return out


def _width(student: Student) -> int:
    """Return the width D of a student's features."""
    return len(_projector(student.projector).last.weight)


def _joined(image: State, text: State, logit_scale: float) -> State:
    """Both towers under open_clip's prefixes, floats in float32, each tensor on its own."""
    named = {f"visual.{name}": tensor for name, tensor in image.items()}
    named.update({f"text.{name}": tensor for name, tensor in text.items()})
    named["logit_scale"] = torch.tensor(math.log(logit_scale))
    state: State = {}
    for name, tensor in named.items():
        if tensor.is_floating_point():
            tensor = tensor.detach().float()
        state[name] = tensor.contiguous().clone()
    return state


def _preprocess(spec: Preprocess) -> ModelConfig:
    if spec.crop != 1.0:
        raise _no("its images are resized to more than is cropped", OTHERWISE)
    return {
        "size": spec.size,
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize,
    }


def _no(what: str, do: str) -> EdgeclipError:
    return EdgeclipError(
        "--layout open_clip", f"this student cannot be said in open_clip's terms: {what}", do
    )


def _image(student: Student, spec: R.Student) -> Side:
    """Return the image tower with the projector folded into its end."""
    if spec.visual_prompts or spec.share or spec.stem:
        raise _no("it has visual prompts, shared blocks or a convolutional stem", OTHERWISE)
    tower = student.tower
    projector = _projector(student.projector)
    if isinstance(spec.tower, Timm):
        config = {
            "timm_model_name": spec.tower.model,
            "timm_pool": "",
            "image_size": spec.tower.image_size,
        }
        return _timm_side(tower, config, projector)

    assert isinstance(tower, ImageTower)
    model_config = open_clip_config(spec.tower)
    if "timm_model_name" in model_config["vision_cfg"]:
        return _timm_inside_open_clip(tower.visual, model_config["vision_cfg"], projector)
    if projector.hidden:
        raise _no(
            "open_clip's own towers end in one linear map, and this projector has a hidden layer",
            "distil with projector_hidden: null",
        )
    state = tower.visual.state_dict()
    if "attnpool.c_proj.weight" in state:
        _fold_into_pool(state, projector.last)
    else:
        _fold_into_vit(state, projector.last, model_config["vision_cfg"])
    return Side(model_config["vision_cfg"], state, model_config.get("quick_gelu", False))


def _timm_inside_open_clip(visual: nn.Module, config: ModelConfig, projector: Projector) -> Side:
    """Return an open_clip model's timm tower: its own linear end and the projector become one."""
    has_own = hasattr(visual.head, "proj")
    end = visual.head.proj if has_own else visual.trunk.get_classifier()
    if not isinstance(end, nn.Linear) or hasattr(visual.head, "pool"):
        raise _no("its tower does not end in one linear layer", OTHERWISE)
    if projector.hidden:
        joined = Projector(projector.hidden.after(end), projector.last)
    else:
        joined = Projector(None, projector.last.after(end))
    return _timm_side(visual.trunk, config, joined, end)


def _fold_into_pool(state: State, last: Affine) -> None:
    """Fold the projector into a ResNet's attention pool, in place."""
    state["attnpool.c_proj.bias"] = last.bias + last.weight @ state["attnpool.c_proj.bias"]
    state["attnpool.c_proj.weight"] = last.weight @ state["attnpool.c_proj.weight"]


def _fold_into_vit(state: State, last: Affine, config: ModelConfig) -> None:
    """Fold the projector into a ViT's proj, and its bias into the last LayerNorm's, in place.

    Raises `EdgeclipError` where the bias has no preimage under proj.
    """
    if "proj" in state:
        state["proj"] = state["proj"] @ last.weight.T
    else:
        state["proj"] = last.weight.T
    proj = state["proj"].double()
    bias = last.bias.double()
    before = torch.linalg.lstsq(proj.T, bias[:, None], driver="gelsd").solution[:, 0]
    error = (before @ proj - bias).abs().max()
    largest = max(1.0, last.bias.abs().max().item())
    if not error <= 1e-6 * largest or config.get("attentional_pool"):
        tower_width = state["ln_post.bias"].shape[0]
        raise _no(
            f"its projector's bias has no place: {len(bias)} dimensions behind a tower of "
            f"{tower_width}",
            OTHERWISE,
        )
    state["ln_post.bias"] = state["ln_post.bias"] + before.float()


def _projector(projector: nn.Module) -> Projector:
    """Return the maps of a student's projector; batch norm is folded into the first."""
    if isinstance(projector, nn.Linear):
        return Projector(None, Affine(projector.weight.detach(), projector.bias.detach()))
    first, norm, _, last = projector.children()
    weight, bias = fuse_linear_bn_weights(
        first.weight,
        first.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    hidden = Affine(weight.detach(), bias.detach())
    return Projector(hidden, Affine(last.weight.detach(), last.bias.detach()))


def _timm_side(
    trunk: nn.Module, config: ModelConfig, projector: Projector, end: nn.Module | None = None
) -> Side:
    """Return a timm trunk without its classifier `end`, and open_clip's head for the projector.

    The head is Linear, or Linear, GELU, Linear with 2 D hidden units.
    """
    kind = "linear"
    entry = projector.last
    if projector.hidden:
        kind = "mlp"
        entry = projector.hidden
    config = {
        **config,
        "timm_model_pretrained": False,
        "timm_proj": kind,
        "timm_proj_bias": True,
    }
    if entry.weight.shape[1] != trunk.num_features:
        raise _no(
            f"{config['timm_model_name']} has a layer behind its pooling, which has no place there",
            OTHERWISE,
        )
    state = _trunk_state(trunk, end)
    if projector.hidden is None:
        state["head.proj.weight"] = projector.last.weight
        state["head.proj.bias"] = projector.last.bias
    else:
        _put_mlp(state, projector.hidden, projector.last)
    return Side(config, state, None)


def _trunk_state(trunk: nn.Module, end: nn.Module | None) -> State:
    """Return a trunk's tensors, without those of its classifier."""
    dropped = set()
    if end is not None:
        ids = {id(parameter) for parameter in end.parameters()}
        for name, parameter in trunk.named_parameters():
            if id(parameter) in ids:
                dropped.add(name)
    state: State = {}
    for name, tensor in trunk.state_dict().items():
        if name not in dropped:
            state[f"trunk.{name}"] = tensor
    return state


def _put_mlp(state: State, hidden: Affine, last: Affine) -> None:
    """Put the projector's two maps into open_clip's MLP; units beyond the student's are zero."""
    units = 2 * len(last.weight)
    more = units - len(hidden.weight)
    if more < 0:
        raise _no(
            f"its projector has {len(hidden.weight)} hidden units, open_clip's has {units}",
            f"distil with projector_hidden: {units} or less",
        )
    state["head.mlp.fc1.weight"] = F.pad(STEEP * hidden.weight, (0, 0, 0, more))
    state["head.mlp.fc1.bias"] = F.pad(STEEP * hidden.bias, (0, more))
    state["head.mlp.fc2.weight"] = F.pad(last.weight / STEEP, (0, more))
    state["head.mlp.fc2.bias"] = last.bias


def _text_spec(recipe: Recipe) -> OpenClip:
    """Whose text tower the student's images are compared with: its own, or its teacher's."""
    if recipe.student.text:
        return recipe.student.text
    if not isinstance(recipe.teacher, OpenClip) or isinstance(recipe.adapt, R.Prompts):
        raise _no(
            "its text side is a sentence encoder, learned prompts or stored features, and no "
            "open_clip text tower",
            "use --layout optimum, or give the student a text tower of its own (student.text)",
        )
    return recipe.teacher


def _text(run: Path, recipe: Recipe) -> TextTower:
    spec = _text_spec(recipe)
    own = None
    if recipe.student.text:
        own = students.load_text(run / "student")
    return own or teachers.load_text(spec)


def _text_side(text: TextTower, spec: OpenClip) -> Side:
    """Return the text tower with its projector, if it has one, as text_projection."""
    module = text.module
    assert isinstance(module, StudentText | TextModule)
    config = open_clip_config(spec)
    if "hf_model_name" in config["text_cfg"]:
        raise _no(f"{spec.model} has a Hugging Face text tower", "use --layout optimum")
    whole = module.model if isinstance(module, TextModule) else module.tower
    tower = getattr(whole, "text", whole)  # a module of its own, or the model itself
    text_config = config["text_cfg"]
    state = tower.state_dict()
    if isinstance(module, StudentText):
        projection = _text_projection(module.projector, tower.text_projection)
        text_config = {**text_config, "proj_bias": True, "proj_type": "linear"}
        state = {k: v for k, v in state.items() if not k.startswith("text_projection")}
        state["text_projection.weight"] = projection.weight
        state["text_projection.bias"] = projection.bias
    if tower is whole:
        others = ("visual.", "logit_scale", "logit_bias")
        state = {k: v for k, v in state.items() if not k.startswith(others)}
    return Side(text_config, state, config.get("quick_gelu", False))


def _text_projection(projector: nn.Linear, end: nn.Linear | Tensor | None) -> Affine:
    """Return the projector behind the tower's own projection `end`, as one map."""
    own = Affine(projector.weight, projector.bias)
    if isinstance(end, nn.Linear):
        return own.after(end)
    if end is None:
        return own
    return Affine(own.weight @ end.T, own.bias)


@torch.inference_mode()
def _compare(folder: Path, student: Student, text: TextTower, size: int) -> None:
    """Raise `EdgeclipError` where open_clip does not load the folder, or computes otherwise."""
    from open_clip import create_model

    try:
        model = create_model(f"local-dir:{folder}").eval()
    except RuntimeError as e:
        # Shapes or names that do not fit: a size that is not timm's own, for one.
        raise _no(" ".join(str(e).split())[:200], OTHERWISE) from None
    generator = torch.Generator().manual_seed(0)
    pixels: Float[Tensor, "4 3 H W"] = torch.randn(4, 3, size, size, generator=generator)
    ids: Int[Tensor, "4 L"] = students.token_ids(text, TEXTS)
    _refuse_difference("image", model.encode_image(pixels, normalize=True), student(pixels))
    _refuse_difference("text", model.encode_text(ids, normalize=True), text.module(ids))


def _refuse_difference(which: str, features: Tensor, expected: Tensor) -> None:
    error = (features - expected).abs().max().item()
    if not error <= MAX_ERROR:  # not a number is a difference too
        raise _no(
            f"its {which} features differ by {error:.1e} there", f"{OTHERWISE}; and report this"
        )
