"""The public face of a bundle: `from edgeclip.bundle import Bundle`."""

from edgeclip.device.bundle import Bundle, bake_labels

__all__ = ["Bundle", "bake_labels"]
