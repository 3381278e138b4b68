"""Checkpoints in every layout, beside the classes that they come from: how far features differ.

A model of open_clip, timm or transformers gets random weights and writes them as its own library,
its training code or its publisher does. edgeclip reads the file; features of images and texts are
compared with the model's own. `conformance.py` runs this.

    largest difference     of unit features, each layout with each model: at most 1e-5
    tensors without place  or with other values than the reference's own reader gives: none
"""

import argparse
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import compare
import open_clip
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import nn
from torch.nn import functional as F

from edgeclip.host import recipe as R
from edgeclip.host.towers import weights

State = dict[str, torch.Tensor]
MOST = 1e-5
VOCABULARY = 1000
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
    return {"vocab_size": VOCABULARY, "width": width, "heads": heads, "layers": layers, **more}


def _vit(width: int, patch: int, size: int = 224) -> dict[str, Any]:
    return {"image_size": size, "layers": 2, "width": width, "patch_size": patch}


SIGLIPS_TEXT = {
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


def lively(model: nn.Module) -> nn.Module:
    """Return the model in eval mode with random numbers everywhere, biases and norms too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.startswith("logit_"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += noise.abs() * 0.1 if name.endswith("running_var") else noise * 0.02
    return model.eval()


def model_of(name: str) -> nn.Module:
    """Return the reference library's own model, with random weights."""
    torch.manual_seed(0)
    if name in TIMMS:
        model, depth = TIMMS[name]
        return lively(timm.create_model(model, **({"depth": depth} if depth else {})))
    config = json.loads(json.dumps(CLIPS[name]))
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    return lively(kind(**config))


def read_by_edgeclip(name: str, file: str, **more: Any) -> nn.Module:
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
def difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Return the largest difference of unit features, of images and texts."""
    generator = torch.Generator().manual_seed(2)
    if not hasattr(theirs, "visual"):
        x = torch.randn(2, 3, 224, 224, generator=generator)
        return _apart(ours(x), theirs(x))
    size: Any = theirs.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    x = torch.randn(2, 3, side, side, generator=generator)
    length: Any = theirs.context_length
    ids = torch.randint(1, VOCABULARY - 1, (3, length), generator=generator)
    ids[:, -3] = VOCABULARY - 1  # the end of a text, where CLIP pools
    images = _apart(ours.encode_image(x), theirs.encode_image(x))  # type: ignore[operator]
    texts = _apart(ours.encode_text(ids), theirs.encode_text(ids))  # type: ignore[operator]
    scales = abs(ours.logit_scale.exp().item() - theirs.logit_scale.exp().item())  # type: ignore
    return max(images, texts, scales)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of unit rows; rows that are equal whatever the input, or no
    numbers, show nothing and count as apart."""
    error = float((F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().max())
    if not math.isfinite(error) or torch.allclose(b[0], b[1]):
        return math.inf
    return error


# --- layouts: a state dict, and how it lies on disk


def _plain(state: State, folder: Path) -> str:
    return _safe(state, folder / "model.safetensors")


def _safe(state: State, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return str(path)


def _torch(content: Any, folder: Path) -> str:
    path = folder / "checkpoint.pt"
    torch.save(content, path)
    return str(path)


def _training(state: State, folder: Path) -> str:
    """What open_clip's training writes: data parallel, with the optimizer."""
    optimizer = torch.optim.AdamW([torch.zeros(3, requires_grad=True)])
    prefixed = {f"module.{k}": v for k, v in state.items()}
    content = {
        "epoch": 3,
        "name": "a run",
        "state_dict": prefixed,
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
    }
    return _torch(content, folder)


def _averaged(state: State, folder: Path) -> str:
    """What timm's training writes: an average beside the weights, and the command's arguments."""
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    content = {
        "epoch": 3,
        "arch": "a model",
        "state_dict": other,
        "state_dict_ema": state,
        "args": argparse.Namespace(lr=0.1),
        "version": 2,
    }
    return f"{_torch(content, folder)}:state_dict_ema"


def _nested(state: State, folder: Path) -> str:
    prefixed = {f"model.module._orig_mod.{k}": v for k, v in state.items()}
    return _torch({"model": {"state_dict": prefixed}, "step": torch.tensor(3)}, folder)


def _prefixed(state: State, folder: Path) -> str:
    return _plain({f"_orig_mod.module.model.{k}": v for k, v in state.items()}, folder)


def _sharded(state: State, folder: Path) -> str:
    names = sorted(state)
    places = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = {k: state[k] for k in names[i::3]}
        _safe(part, folder / file)
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def _with_buffers(state: State, folder: Path) -> str:
    more = {"text.transformer.embeddings.position_ids": torch.arange(77)[None]}
    counts = {f"{k[:-12]}num_batches_tracked": torch.tensor(7) for k in state if _is_mean(k)}
    scalars = {k: v.reshape(1) for k, v in state.items() if k.startswith("logit_")}
    return _torch({**state, **more, **counts, **scalars}, folder)


def _is_mean(name: str) -> bool:
    return name.endswith("running_mean")


def _without_counts(state: State, folder: Path) -> str:
    return _plain({k: v for k, v in state.items() if "num_batches_tracked" not in k}, folder)


def _half(state: State, dtype: torch.dtype) -> State:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


LAYOUTS: dict[str, Callable[[State, Path], str]] = {
    "safetensors": _plain,
    "torch state dict": _torch,
    "open_clip training checkpoint": _training,
    "timm training checkpoint, FILE:state_dict_ema": _averaged,
    "nested twice, with prefixes": _nested,
    "prefixes in safetensors": _prefixed,
    "index and three shards": _sharded,
    "extra buffers, scalars of shape [1]": _with_buffers,
    "without counts of batches": _without_counts,
    "float16": lambda state, folder: _plain(_half(state, torch.float16), folder),
    "bfloat16": lambda state, folder: _torch(_half(state, torch.bfloat16), folder),
}


@torch.no_grad()
def _torchscript(model: nn.Module, folder: Path) -> str:
    """As OpenAI published CLIP: traced, with sizes among its numbers."""
    path = str(folder / "archive.pt")
    if not hasattr(model, "visual"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(model, torch.zeros(1, 3, 224, 224)).save(path)
        return path
    length: Any = model.context_length
    size = torch.tensor(_side(model))
    model.register_buffer("input_resolution", size)
    images = torch.zeros(1, 3, int(size), int(size))
    texts = torch.zeros(1, length, dtype=torch.long)
    inputs = {"encode_image": (images,), "encode_text": (texts,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a trace keeps as a constant, and of its age
        torch.jit.trace_module(model, inputs, check_trace=False).save(path)
    return path


def _side(model: nn.Module) -> int:
    size: Any = model.visual.image_size  # type: ignore[union-attr]
    return size[0] if isinstance(size, tuple) else size


# --- publishers' own names


def tinyclips(state: State) -> State:
    """microsoft's TinyCLIP: three modules, each data parallel for itself."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            found[f"_image_encoder.module.{name}"] = tensor
        elif name == "logit_scale":
            found[f"_logit_scale.module.{name}"] = tensor
        else:
            found[f"_text_encoder.module.{name}"] = tensor
    return found


APPLES = {
    r"^visual\.trunk\.": "image_encoder.model.",
    r"^text\.": "text_encoder.",
    r"\btext_projection$": "projection_layer",
    r"\btoken_embedding\.": "embedding_layer.",
    r"^text_encoder\.positional_embedding$": "text_encoder.positional_embedding.pos_embed.pos_embed",
    r"\bln_final\.": "final_layer_norm.",
    r"\bresblocks\.": "",
    r"\bln_1\.": "pre_norm_mha.0.",
    r"\battn\.in_proj_(weight|bias)$": r"pre_norm_mha.1.qkv_proj.\1",
    r"\battn\.out_proj\.": "pre_norm_mha.1.out_proj.",
    r"\bln_2\.": "pre_norm_ffn.0.",
    r"\bmlp\.c_fc\.": "pre_norm_ffn.1.",
    r"\bmlp\.c_proj\.": "pre_norm_ffn.4.",
}
APPLES_FASTVIT = {
    r"\bstem\.": "patch_embed.",
    r"\bmlp\.": "convffn.",
    r"\bconv_kxk\b": "rbr_conv",
    r"\bconv_scale\b": "rbr_scale",
    r"\bidentity\b": "rbr_skip",
    r"\bfinal_conv\b": "conv_exp",
    r"\blarge_conv\b": "lkb_origin",
    r"\bse\.fc1\b": "se.reduce",
    r"\bse\.fc2\b": "se.expand",
    r"layer_scale_([0-9])\.gamma$": r"layer_scale_\1",
    r"layer_scale\.gamma$": "layer_scale",
}


def apples(state: State) -> State:
    """apple's MobileCLIP: a flat list of blocks and downsamplings, a projection without a bias."""
    found: State = {}
    places: dict[str, int] = {}
    for name in state:  # stages in a flat list: a downsampling, then its blocks
        match = re.match(r"visual\.trunk\.(stages\.\d+\.(?:downsample|pos_emb|blocks))\.", name)
        if match and match[1] not in places:
            places[match[1]] = len(places)
    for name, tensor in state.items():
        if name == "visual.trunk.head.fc.bias":
            continue
        if name == "visual.trunk.head.fc.weight":
            found["image_encoder.model.head.proj"] = tensor.T
            continue
        new = name
        for place, number in places.items():
            new = new.replace(f".{place}.downsample.", f".network.{number}.")
            kind = "proj." if place.endswith("downsample") else ""
            kind = "pe." if place.endswith("pos_emb") else kind
            new = new.replace(f".{place}.", f".network.{number}.{kind}")
        new = new.replace(".proj.proj.", ".proj.").replace(".pe.pos_enc.", ".pe.")
        tables = [APPLES]
        if name.startswith("visual."):
            tables.append(APPLES_FASTVIT)
        for table in tables:
            for pattern, to in table.items():
                new = re.sub(pattern, to, new)
        if new.endswith("pos_embed.pos_embed"):
            tensor = tensor[None, None]
        found[new] = tensor
    return found


def transformers_clip(config: dict[str, Any]) -> nn.Module:
    """Return transformers' CLIPModel of an open_clip configuration's shape."""
    from transformers import CLIPConfig, CLIPModel

    vision, text = config["vision_cfg"], config["text_cfg"]
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu"}
    return lively(
        CLIPModel(
            CLIPConfig(
                projection_dim=config["embed_dim"],
                vision_config={
                    **shared,
                    "hidden_size": vision["width"],
                    "intermediate_size": 4 * vision["width"],
                    "num_attention_heads": vision["width"] // 64,
                    "image_size": vision["image_size"],
                    "patch_size": vision["patch_size"],
                },
                text_config={
                    **shared,
                    "hidden_size": text["width"],
                    "intermediate_size": 4 * text["width"],
                    "num_attention_heads": text["heads"],
                    "vocab_size": VOCABULARY,
                    "max_position_embeddings": 77,
                    "bos_token_id": 0,
                    "eos_token_id": VOCABULARY - 1,
                },
            )
        )
    )


def transformers_siglip() -> nn.Module:
    """Return transformers' SiglipModel of the shape of `SIGLIP`."""
    from transformers import SiglipConfig, SiglipModel

    shared = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_act": "gelu",
    }
    vision = {**shared, "image_size": 224, "patch_size": 16}
    text = {**shared, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return lively(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))


class Transformers(nn.Module):
    """transformers' model with open_clip's face."""

    def __init__(self, model: nn.Module, size: int, length: int):
        super().__init__()
        self.model = model
        self.visual = nn.Identity()
        self.visual.image_size = size  # type: ignore[assignment]
        self.context_length = length
        self.logit_scale = model.logit_scale

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return _rows(self.model.get_image_features(pixel_values=pixels))  # type: ignore[operator]

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return _rows(self.model.get_text_features(input_ids=ids))  # type: ignore[operator]


def _rows(out: Any) -> torch.Tensor:
    rows: torch.Tensor = getattr(out, "pooler_output", out)
    return rows


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
        for layout, write in LAYOUTS.items():
            file = write(model.state_dict(), _fresh(folder))
            expected = model_of(name)
            if layout in ("float16", "bfloat16"):
                expected.load_state_dict(_half(model.state_dict(), getattr(torch, layout)))
            found.append(Case(layout, name, difference(read_by_edgeclip(name, file), expected)))
        file = _torchscript(model_of(name), _fresh(folder))
        found.append(
            Case("TorchScript archive", name, difference(read_by_edgeclip(name, file), model))
        )
    found += [case for case in publishers(folder) if case.model in names]
    return found


def publishers(folder: Path) -> list[Case]:
    """Return the layouts that belong to one publisher each."""
    found = []
    for name in ("ViT-B-32", "TinyCLIP-ViT-8M-16"):
        clip = transformers_clip(CLIPS[name])
        here = _fresh(folder)
        clip.save_pretrained(here)  # type: ignore[operator]
        theirs = Transformers(clip, 224, 77)
        ours = read_by_edgeclip(name, str(here / "model.safetensors"))
        found.append(Case("transformers", name, difference(ours, theirs)))

        model = model_of(name)
        file = _torch({"state_dict": tinyclips(model.state_dict())}, _fresh(folder))
        found.append(Case("TinyCLIP", name, difference(read_by_edgeclip(name, file), model)))

    siglip = transformers_siglip()
    here = _fresh(folder)
    siglip.save_pretrained(here, max_shard_size="2MB")  # type: ignore[operator]
    ours = read_by_edgeclip("SigLIP-B/16", str(here))
    theirs = Transformers(siglip, 224, 64)
    found.append(Case("transformers, in shards", "SigLIP-B/16", difference(ours, theirs)))

    model = model_of("MobileCLIP2-S0")
    with torch.no_grad():
        model.visual.trunk.head.fc.bias.zero_()  # type: ignore[union-attr]
    theirs_names = apples(model.state_dict())
    _refuse_other_names(model, theirs_names)
    file = _torch(theirs_names, _fresh(folder))
    ours = read_by_edgeclip("MobileCLIP2-S0", file)
    found.append(Case("apple's MobileCLIP", "MobileCLIP2-S0", difference(ours, model)))
    return found


def _refuse_other_names(model: nn.Module, named: State) -> None:
    """Raise `RuntimeError` where open_clip's own reader of apple's names does not take these."""
    read = open_clip.factory.convert_state_dict(model, dict(named))
    expected = model.state_dict()
    if read.keys() != expected.keys() or any(not read[k].equal(expected[k]) for k in read):
        raise RuntimeError("these are not the names that apple publishes")


def _fresh(folder: Path) -> Path:
    """Return a new folder, after the one before it: a checkpoint is some 100 MB."""
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
