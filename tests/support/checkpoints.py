"""Checkpoints as their publishers write them: what benchmarks/conform_weights.py compares."""

import sys

from tests.support.files import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import checkpoint_layouts
import conform_weights

CNN = "mobilenetv4_conv_small_035"
"""a timm model of 2 M numbers"""

__all__ = ["CNN", "checkpoint_layouts", "conform_weights"]
