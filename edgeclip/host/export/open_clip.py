"""`edgeclip export --layout open_clip`: the student as a checkpoint that open_clip itself loads, projector and all.

    open_clip.add_model_config(FOLDER / "NAME.json")
    open_clip.create_model_and_transforms("NAME", pretrained="FOLDER/open_clip_model.safetensors")
    open_clip.create_model_and_transforms("local-dir:FOLDER")        the same, with the student's own preprocessing

A folder is open_clip's CustomTextCLIP in its own names; nothing of edgeclip is needed to load it. The projector has no
place of its own there, so it is folded into the layer that open_clip ends its tower with, where algebra allows that:

    timm tower, one Linear         head.proj
    timm tower, MLP                head.mlp: batch norm folded in; ReLU is GELU's limit, so what goes in is multiplied by 2^16 and
                                   what comes out divided by it (exact in float32 and bfloat16, too large for float16)
    open_clip's own ViT, Linear    proj; the bias goes through it backwards into the last LayerNorm's, where it has a preimage
    text tower, Linear             text_projection, with a bias

Before the folder is there, open_clip loads it and its features are compared with the student's. EduAttention is no part
of it: open_clip's class scores are plain cosines.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_linear_bn_weights

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe, teachers
from edgeclip.host import student as students
from edgeclip.host.export.source import Source
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.student import Student, StudentText
from edgeclip.host.teachers import TextTower
from edgeclip.host.teachers.open_clip import ImageTower, TextModule
from edgeclip.host.towers.weights import open_clip_config

STEEP = 2.0**16
"""GELU(STEEP x) / STEEP differs from ReLU(x) by at most 0.17 / STEEP"""
MAX_ERROR = 1e-5

State = dict[str, Tensor]


def write(run: Path, source: Source, out: Path) -> Path:
    """The student of `run` for open_clip at `out`, a folder whose name is the model's.

    Raises `EdgeclipError` for a student that open_clip has no words for.
    """
    spec, asked = source.image_encoder, recipe.of_run(run)
    assert isinstance(spec, Student)
    config, state = _image(spec, asked.student)
    text = _text(run, asked)
    text_config, quick_gelu, text_state = _text_tower(text, _text_spec(asked))
    if "timm_model_name" not in config["vision_cfg"] and quick_gelu != config.pop("quick_gelu"):
        raise _no(
            "its two towers differ in quick_gelu, which is one setting there",
            "take towers of one kind",
        )
    config |= {"text_cfg": text_config, "quick_gelu": quick_gelu, "custom_text": True}
    state = {f"visual.{k}": v for k, v in state.items()} | {
        f"text.{k}": v for k, v in text_state.items()
    }
    state["logit_scale"] = torch.tensor(math.log(source.logit_scale))
    state = {
        k: v.detach().float().contiguous().clone()
        if v.is_floating_point()
        else v.contiguous().clone()
        for k, v in state.items()
    }
    p = source.preprocess
    preprocess = {
        "size": p.size,
        "mean": p.mean,
        "std": p.std,
        "interpolation": p.interpolation,
        "resize_mode": p.resize,
    }
    with disk.new_folder(out) as folder:
        save_file(state, folder / "open_clip_model.safetensors")
        disk.write_json(folder / f"{out.name}.json", config)
        disk.write_json(
            folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": preprocess}
        )
        _compare(folder, spec, text, p.size)
        disk.write_manifest(
            folder,
            "open_clip",
            {"name": out.name, "licenses": source.licenses, "parents": source.parents},
        )
    return out


def _no(what: str, do: str) -> EdgeclipError:
    return EdgeclipError(
        "--layout open_clip", f"this student cannot be said in open_clip's terms: {what}", do
    )


def _image(student: Student, spec: recipe.Student) -> tuple[dict[str, Any], State]:
    """(embed_dim and vision_cfg, state of `visual`): the image tower with the projector folded into its end."""
    if spec.visual_prompts or spec.share or spec.stem:
        raise _no(
            "it has visual prompts, shared blocks or a convolutional stem",
            "use a bundle, or --layout optimum",
        )
    tower, (first, last) = student.tower, _projector(student.projector)
    embed_dim = last[0].shape[0]
    if isinstance(spec.tower, Timm):
        config = {
            "timm_model_name": spec.tower.model,
            "timm_pool": "",
            "image_size": spec.tower.image_size,
        }
        return _timm(tower, config, first, last, embed_dim)
    model_config = open_clip_config(spec.tower)
    config = model_config["vision_cfg"]
    assert isinstance(tower, ImageTower)
    visual, state = tower.visual, tower.visual.state_dict()
    if "timm_model_name" in config:
        end = visual.head.proj if hasattr(visual.head, "proj") else visual.trunk.get_classifier()
        if not isinstance(end, nn.Linear) or hasattr(visual.head, "pool"):
            raise _no(
                "its tower does not end in one linear layer", "use a bundle, or --layout optimum"
            )
        weight, bias = (first or last)[0], (first or last)[1]
        joined = (weight @ end.weight, bias + (weight @ end.bias if end.bias is not None else 0))
        return _timm(
            visual.trunk,
            config,
            joined if first else None,
            last if first else joined,
            embed_dim,
            end,
        )
    if first:
        raise _no(
            "open_clip's own towers end in one linear map, and this projector has a hidden layer",
            "distil with projector_hidden: null",
        )
    weight, bias = last
    if "attnpool.c_proj.weight" in state:
        state["attnpool.c_proj.bias"] = bias + weight @ state["attnpool.c_proj.bias"]
        state["attnpool.c_proj.weight"] = weight @ state["attnpool.c_proj.weight"]
    else:
        state["proj"] = (state["proj"] @ weight.T) if "proj" in state else weight.T
        before = torch.linalg.lstsq(
            state["proj"].double().T, bias.double()[:, None], driver="gelsd"
        ).solution[:, 0]
        if (before @ state["proj"].double() - bias).abs().max() > 1e-6 * max(
            1.0, bias.abs().max().item()
        ) or config.get("attentional_pool"):
            what = f"its projector's bias has no place: {embed_dim} dimensions behind a tower of {state['ln_post.bias'].shape[0]}"
            raise _no(what, "use a bundle, or --layout optimum")
        state["ln_post.bias"] = state["ln_post.bias"] + before.float()
    return {
        "embed_dim": embed_dim,
        "vision_cfg": config,
        "quick_gelu": model_config.get("quick_gelu", False),
    }, state


Affine = tuple[Tensor, Tensor]
"""weight [out, in] and bias [out]"""


def _projector(projector: nn.Module) -> tuple[Affine | None, Affine]:
    """(map before the ReLU, map behind it) of the student's projector; the first is None where there is but one."""
    if isinstance(projector, nn.Linear):
        return None, (projector.weight.detach(), projector.bias.detach())
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
    return (weight.detach(), bias.detach()), (last.weight.detach(), last.bias.detach())


def _timm(
    trunk: nn.Module,
    config: dict[str, Any],
    first: Affine | None,
    last: Affine,
    width: int,
    end: nn.Module | None = None,
) -> tuple[dict[str, Any], State]:
    """A timm trunk without its classifier `end`, and open_clip's head on it: Linear, or Linear, GELU, Linear of 2 * width."""
    dropped = {id(p) for p in end.parameters()} if end is not None else set()
    of_end = {k for k, p in trunk.named_parameters() if id(p) in dropped}
    state = {f"trunk.{k}": v for k, v in trunk.state_dict().items() if k not in of_end}
    config = {
        **config,
        "timm_model_pretrained": False,
        "timm_proj": "mlp" if first else "linear",
        "timm_proj_bias": True,
    }
    if (first or last)[0].shape[1] != trunk.num_features:
        raise _no(
            f"{config['timm_model_name']} has a layer behind its pooling, which has no place there",
            "use a bundle, or --layout optimum",
        )
    if first is None:
        state["head.proj.weight"], state["head.proj.bias"] = last
        return {"embed_dim": width, "vision_cfg": config}, state
    more = 2 * width - len(first[0])
    if more < 0:
        raise _no(
            f"its projector has {len(first[0])} hidden units, open_clip's has 2 * {width}",
            f"distil with projector_hidden: {2 * width} or less",
        )
    state["head.mlp.fc1.weight"] = F.pad(
        STEEP * first[0], (0, 0, 0, more)
    )  # units beyond the student's are zero
    state["head.mlp.fc1.bias"] = F.pad(STEEP * first[1], (0, more))
    state["head.mlp.fc2.weight"], state["head.mlp.fc2.bias"] = (
        F.pad(last[0] / STEEP, (0, more)),
        last[1],
    )
    return {"embed_dim": width, "vision_cfg": config}, state


def _text_spec(asked: recipe.Recipe) -> OpenClip:
    """Whose text tower the student's images are compared with: its own, or its teacher's."""
    if asked.student.text:
        return asked.student.text
    if not isinstance(asked.teacher, OpenClip) or isinstance(asked.adapt, recipe.Prompts):
        what = "its text side is a sentence encoder, learned prompts or stored features, and no open_clip text tower"
        raise _no(
            what, "use --layout optimum, or give the student a text tower of its own (student.text)"
        )
    return asked.teacher


def _text(run: Path, asked: recipe.Recipe) -> TextTower:
    spec = _text_spec(asked)
    own = students.load_text(run / "student") if asked.student.text else None
    return own or teachers.load_text(spec)


def _text_tower(text: TextTower, spec: OpenClip) -> tuple[dict[str, Any], bool, State]:
    """(text_cfg, quick_gelu, state of `text`): the text tower with its projector, if it has one, as text_projection."""
    module = text.module
    assert isinstance(module, StudentText | TextModule)
    model = module.tower if isinstance(module, StudentText) else module.model
    config = open_clip_config(spec)
    if "hf_model_name" in config["text_cfg"]:
        raise _no(f"{spec.model} has a Hugging Face text tower", "use --layout optimum")
    own = model.text if hasattr(model, "text") else model
    left_out = () if hasattr(model, "text") else ("visual.", "logit_scale", "logit_bias")
    state = {
        k: v
        for k, v in own.state_dict().items()
        if not k.startswith((*left_out, "text_projection"))
    }
    end = own.text_projection
    if isinstance(module, TextModule):
        state |= {k: v for k, v in own.state_dict().items() if k.startswith("text_projection")}
        return config["text_cfg"], config.get("quick_gelu", False), state
    weight, bias = module.projector.weight, module.projector.bias
    if isinstance(end, nn.Linear):
        bias = bias + (weight @ end.bias if end.bias is not None else 0)
        weight = weight @ end.weight
    elif end is not None:
        weight = weight @ end.T
    state |= {"text_projection.weight": weight, "text_projection.bias": bias}
    return (
        {**config["text_cfg"], "proj_bias": True, "proj_type": "linear"},
        config.get("quick_gelu", False),
        state,
    )


@torch.inference_mode()
def _compare(folder: Path, student: Student, text: TextTower, size: int) -> None:
    """Raises `EdgeclipError` where open_clip does not load the folder, or computes something else."""
    from open_clip import create_model

    try:
        model = create_model(f"local-dir:{folder}").eval()
    except RuntimeError as e:  # shapes or names that do not fit: a size that timm's model does not have by itself, for one
        raise _no(" ".join(str(e).split())[:200], "use a bundle, or --layout optimum") from None
    generator = torch.Generator().manual_seed(0)
    pixels: Float[Tensor, "4 3 H W"] = torch.randn(4, 3, size, size, generator=generator)
    ids: Int[Tensor, "4 L"] = students.token_ids(
        text, ["a photo of a cat", "a red umbrella", "the letter A", "shoes"]
    )
    pairs = (
        (model.encode_image(pixels, normalize=True), student(pixels)),
        (model.encode_text(ids, normalize=True), text.module(ids)),
    )
    for which, (found, wanted) in zip(("image", "text"), pairs, strict=True):
        if (error := (found - wanted).abs().max().item()) > MAX_ERROR:
            raise _no(
                f"its {which} features differ by {error:.1e} there",
                "use a bundle, or --layout optimum; and report this",
            )
