"""Put early convolutions, a pretrained CNN's first stages, before a ViT's blocks.

A vision transformer from random weights needs far more images than a small set has: its first
layers must find out what edges are. Here a CNN that knows gives a map of features, and the
transformer starts from patches of that (timm's HybridEmbed; Xiao et al. 2021, arXiv 2106.14881;
LeViT). The map is convolutional and is quantized, and its batch norms folded, like any other; the
blocks behind it are the ViT's own.
"""

import msgspec
import torch
from timm.layers import HybridEmbed, resample_abs_pos_embed
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from edgeclip.device.preprocess import Preprocess
from edgeclip.errors import EdgeclipError
from edgeclip.host import recipe as R
from edgeclip.host.towers import weights


def put_stem(tower: nn.Module, spec: R.Stem, preprocess: Preprocess) -> Preprocess:
    """Put the stages into a timm ViT tower, in place, where its patch embedding was.

    Return the preprocessing, which is the CNN's at the ViT's size. Raises `EdgeclipError` for a
    tower that is no timm ViT, a stride that the CNN has no stage of, and a map that no whole number
    of patches covers.
    """
    if not isinstance(tower, VisionTransformer) or tower.pos_embed is None:
        raise EdgeclipError(
            "student.stem",
            f"goes before a ViT of timm, and student.tower is a {type(tower).__name__}",
            "choose a ViT, or set stem to null",
        )
    size = preprocess.size
    cnn, own = weights.timm_model(R.Timm(model=spec.model, weights=spec.weights, image_size=size))
    stages = FeatureGetterNet(cnn, out_indices=(_last_stage(cnn, spec),), norm=False)
    if size % (spec.stride * spec.patch):
        raise EdgeclipError(
            "student.stem",
            f"{size} px is no multiple of stride times patch, {spec.stride * spec.patch}",
            "choose another image_size or patch",
        )
    before = tower.patch_embed.grid_size
    torch.manual_seed(spec.seed)
    tower.patch_embed = HybridEmbed(
        stages, img_size=size, patch_size=spec.patch, embed_dim=tower.embed_dim
    )
    prefix = 0 if tower.no_embed_class else tower.num_prefix_tokens
    positions = resample_abs_pos_embed(
        tower.pos_embed,
        list(tower.patch_embed.grid_size),
        old_size=list(before),
        num_prefix_tokens=prefix,
    )
    tower.pos_embed = nn.Parameter(positions.detach().clone())
    return msgspec.structs.replace(own, size=size)


def _last_stage(cnn: nn.Module, spec: R.Stem) -> int:
    """Return the index of the last stage of the stride that the recipe asks for."""
    stages = getattr(cnn, "feature_info", None)
    strides = []
    known = "its stages are not known to timm"
    if isinstance(stages, list):
        strides = [stage["reduction"] for stage in stages]
        known = f"its strides are {', '.join(map(str, sorted(set(strides))))}"
    if spec.stride not in strides:
        raise EdgeclipError(
            "student.stem.stride",
            f"{spec.model} has no stage of stride {spec.stride}; {known}",
            "choose another stride or model",
        )
    return len(strides) - 1 - strides[::-1].index(spec.stride)
