"""Read a file of weights, whatever wrote it, and say which of the weights in it are meant.

No code of a file is run: safetensors, torch files through the restricted unpickler
(`weights_only=True`), and of a TorchScript archive its tensors alone (torchscript.py). What is
given is FILE, a folder, the index of several shards, or FILE:KEY where a file has more than one set
of weights: a training checkpoint with an average beside the weights, a teacher beside its student.
"""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edgeclip import disk
from edgeclip.errors import EdgeclipError
from edgeclip.host.towers import foreign, torchscript

State = dict[str, torch.Tensor]

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""parts of a name that data parallelism, torch.compile, sharding and checkpointing put into it"""
PREFIX = "model."
"""what training code holds its model under"""
NO_WEIGHTS = ("optim", "sched", "lr_sched", "scaler", "amp", "rng", "callback", "loop")
"""what the entries of a checkpoint that are no weights begin with"""
WHOLE = "."
"""key of the tensors that a file holds beside other sets of weights, at its top"""
INDEXES = (
    "model.safetensors.index.json",
    "open_clip_model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
SHARD = re.compile(r"-\d+-of-(\d+)\.[a-z]+$")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class Chosen(NamedTuple):
    """Where weights lie."""

    path: Path
    key: str | None
    """None: the one set that the file has"""


def locate(weights: str) -> Chosen:
    """Return the file and the key of FILE or FILE:KEY; a path may have colons of its own.

    Raises `EdgeclipError` where there is no such file.
    """
    if Path(weights).exists():
        return Chosen(Path(weights), None)
    head = weights.rpartition(":")[0]
    while head:
        if Path(head).exists():
            return Chosen(Path(head), weights[len(head) + 1 :])
        head = head.rpartition(":")[0]
    raise EdgeclipError(
        weights,
        "there is no such weights file",
        "check the path, or use random, pip:PACKAGE or hub:TAG",
    )


def files(path: Path) -> list[Path]:
    """Return all files that weights at `path` consist of, the index before its shards.

    Raises `EdgeclipError` for a folder without weights, or with several of them.
    """
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".index.json"):
        return [path, *sorted({path.parent / name for name in _index(path).values()})]
    return [path]


def fingerprint(weights: str) -> str:
    """Return the sha256 of a file, or of all files of an index, and the key that is chosen."""
    path, key = locate(weights)
    hashes = [disk.sha256(file) for file in files(path)]
    found = hashes[0] if len(hashes) == 1 else disk.fingerprint(hashes)
    return f"sha256:{found}:{key}" if key else f"sha256:{found}"


def read(weights: str) -> State:
    """Return the tensors of FILE or FILE:KEY under their names, without a wrapper's parts of them.

    Raises `EdgeclipError` for a file that is missing or is none, and for one with several sets of
    weights and no key.
    """
    path, key = locate(weights)
    first, *shards = files(path)
    content: Any = _shards(first, shards) if shards else _content(first)
    state = _choose(content, key, path)
    return _unwrapped(state, weights)


# --- which of the weights


def _choose(content: Any, key: str | None, path: Path) -> State:
    """Return the one set of weights that a file holds, or that the key names."""
    if isinstance(content, torch.Tensor) or not isinstance(content, dict):
        raise EdgeclipError(
            path,
            f"holds a {type(content).__name__} and no dictionary of tensors",
            "save the model's state_dict()",
        )
    sets = _sets(content, "")
    if key is not None:
        return _named(sets, key, path)
    if not sets:
        held = ", ".join(list(map(str, content))[:8]) or "nothing"
        raise EdgeclipError(
            path, f"holds no tensors of weights ({held})", "save the model's state_dict()"
        )
    names = list(sets)
    if len(names) > 1 and not _all_equal(list(sets.values())):
        raise EdgeclipError(
            path,
            f"has {len(names)} sets of weights: {_listed(sets)}",
            f"say which one: {path}:{names[0]}",
        )
    return _tensors(sets[names[0]], path, names[0])


def _sets(value: dict[Any, Any], at: str) -> dict[str, Any]:
    """Return every set of weights in a checkpoint, at any depth, by its key."""
    found: dict[str, Any] = {}
    tensors = {k: v for k, v in value.items() if isinstance(k, str) and _is_tensor(v)}
    if any(v.is_floating_point() and v.ndim for v in tensors.values()):
        found[at or WHOLE] = tensors
    for name, item in value.items():
        if not isinstance(name, str) or name.lower().startswith(NO_WEIGHTS):
            continue
        key = f"{at}.{name}" if at else name
        if isinstance(item, dict):
            found.update(_sets(item, key))
        elif isinstance(item, list | tuple) and len(item) > 1 and all(map(_is_tensor, item)):
            found[key] = item  # an average that is kept without names
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _named(sets: dict[str, Any], key: str, path: Path) -> State:
    """Return the set of that key, or the tensors of one set whose names begin with it."""
    if key in sets:
        return _tensors(sets[key], path, key)
    prefix = f"{key}."
    parts = []
    for state in sets.values():
        if isinstance(state, dict):
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            parts.append(part)
    parts = [part for part in parts if part]
    if len(parts) == 1:
        return parts[0]
    known = _listed(sets) or "no weights at all"
    raise EdgeclipError(path, f"has no weights '{key}', but {known}", "check the key")


def _tensors(found: Any, path: Path, key: str) -> State:
    if isinstance(found, dict):
        return found
    raise EdgeclipError(
        f"{path}:{key}",
        f"{len(found)} tensors without names, which could belong anywhere",
        "save them under the model's names",
    )


def _listed(sets: dict[str, Any]) -> str:
    return ", ".join(f"{key} ({len(state)} tensors)" for key, state in sets.items())


def _all_equal(sets: list[Any]) -> bool:
    """Whether all sets are the same weights, as where one is stored under two keys."""
    first, *others = sets
    return all(isinstance(s, dict) and _equal(first, s) for s in others)


def _equal(a: Any, b: State) -> bool:
    if not isinstance(a, dict) or a.keys() != b.keys():
        return False
    return all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def _unwrapped(state: State, where: object) -> State:
    """Return the tensors without what wrappers put into their names, however often."""
    found: State = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in found:
            raise EdgeclipError(
                where, f"two of its tensors are '{short}' (one is '{name}')", "keep one of them"
            )
        found[short] = tensor
    found.pop("n_averaged", None)  # torch's AveragedModel counts its steps there
    while found and all(name.startswith(PREFIX) for name in found):
        found = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}
    return found


# --- the files


def _in_folder(folder: Path) -> Path:
    """Return the index or the one weights file of a folder."""
    for name in INDEXES:
        if (folder / name).exists():
            return folder / name
    found = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
    if len(found) != 1:
        names = ", ".join(f.name for f in found[:4])
        raise EdgeclipError(
            folder,
            f"has {len(found)} weights files and no index of shards" + (names and f": {names}"),
            "give the path of a file",
        )
    return found[0]


def _index(path: Path) -> dict[str, str]:
    """Return an index's map of tensors to the files beside it."""
    try:
        places: Any = disk.read_json(path)["weight_map"]
        names = {str(tensor): str(file) for tensor, file in places.items()}
    except (EdgeclipError, KeyError, TypeError, AttributeError):
        raise EdgeclipError(path, "is no index of shards", "give the weights file itself") from None
    for file in sorted(set(names.values())):
        if Path(file).name != file:
            raise EdgeclipError(path, f"names a file elsewhere: {file}", "do not trust this index")
        if not (path.parent / file).is_file():
            raise EdgeclipError(path, f"its shard {file} is missing", "fetch all of the shards")
    return names


def _shards(index: Path, shards: list[Path]) -> State:
    """Return the tensors of all shards; every one lies where the index says."""
    places = _index(index)
    found: State = {}
    for shard in shards:
        part = _content(shard)
        expected = {tensor for tensor, file in places.items() if file == shard.name}
        if not isinstance(part, dict) or part.keys() != expected:
            raise EdgeclipError(
                shard, f"holds other tensors than {index.name} says", "fetch the shards anew"
            )
        found.update(part)
    return found


def is_one_of_several(path: Path) -> bool:
    """Whether a file's name says that it is one shard of several."""
    match = SHARD.search(path.name)
    return bool(match and int(match[1]) > 1)


def _content(path: Path) -> Any:
    """Return what a file holds, of tensors and plain values."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise EdgeclipError(path, "is empty", "fetch or write it again")
    if head.startswith(b"version https://git-lfs"):
        raise EdgeclipError(path, "is a Git LFS pointer and no weights", "git lfs pull")
    try:
        if head[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if torchscript.is_archive(path):
            return torchscript.tensors(path)
        # timm's training checkpoints hold their command's arguments. Of a path, torch would take
        # the suffix for what is in the file.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises half a dozen types for a file that is not one
        raise _unreadable(path, e) from None


def _unreadable(path: Path, error: Exception) -> EdgeclipError:
    """Return the error for a file that cannot be read, with the objects that it holds."""
    objects: list[str] = []
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            objects = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not a torch file, or a damaged one
        objects = []
    if objects:
        return EdgeclipError(
            path,
            f"not a readable weights file: it holds more than tensors ({', '.join(objects[:3])}), "
            "which could run code",
            "save the state dict alone, as safetensors or with torch.save",
        )
    kind = foreign.kind(path)
    if kind is not None:
        return EdgeclipError(path, f"is {kind.what}, and no weights for torch", kind.do)
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    if "weights_only" in str(error):  # torch's essay on pickles says nothing of the file
        reason = "neither safetensors nor what torch.save writes, or damaged"
    return EdgeclipError(
        path,
        f"not a readable weights file ({reason})",
        "give safetensors or a torch state dict",
    )
