"""Masked images for CLIP-KD's MFD: the student sees few patches, without mask tokens in the place of the others.

A ViT drops the tokens, as the paper does, and is the cheaper for it. Another tower gets the image with squares of the
mean color, which is as near as a convolution comes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from edgeclip.host.recipe import MaskedFeature

DROPS = ("patch_drop", "patch_dropout")
"""Where timm's and open_clip's ViT call what drops patches; an identity unless asked for."""


class _Drop(nn.Module):
    """Tokens [B, P + L, W] to [B, P + kept, W]: the P prefix tokens stay, and a random share of the others."""

    def __init__(self, hidden: float, prefix: int):
        super().__init__()
        self.hidden, self.prefix = hidden, prefix

    def forward(self, tokens: Float[Tensor, "B T W"]) -> Float[Tensor, "B K W"]:
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        count = max(1, round(patches.shape[1] * (1 - self.hidden)))
        keep = torch.rand(patches.shape[:2], device=tokens.device).argsort(dim=1)[:, :count]
        return torch.cat(
            [prefix, patches.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))], dim=1
        )


def forward(
    tower: nn.Module, pixels: Float[Tensor, "B 3 H W"], spec: MaskedFeature
) -> Float[Tensor, "B T"]:
    """The tower's features of images of which the share `spec.hidden` is not seen. Draws from torch's global generator."""
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
    """round(hidden * squares) squares of each image become 0, the mean color of normalized pixels."""
    rows, columns = -(-pixels.shape[2] // patch), -(-pixels.shape[3] // patch)
    order = (
        torch.rand(len(pixels), rows * columns, device=pixels.device).argsort(dim=1).argsort(dim=1)
    )
    seen = (order >= round(hidden * rows * columns)).reshape(-1, 1, rows, columns).to(pixels.dtype)
    seen = seen.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    return pixels * seen[:, :, : pixels.shape[2], : pixels.shape[3]]
