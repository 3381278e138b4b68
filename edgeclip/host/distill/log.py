"""What training says of each epoch: every loss before its weight, and EduAttention's alpha."""

import torch
from torch import Tensor

from edgeclip.host.student import EduAttentionHead

Log = list[dict[str, int | float]]
"""an epoch each: its number, the means of its losses, alpha; epoch 0 is the projector's"""


class Averages:
    """Means over one epoch, kept on the device until they are asked for."""

    def __init__(self, so_far: dict[str, Tensor]) -> None:
        """so_far: each loss's values [steps], as `tensors` gives them."""
        self.rows: list[dict[str, Tensor]] = []
        for values in zip(*so_far.values(), strict=True):
            self.rows.append(dict(zip(so_far, values, strict=True)))

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one more step."""
        self.rows.append(metrics)

    def tensors(self) -> dict[str, Tensor]:
        """Return each loss's values [steps]."""
        if not self.rows:
            return {}
        tensors = {}
        for name in self.rows[0]:
            tensors[name] = torch.stack([row[name] for row in self.rows])
        return tensors

    def row(self, epoch: int, head: EduAttentionHead | None) -> dict[str, int | float]:
        """Return the log's row of the epoch."""
        row: dict[str, int | float] = {"epoch": epoch}
        for name, values in sorted(self.tensors().items()):  # as safetensors gives them back
            row[name] = float(values.mean())
        if head is not None:
            row["alpha"] = head.alpha.item()
        return row
