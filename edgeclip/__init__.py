"""edgeclip: take a large CLIP to a small board, and prove that it arrived."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

from edgeclip.errors import EdgeclipError

if TYPE_CHECKING:
    from edgeclip.device.bundle import Bundle

__all__ = ["Bundle", "EdgeclipError", "__version__"]
__version__ = "0.2.0"

MOVED = {
    "edgeclip.bench": "edgeclip.device.bench",
    "edgeclip.energy": "edgeclip.device.energy",
    "edgeclip.machine": "edgeclip.device.machine",
    "edgeclip.metrics": "edgeclip.device.metrics",
    "edgeclip.pictures": "edgeclip.device.images",
    "edgeclip.preprocess": "edgeclip.device.preprocess",
    "edgeclip.runtime": "edgeclip.device.runtime",
    "edgeclip.selftest": "edgeclip.device.selftest",
    "edgeclip.target": "edgeclip.device.target",
    "edgeclip.tokenizer": "edgeclip.device.tokenizer",
    "edgeclip.validate": "edgeclip.device.validate",
    "edgeclip.zero_shot": "edgeclip.device.zero_shot",
}
"""module of edgeclip 0.1, to where it is now"""


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of edgeclip 0.1 from where they are now, with a DeprecationWarning."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: types.ModuleType) -> None:
        old = module.__name__
        new = MOVED[old]
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


sys.meta_path.append(_MovedFinder())


def __getattr__(name: str) -> Any:
    """Import `Bundle`, and numpy with it, only when somebody asks for it."""
    if name == "Bundle":
        from edgeclip.device.bundle import Bundle

        return Bundle
    raise AttributeError(f"module 'edgeclip' has no attribute '{name}'")
