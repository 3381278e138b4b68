"""Checkpoints as libraries, training codes and publishers write them: a state dict, and how it lies
on disk. `conform_weights.py` reads them back.
"""

import argparse
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

State = dict[str, torch.Tensor]
Model = Any
"""open_clip's, timm's or transformers' module: their methods are known to no type checker"""
VOCABULARY = 1000


def lively(model: Model) -> Model:
    """Return the model in eval mode with random numbers everywhere, biases and norms too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.startswith("logit_"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += noise.abs() * 0.1 if name.endswith("running_var") else noise * 0.02
    return model.eval()


# --- layouts: a state dict, and how it lies on disk


def plain(state: State, folder: Path) -> str:
    return _safe(state, folder / "model.safetensors")


def _safe(state: State, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return str(path)


def torch_file(content: Any, folder: Path) -> str:
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
    return torch_file(content, folder)


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
    return f"{torch_file(content, folder)}:state_dict_ema"


def _nested(state: State, folder: Path) -> str:
    prefixed = {f"model.module._orig_mod.{k}": v for k, v in state.items()}
    return torch_file({"model": {"state_dict": prefixed}, "step": torch.tensor(3)}, folder)


def _prefixed(state: State, folder: Path) -> str:
    return plain({f"_orig_mod.module.model.{k}": v for k, v in state.items()}, folder)


def sharded(state: State, folder: Path) -> str:
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
    return torch_file({**state, **more, **counts, **scalars}, folder)


def _is_mean(name: str) -> bool:
    return name.endswith("running_mean")


def _without_counts(state: State, folder: Path) -> str:
    return plain({k: v for k, v in state.items() if "num_batches_tracked" not in k}, folder)


def half(state: State, dtype: torch.dtype) -> State:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


LAYOUTS: dict[str, Callable[[State, Path], str]] = {
    "safetensors": plain,
    "torch state dict": torch_file,
    "open_clip training checkpoint": _training,
    "timm training checkpoint, FILE:state_dict_ema": _averaged,
    "nested twice, with prefixes": _nested,
    "prefixes in safetensors": _prefixed,
    "index and three shards": sharded,
    "extra buffers, scalars of shape [1]": _with_buffers,
    "without counts of batches": _without_counts,
    "float16": lambda state, folder: plain(half(state, torch.float16), folder),
    "bfloat16": lambda state, folder: torch_file(half(state, torch.bfloat16), folder),
}


@torch.no_grad()
def torchscript(model: Model, folder: Path) -> str:
    """As OpenAI published CLIP: traced, with sizes among its numbers."""
    path = str(folder / "archive.pt")
    if not hasattr(model, "visual"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(model, torch.zeros(1, 3, 224, 224)).save(path)
        return path
    length: Any = model.context_length
    size = torch.tensor(side_of(model))
    model.register_buffer("input_resolution", size)
    images = torch.zeros(1, 3, int(size), int(size))
    texts = torch.zeros(1, length, dtype=torch.long)
    inputs = {"encode_image": (images,), "encode_text": (texts,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a trace keeps as a constant, and of its age
        torch.jit.trace_module(model, inputs, check_trace=False).save(path)
    return path


def side_of(model: Model) -> int:
    size: Any = model.visual.image_size
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


def transformers_clip(config: dict[str, Any]) -> Model:
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


def transformers_siglip() -> Model:
    """Return transformers' SiglipModel of the benchmark's SigLIP shape."""
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

    def __init__(self, model: Model, size: int, length: int):
        super().__init__()
        self.model = model
        self.visual = nn.Identity()
        self.visual.image_size = size
        self.context_length = length
        self.logit_scale = model.logit_scale

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return _rows(self.model.get_image_features(pixel_values=pixels))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        return _rows(self.model.get_text_features(input_ids=ids))


def _rows(out: Any) -> torch.Tensor:
    rows: torch.Tensor = getattr(out, "pooler_output", out)
    return rows
