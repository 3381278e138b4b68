"""The reference libraries' own evaluation transforms, which golden answers are made with.

Built from what a library publishes of the model and not from edgeclip's record of it: so a record
that says something else is noticed where the bundle is made.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import nn

from edgeclip.host.recipe import OpenClip, Timm
from edgeclip.host.towers import assumed
from edgeclip.host.towers.weights import assumed_of

Transform = Callable[[Image.Image], torch.Tensor]
"""an image as Pillow opens it to float32 [3, H, W]"""


def of_open_clip(spec: OpenClip, size: int) -> Transform:
    """Return open_clip's `image_transform_v2` for the model."""
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    cfg = assumed_of(spec).preprocess
    merged = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), cfg), {"size": size})
    transform: Transform = image_transform_v2(PreprocessCfg(**merged), is_train=False)
    return transform


def of_timm(spec: Timm, model: nn.Module) -> Transform:
    """Return timm's `create_transform` for the model, of the RGB image that it expects."""
    from timm.data import create_transform, resolve_data_config

    cfg: Any = assumed.of_timm(spec, model.pretrained_cfg).preprocess
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg), is_training=False)

    def of_rgb(image: Image.Image) -> torch.Tensor:
        x: torch.Tensor = transform(image.convert("RGB"))
        return x

    return of_rgb
