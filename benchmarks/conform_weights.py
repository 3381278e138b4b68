"""Checkpoints in every layout, beside the classes that they come from: how far features differ.

A model of open_clip, timm or transformers gets random weights and writes them as its own library,
its training code or its publisher does. edgeclip reads the file; features of images and texts are
compared with the model's own. `conformance.py` runs this.

    largest difference     of unit features, each layout with each model: at most 1e-5
    tensors without place  or with other values than the reference's own reader gives: none
"""

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import checkpoint_layouts as layouts
import compare
import open_clip
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch.nn import functional as F

from edgeclip.host import recipe as R
from edgeclip.host.towers import weights

MOST = 1e-5
SIGLIP = "vit_siglip_of_two_blocks"
"""timm's vit_base_patch16_siglip_224 with two blocks, which open_clip cannot ask for by itself"""


@timm.models.register_model
def vit_siglip_of_two_blocks(pretrained: bool = False, **more: Any) -> VisionTransformer:
    shape = {"patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3}
    settings = {**shape, "class_token": False, "global_pool": "map", **more}
    return _create_vision_transformer(
        "vit_base_patch16_siglip_224", pretrained=pretrained, **settings
    )


def _text(width: int, layers: int = 2, **more: Any) -> dict[str, Any]:
    heads = width // 64
    return {
        "vocab_size": layouts.VOCABULARY,
        "width": width,
        "heads": heads,
        "layers": layers,
        **more,
    }


def _vit(width: int, patch: int, size: int = 224) -> dict[str, Any]:
    return {"image_size": size, "layers": 2, "width": width, "patch_size": patch}


SIGLIPS_TEXT: dict[str, Any] = {
    "context_length": 64,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
CLIPS: dict[str, dict[str, Any]] = {
    "MobileCLIP2-S0": {
        "embed_dim": 512,
        "vision_cfg": {
            "timm_model_name": "fastvit_mci0",
            "timm_pool": "avg",
            "timm_proj": None,
            "image_size": 256,
        },
        "text_cfg": _text(128, no_causal_mask=True),
        "custom_text": True,
    },
    "ViT-B-32": {"embed_dim": 128, "vision_cfg": _vit(768, 32), "text_cfg": _text(512)},
    "TinyCLIP-ViT-8M-16": {"embed_dim": 128, "vision_cfg": _vit(256, 16), "text_cfg": _text(256)},
    "SigLIP-B/16": {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": SIGLIP,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": _text(192, **SIGLIPS_TEXT),
    },
}
"""open_clip's shapes, two blocks deep"""
TIMMS = {"timm ViT": ("vit_tiny_patch16_224", 2), "timm CNN": ("mobilenetv4_conv_small", None)}
DEFAULT = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def model_of(name: str) -> layouts.Model:
    """Return the reference library's own model, with random weights."""
    torch.manual_seed(0)
    if name in TIMMS:
        model, depth = TIMMS[name]
        return layouts.lively(timm.create_model(model, **({"depth": depth} if depth else {})))
    config = json.loads(json.dumps(CLIPS[name]))
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    return layouts.lively(kind(**config))


def read_by_edgeclip(name: str, file: str, **more: Any) -> layouts.Model:
    """Return what edgeclip makes of a file, under a configuration of the same shape."""
    if name in TIMMS:
        model, depth = TIMMS[name]
        spec = R.Timm(
            model=model, weights=file, image_size=224, depth=depth, like="default", **more
        )
        return weights.timm_model(spec, num_classes=None)[0]
    config = {"model_cfg": CLIPS[name], "preprocess_cfg": DEFAULT}
    return weights.open_clip_model(R.OpenClip(model="own", weights=file, config=config, **more))[0]


@torch.inference_mode()
def difference(ours: layouts.Model, theirs: layouts.Model) -> float:
    """Return the largest difference of unit features, of images and texts."""
    generator = torch.Generator().manual_seed(2)
    if not hasattr(theirs, "visual"):
        x = torch.randn(2, 3, 224, 224, generator=generator)
        return _apart(ours(x), theirs(x))
    size: Any = theirs.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    x = torch.randn(2, 3, side, side, generator=generator)
    length: Any = theirs.context_length
    ids = torch.randint(1, layouts.VOCABULARY - 1, (3, length), generator=generator)
    ids[:, -3] = layouts.VOCABULARY - 1  # the end of a text, where CLIP pools
    images = _apart(ours.encode_image(x), theirs.encode_image(x))
    texts = _apart(ours.encode_text(ids), theirs.encode_text(ids))
    scales = abs(ours.logit_scale.exp().item() - theirs.logit_scale.exp().item())
    return max(images, texts, scales)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of unit rows; rows that are equal whatever the input, or no
    numbers, show nothing and count as apart."""
    error = float((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().max())
    if not math.isfinite(error) or torch.allclose(b[0], b[1]):
        return math.inf
    return error


# --- the rows


class Case(NamedTuple):
    layout: str
    model: str
    difference: float


def cases(folder: Path, names: list[str]) -> list[Case]:
    """Return every layout with every model that is published so."""
    found = []
    for name in names:
        model = model_of(name)
        for layout, write in layouts.LAYOUTS.items():
            file = write(model.state_dict(), _fresh(folder))
            expected = model_of(name)
            if layout in ("float16", "bfloat16"):
                expected.load_state_dict(layouts.half(model.state_dict(), getattr(torch, layout)))
            found.append(Case(layout, name, difference(read_by_edgeclip(name, file), expected)))
        file = layouts.torchscript(model_of(name), _fresh(folder))
        found.append(
            Case("TorchScript archive", name, difference(read_by_edgeclip(name, file), model))
        )
    found += [case for case in publishers(folder) if case.model in names]
    return found


def publishers(folder: Path) -> list[Case]:
    """Return the layouts that belong to one publisher each."""
    found = []
    for name in ("ViT-B-32", "TinyCLIP-ViT-8M-16"):
        clip = layouts.transformers_clip(CLIPS[name])
        here = _fresh(folder)
        clip.save_pretrained(here)
        theirs = layouts.Transformers(clip, 224, 77)
        ours = read_by_edgeclip(name, str(here / "model.safetensors"))
        found.append(Case("transformers", name, difference(ours, theirs)))

        model = model_of(name)
        file = layouts.torch_file(
            {"state_dict": layouts.tinyclips(model.state_dict())}, _fresh(folder)
        )
        found.append(Case("TinyCLIP", name, difference(read_by_edgeclip(name, file), model)))

    siglip = layouts.transformers_siglip()
    here = _fresh(folder)
    siglip.save_pretrained(here, max_shard_size="2MB")
    ours = read_by_edgeclip("SigLIP-B/16", str(here))
    theirs = layouts.Transformers(siglip, 224, 64)
    found.append(Case("transformers, in shards", "SigLIP-B/16", difference(ours, theirs)))

    model = model_of("MobileCLIP2-S0")
    with torch.no_grad():
        model.visual.trunk.head.fc.bias.zero_()
    theirs_names = layouts.apples(model.state_dict())
    _refuse_other_names(model, theirs_names)
    file = layouts.torch_file(theirs_names, _fresh(folder))
    ours = read_by_edgeclip("MobileCLIP2-S0", file)
    found.append(Case("apple's MobileCLIP", "MobileCLIP2-S0", difference(ours, model)))
    return found


def _refuse_other_names(model: layouts.Model, named: layouts.State) -> None:
    """Raise `RuntimeError` where open_clip's own reader of apple's names does not take these."""
    read = open_clip.factory.convert_state_dict(model, dict(named))
    expected = model.state_dict()
    if read.keys() != expected.keys() or any(not read[k].equal(expected[k]) for k in read):
        raise RuntimeError("these are not the names that apple publishes")


def _fresh(folder: Path) -> Path:
    """Return a new folder in place of the one before it: a checkpoint is some 100 MB."""
    for before in folder.iterdir():
        shutil.rmtree(before)
    return Path(tempfile.mkdtemp(dir=folder))


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the required figures. quick: the smaller half of the models."""
    names = [*CLIPS, *TIMMS]
    if quick:
        names = ["TinyCLIP-ViT-8M-16", "SigLIP-B/16", "timm ViT"]
    with tempfile.TemporaryDirectory() as folder:
        found = cases(Path(folder), names)
    required = []
    for name in names:
        of_model = [case for case in found if case.model == name]
        worst = max(of_model, key=lambda case: case.difference)
        required.append(
            compare.exact(
                f"{name}: largest difference of features, {len(of_model)} layouts",
                worst.difference,
                n=len(of_model),
                at_most=MOST,
            )
        )
    apart = sum(not case.difference <= MOST for case in found)
    required.append(
        compare.exact("checkpoints that are read otherwise", apart, n=len(found), at_most=0)
    )
    return required
