"""What training says of each epoch: every loss before its weight, and EduAttention's alpha."""

import torch
from torch import Tensor

from edgeclip.host.student import EduAttentionHead

Log = list[dict[str, int | float]]
"""an epoch each: its number, the means of its losses, alpha; epoch 0 is the projector's"""
BLOCK = 1024
"""steps whose losses are kept as they come"""


class Averages:
    """Means over one epoch: of each loss and step 4 bytes are kept until it ends.

    They stay on the device for a block of steps, so that no step waits for them. A tensor each
    would take half a KiB, which is 200 MB in an epoch of 10^5 steps.
    """

    def __init__(self, so_far: dict[str, Tensor]) -> None:
        """so_far: each loss's values [steps], as `tensors` gives them."""
        self.blocks: list[dict[str, Tensor]] = []
        if so_far:
            self.blocks.append(so_far)
        self.rows: list[dict[str, Tensor]] = []

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one more step."""
        self.rows.append(metrics)
        if len(self.rows) == BLOCK:
            self.blocks.append(_stacked(self.rows))
            self.rows = []

    def tensors(self) -> dict[str, Tensor]:
        """Return each loss's values [steps], in main memory."""
        blocks = list(self.blocks)
        if self.rows:
            blocks.append(_stacked(self.rows))
        if not blocks:
            return {}
        tensors = {}
        for name in blocks[0]:
            tensors[name] = torch.cat([block[name] for block in blocks])
        return tensors

    def row(self, epoch: int, head: EduAttentionHead | None) -> dict[str, int | float]:
        """Return the log's row of the epoch."""
        row: dict[str, int | float] = {"epoch": epoch}
        for name, values in sorted(self.tensors().items()):  # as safetensors gives them back
            row[name] = float(values.mean())
        if head is not None:
            row["alpha"] = head.alpha.item()
        return row


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {}
    for name in rows[0]:
        stacked[name] = torch.stack([row[name] for row in rows]).cpu()
    return stacked
