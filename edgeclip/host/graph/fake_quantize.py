"""Rounding that can be learned: an activation's scale (LSQ) and each weight's direction (AdaRound).

Training with a target's rounding and reconstruction after training stand on it. Sources: Esser et
al. 2020, section 2.1; Nagel et al. 2020, equations 21 to 25.
"""

import torch
from torch import Tensor, nn

SMALLEST = 1e-6
"""the least scale: a channel of zeros has none"""
STRETCH = (-0.1, 1.1)
"""AdaRound's sigmoid is stretched and cut off, so that it reaches 0 and 1"""


class FakeQuantize(nn.Module):
    """Round a tensor as int8 does, with a learned scale.

    The zero point is calibration's. The gradient passes through the rounding.
    """

    def __init__(self, low: float, high: float, symmetric: bool) -> None:
        """low, high: the range that calibration found."""
        super().__init__()
        low = min(low, 0.0)
        high = max(high, 0.0)
        if symmetric:
            self.bottom = -128
            self.top = 127
            scale = max(-low, high) / 127
        else:
            self.bottom = 0
            self.top = 255
            scale = (high - low) / 255
        scale = max(scale, SMALLEST)
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.zero_point = 0
        if not symmetric:
            self.zero_point = round(-low / scale)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        q = x / scale
        q = (q + (q.round() - q).detach() + self.zero_point).clamp(self.bottom, self.top)
        return (q - self.zero_point) * scale

    def range(self) -> tuple[float, float]:
        """Return the range of which ONNX Runtime's quantizer makes this scale and zero point.

        It spreads a symmetric range over 254 steps.
        """
        scale = self.log_scale.exp().item()
        if self.bottom:
            return -127 * scale, 127 * scale
        return -self.zero_point * scale, (255 - self.zero_point) * scale


class LearnedRounding(nn.Module):
    """Weights of which each learns whether it is rounded up or down."""

    def __init__(self, weight: Tensor, scale: Tensor, top: float) -> None:
        """scale: of each output channel, in a shape that goes with `weight`; top: the most steps.

        The largest weight of a channel stays as it is: a quantizer takes the scale from it.
        """
        super().__init__()
        steps = weight / scale
        self.full = weight
        self.scale = scale
        self.top = top
        self.below = steps.floor().clamp(-top, top)
        self.largest = steps.abs() > top - 1e-3
        low, high = STRETCH
        part = ((steps - self.below).clamp(0, 1) - low) / (high - low)
        self.direction = nn.Parameter(torch.logit(part))

    def up(self) -> Tensor:
        """Return how far each weight is rounded up, 0..1."""
        low, high = STRETCH
        return (torch.sigmoid(self.direction) * (high - low) + low).clamp(0, 1)

    def forward(self, hard: bool = False) -> Tensor:
        """Return the weight; hard: on the grid of integers times scale."""
        up = self.up()
        if hard:
            up = (up >= 0.5).float()
        steps = (self.below + up).clamp(-self.top, self.top)
        return torch.where(self.largest, self.full, steps * self.scale)

    def undecided(self, exponent: float) -> Tensor:
        """Return AdaRound's regularizer, its mean over the weights: 0 where all are decided."""
        return (1 - (2 * self.up() - 1).abs() ** exponent).mean()
