"""Read the tensors of a TorchScript archive, as OpenAI published CLIP, and run none of its code.

Such an archive is a zip: data.pkl is a tree of modules with their attributes, whose tensors point
to the files below data/; code/ is the program. `torch.jit.load` compiles and runs that program, so
it is not used. Here data.pkl goes through an unpickler that knows four things: a module, which
becomes a bag of attributes; a tensor; a dictionary that keeps its order; a list with a type. Any
other name in it is refused before anything is called. Nothing is ever written in this form.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, and not a torch file of plain tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and _is_constants(name) for name in archive.namelist())


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer under its module's path, on the CPU.

    Raises `pickle.UnpicklingError` for an archive that holds anything else, `KeyError` and
    `ValueError` for one that is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        (root,) = {name.split("/")[0] for name in archive.namelist() if _is_constants(name)}
        top = _Unpickler(archive, root).load()
    found: dict[str, torch.Tensor] = {}
    if isinstance(top, _Module):
        _collect(top, "", found)
    return found


def _is_constants(name: str) -> bool:
    return name.endswith("/constants.pkl")


class _Module:
    """A module of the archive: its attributes, and no method."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _collect(module: _Module, at: str, found: dict[str, torch.Tensor]) -> None:
    for name, value in module.attributes.items():
        if isinstance(value, torch.Tensor):
            found[f"{at}{name}"] = value
        elif isinstance(value, _Module):
            _collect(value, f"{at}{name}.", found)


def _as_list(items: Any, *_types: Any) -> Any:
    return items


def _tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_more: Any
) -> torch.Tensor:
    """Return a tensor of its own: torch refuses what would reach beyond the storage."""
    return torch.as_strided(storage, size, stride, offset).clone()


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive = archive
        self.root = root
        order = f"{root}/byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("its numbers are in another byte order than this machine's")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in (*LISTS, "restore_type_tag"):
            return _as_list
        raise pickle.UnpicklingError(f"{module}.{name} is neither a tensor nor a module")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Return a storage, as a flat tensor."""
        _, dtype, key, _, count = pid
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        storage = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if len(storage) < count:
            raise ValueError(f"data/{key} has {len(storage)} of {count} numbers")
        return storage
