"""Masked images for CLIP-KD's MFD: the student sees few patches, and no mask tokens.

A ViT drops the tokens, as the paper does, and is the cheaper for it. Another tower gets the image
with squares of the mean color, which is as near as a convolution comes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from edgeclip.host.recipe import MaskedFeature

DROPS = ("patch_drop", "patch_dropout")
"""what timm's and open_clip's ViT call the module that drops patches; else an identity"""


class _Drop(nn.Module):
    """Keep the P prefix tokens and a random share of the others: [B, P+L, W] to [B, P+K, W]."""

    def __init__(self, hidden: float, prefix: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.prefix = prefix

    def forward(self, tokens: Float[Tensor, "B T W"]) -> Float[Tensor, "B K W"]:
        prefix = tokens[:, : self.prefix]
        patches = tokens[:, self.prefix :]
        count = max(1, round(patches.shape[1] * (1 - self.hidden)))
        keep = torch.rand(patches.shape[:2], device=tokens.device).argsort(dim=1)[:, :count]
        kept = patches.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([prefix, kept], dim=1)


def forward(
    tower: nn.Module, pixels: Float[Tensor, "B 3 H W"], spec: MaskedFeature
) -> Float[Tensor, "B T"]:
    """Return the tower's features of images of which the share `spec.hidden` is not seen.

    Draws from torch's global generator.
    """
    for module in tower.modules():
        for name in DROPS:
            if hasattr(module, name):
                kept = getattr(module, name)
                setattr(module, name, _Drop(spec.hidden, getattr(module, "num_prefix_tokens", 1)))
                try:
                    return tower(pixels)
                finally:
                    setattr(module, name, kept)
    return tower(hide_squares(pixels, spec.hidden, spec.patch))


def hide_squares(
    pixels: Float[Tensor, "B 3 H W"], hidden: float, patch: int
) -> Float[Tensor, "B 3 H W"]:
    """Set round(hidden * squares) squares of each image to 0, the mean normalized color."""
    rows = -(-pixels.shape[2] // patch)
    columns = -(-pixels.shape[3] // patch)
    drawn = torch.rand(len(pixels), rows * columns, device=pixels.device)
    order = drawn.argsort(dim=1).argsort(dim=1)
    seen = (order >= round(hidden * rows * columns)).reshape(-1, 1, rows, columns).to(pixels.dtype)
    seen = seen.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    return pixels * seen[:, :, : pixels.shape[2], : pixels.shape[3]]
