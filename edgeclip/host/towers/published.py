"""Find what a recipe names on a hub: the files of its weights, and the configuration beside them.

    weights: hub:TAG            published weights of a model that open_clip or timm lists
    model: hf-hub:ORG/NAME      any repository of either library; weights: hub:REVISION (hub:main)

`hub:TAG@REVISION` and `hub:REVISION` take a branch, a tag or a commit. Whatever is asked for, what
came is named by its commit.
"""

import functools
from typing import Any, NamedTuple

from msgspec.structs import replace

from edgeclip import disk
from edgeclip.errors import EdgeclipError, did_you_mean
from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.recipe.ingredients import ModelConfig
from edgeclip.host.towers import hub
from edgeclip.progress import say

REPOSITORY = "hf-hub:"
OPEN_CLIP_CONFIG = ("open_clip_config.json",)
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
TIMM_CONFIG = ("config.json",)
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Located(NamedTuple):
    """A model whose architecture and weights are at hand, or whose library fetches them."""

    spec: OpenClip | Timm
    """names an architecture; open_clip's also the file that came, with its configuration"""
    origin: str | None = None
    """REPOSITORY@COMMIT; None: it came from none"""
    timm: ModelConfig | None = None
    """what goes over the pretrained_cfg of a timm model, which fetches that commit's files from the
    cache; None: its own"""


def locate(spec: OpenClip | Timm) -> Located:
    """Return a spec with what a hub has of it on this machine.

    Raises `EdgeclipError` where that does not come.
    """
    from_hub = spec.weights.startswith("hub:")
    if not from_hub and not spec.model.startswith(REPOSITORY):
        return Located(spec)
    made = _locate(type(spec), spec.model, spec.weights)
    if isinstance(spec, OpenClip) and spec.config is not None:
        what = "a model with its own config has no hub's weights"
        raise EdgeclipError(spec.model, what, "give weights: random or a file")
    changed: dict[str, Any] = {"model": made.spec.model, "weights": made.spec.weights}
    if isinstance(made.spec, OpenClip):
        changed |= {"config": made.spec.config, "like": made.spec.like or spec.like}
    return made._replace(spec=replace(spec, **changed))


def located(spec: OpenClip) -> OpenClip:
    """Return an open_clip spec with its file and configuration. Raises as `locate`."""
    found = locate(spec).spec
    assert isinstance(found, OpenClip)
    return found


@functools.lru_cache(maxsize=32)
def _locate(library: type[OpenClip | Timm], model: str, weights: str) -> Located:
    spec: OpenClip | Timm = OpenClip(model=model, weights=weights)
    if library is Timm:
        spec = Timm(model=model, weights=weights, image_size=1)
    if model.startswith(REPOSITORY):
        found = _repository(spec)
    elif isinstance(spec, OpenClip):
        found = _open_clips_tag(spec)
    else:
        found = _timms_tag(spec)
    if found.origin:
        say(f"{model}: {weights} is {found.origin}")
    return found


def is_open_clips(model: str, weights: str) -> bool:
    """Return whether a repository holds a model of open_clip; otherwise it is one of timm.

    Raises `EdgeclipError` where it is neither, or does not come.
    """
    if not model.startswith(REPOSITORY):
        return False
    repository, revision = model.removeprefix(REPOSITORY), weights.removeprefix("hub:")
    names = [*OPEN_CLIP_CONFIG, *TIMM_CONFIG]
    found = hub.fetch(model, repository, revision if revision != weights else "main", [names])
    return found.files[0].name in OPEN_CLIP_CONFIG


def _repository(spec: OpenClip | Timm) -> Located:
    """Return the model that a repository's own configuration describes."""
    name = spec.model.removeprefix(REPOSITORY)
    kind, colon, revision = spec.weights.partition(":")
    if kind == "hub" and colon:
        wanted = True
    elif spec.weights == "random":
        wanted, revision = False, "main"
    else:
        what = f"weights of a repository are hub:REVISION or random, not {spec.weights}"
        raise EdgeclipError(spec.model, what, "write weights: hub:main")
    of_timm = isinstance(spec, Timm)
    groups: list[tuple[str, ...]] = [TIMM_CONFIG if of_timm else OPEN_CLIP_CONFIG]
    if wanted:
        groups.append(TIMM_WEIGHTS if of_timm else OPEN_CLIP_WEIGHTS)
    snapshot = hub.fetch(spec.model, name, revision or "main", groups)
    config = disk.read_json(snapshot.files[0])
    if isinstance(spec, OpenClip):
        file = str(snapshot.files[1]) if wanted else "random"
        described = replace(spec, model=name.rpartition("/")[2], config=config, weights=file)
        return Located(described, str(snapshot))
    for field, there in (("architecture", True), ("pretrained_cfg", True), ("model_args", False)):
        if bool(config.get(field)) != there:
            what = f"its config.json has {'no' if there else 'its own'} {field}"
            do = "give its weights as a file, and the architecture as the model"
            raise EdgeclipError(spec.model, what, do)
    own = {**config["pretrained_cfg"], "hf_hub_id": str(snapshot)}
    own["num_classes"] = config.get("num_classes", own.get("num_classes"))
    return Located(replace(spec, model=config["architecture"]), str(snapshot), own)


def tag_of(weights: str) -> tuple[str, str]:
    """Return tag and revision of `hub:TAG` or `hub:TAG@REVISION`."""
    tag, _, revision = weights.removeprefix("hub:").partition("@")
    return tag, revision or "main"


def _open_clips_tag(spec: OpenClip) -> Located:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tag, revision = tag_of(spec.weights)
    known = open_clip.list_pretrained_tags_by_model(spec.model)
    if tag not in known:
        where = f"{spec.model}: {spec.weights}"
        raise EdgeclipError(where, "unknown pretrained tag", did_you_mean(tag, known))
    repository, _, file = get_pretrained_cfg(spec.model, tag)["hf_hub"].rpartition("/")
    names = [file] if file else OPEN_CLIP_WEIGHTS
    snapshot = hub.fetch(f"{spec.model}: {spec.weights}", repository, revision, [names])
    return Located(replace(spec, weights=str(snapshot.files[0]), like=tag), str(snapshot))


def _timms_tag(spec: Timm) -> Located:
    import timm
    from timm.models import get_pretrained_cfg

    tag, revision = tag_of(spec.weights)
    name = f"{spec.model}.{tag}"
    known = timm.list_models(f"{spec.model}.*", pretrained=True)
    if name not in known:
        tags = [found.partition(".")[2] for found in known]
        where = f"{spec.model}: {spec.weights}"
        raise EdgeclipError(where, "unknown pretrained tag", did_you_mean(tag, tags))
    config = get_pretrained_cfg(name).to_dict()
    repository = config.get("hf_hub_id") or ""
    if repository.endswith("/"):
        repository += name
    if not repository:  # at a plain address
        return Located(replace(spec, model=name))
    names = [config["hf_hub_filename"]] if config.get("hf_hub_filename") else TIMM_WEIGHTS
    snapshot = hub.fetch(f"{spec.model}: {spec.weights}", repository, revision, [names])
    return Located(replace(spec, model=name), str(snapshot), {"hf_hub_id": str(snapshot)})
