"""edgeclip: take a large CLIP to a small board, and prove that it arrived."""

from typing import TYPE_CHECKING, Any

from edgeclip.errors import EdgeclipError

if TYPE_CHECKING:
    from edgeclip.device.bundle import Bundle

__all__ = ["Bundle", "EdgeclipError", "__version__"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import `Bundle`, and numpy with it, only when somebody asks for it."""
    if name == "Bundle":
        from edgeclip.device.bundle import Bundle

        return Bundle
    raise AttributeError(f"module 'edgeclip' has no attribute '{name}'")
