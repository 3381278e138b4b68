"""Small variants of every family that is a student: the blocks of the real one, fewer and
narrower.
"""

import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn
from torch.nn import functional as F

from edgeclip.host import recipe as R
from edgeclip.host import student as students

SIZE, WIDTH = 64, 16
TEXT = {"context_length": 12, "vocab_size": 200, "width": 32, "heads": 2, "layers": 2}


class Unit(nn.Module):
    """A tower and the L2 norm, as a bundle has them."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, x):
        return F.normalize(self.tower(x), dim=-1)


class TextTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return F.normalize(self.model.encode_text(input_ids), dim=-1)


def clip(vision, **text):
    return lambda: CLIP(
        embed_dim=WIDTH, vision_cfg={"image_size": SIZE, **vision}, text_cfg={**TEXT, **text}
    )


def of_timm(name, **shrunk):
    return lambda: timm.create_model(name, num_classes=WIDTH, **shrunk)


FASTVIT = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)}
IMAGE = {
    "MobileCLIP2-S0": of_timm("fastvit_mci0", **FASTVIT),
    "MobileCLIP2-S2": of_timm("fastvit_mci2", **FASTVIT),
    "MobileCLIP-S1": of_timm("fastvit_mci1", **FASTVIT),
    "ViT-B-32": clip({"layers": 2, "width": 64, "head_width": 32, "patch_size": 32}),
    "ViT-B-16": clip({"layers": 2, "width": 64, "head_width": 32, "patch_size": 16}),
    "ViT-S-32-alt": clip({"layers": 2, "width": 48, "head_width": 16, "patch_size": 32}),
    "TinyCLIP-8M-3M": clip({"layers": 2, "width": 64, "head_width": 64, "patch_size": 16}),
    "TinyCLIP-39M-19M": clip({"layers": 3, "width": 64, "head_width": 32, "patch_size": 16}),
    "RN50": clip({"layers": [1, 1, 1, 1], "width": 16, "patch_size": None}),
    "ViTamin-S": of_timm("vitamin_small_224", img_size=SIZE, depth=2),
    "PE-Core-T-16": of_timm("vit_pe_core_tiny_patch16_384", img_size=SIZE, depth=2),
    "SigLIP-B-16": of_timm(
        "vit_base_patch16_siglip_224", img_size=SIZE, depth=2, embed_dim=96, num_heads=4
    ),
    "vit_tiny": of_timm("vit_tiny_patch16_224", img_size=SIZE, depth=2),
    "repvit": of_timm("repvit_m0_9", embed_dim=(16, 32, 48, 64), depth=(1, 1, 1, 1)),
    "mobilenetv4": of_timm("mobilenetv4_conv_small_035"),
    "efficientnet_lite": of_timm("efficientnet_lite0"),
    "ViT on a CNN's stages": lambda: hybrid(),
}
TEXTS = {
    "causal (ViT-B-32, ViT-B-16, ViT-S-32-alt, TinyCLIP, RN50)": clip(
        {"layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
    ),
    "no mask (MobileCLIP)": lambda: custom(no_causal_mask=True),
    "causal, own class (ViTamin, PE-Core)": lambda: custom(),
    "last token, no mask (SigLIP)": lambda: custom(
        no_causal_mask=True, proj_bias=True, pool_type="last"
    ),
}


def hybrid():
    tower = R.Timm(model="vit_tiny_patch16_224", weights="random", image_size=SIZE, depth=2)
    stem = R.Stem(model="efficientnet_lite0", weights="random", stride=16)
    return nn.Sequential(
        students.build(R.Student(tower=tower, stem=stem), WIDTH)[0].tower, nn.Linear(192, WIDTH)
    )


def custom(**text):
    vision = {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32}
    return CustomTextCLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg={**TEXT, **text})


def lively(module):
    """Weights and batch-norm statistics that are not the initial ones: an exporter merges equal
    constants.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn_like(p))
        module.train()
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 0.5
    return module


def image_tower(name):
    torch.manual_seed(0)
    made = IMAGE[name]()
    tower = lively(made.visual if isinstance(made, CLIP) else made)
    with torch.no_grad():
        for _ in range(3):
            tower(torch.randn(4, 3, SIZE, SIZE))
    return Unit(tower).eval()


def text_tower(name):
    torch.manual_seed(0)
    return TextTower(lively(TEXTS[name]())).eval()
