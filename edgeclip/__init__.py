"""edgeclip: take a large CLIP to a small board, and prove that it arrived."""

__version__ = "0.1.0"
