"""Put weights into a model, whoever named them: every tensor finds its place, or nothing is loaded.

What is known beside the model's own names: open_clip's older names for a text tower, TinyCLIP's,
transformers' CLIP and SigLIP, apple's MobileCLIP. Each is a table of names; nothing is matched by
order or by shape. Left out is only what is known to change no answer: a buffer that the model
computes itself, to the same values, a count of batches, the sizes that OpenAI's archives note.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edgeclip.errors import EdgeclipError
from edgeclip.host.towers.checkpoint import State
from edgeclip.host.towers.misfits import COUNT, SCALARS, VISUAL, misfit, refuse_misfits
from edgeclip.progress import say_once

NOTES = ("input_resolution", "context_length", "vocab_size")
"""numbers in OpenAI's archives, which its arrays' shapes say too"""
TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
"""what a text tower's tensors begin with, in a model or in `text.`"""

Table = dict[str, str]
"""regular expression to what it becomes, applied in order"""


def load_into(
    model: nn.Module, state: State, where: str, resize: bool = False, image_only: bool = False
) -> None:
    """Put the tensors into the model.

    resize: positions of another image size are resampled to the model's, as open_clip and timm do.
    image_only: nothing else of an open_clip model is wanted, so an image tower's tensors alone are
    enough. Raises `EdgeclipError` that says all that does not fit.
    """
    state = _renamed(state, model, where)
    if image_only:
        state = _with_the_models_rest(state, model, where)
    state = _without_extras(state, model, where)
    if resize:
        state = _resized(state, model)
    expected = model.state_dict()
    for name in expected.keys() - state.keys():
        if name.endswith(COUNT):
            state[name] = expected[name]
    for name in SCALARS:
        if name in state and name in expected and state[name].numel() == 1:
            state[name] = state[name].reshape(expected[name].shape)
    refuse_misfits(expected, state, where)
    for name, tensor in state.items():
        if not torch.isfinite(tensor.to(expected[name].dtype)).all():
            raise EdgeclipError(
                where, f"'{name}' holds values that are not finite", "take an earlier checkpoint"
            )
    model.load_state_dict(state)


def in_order(model: nn.Module, state: State, where: str) -> State:
    """Return the tensors of the same architecture under another repository's names, by order."""
    names = list(model.state_dict())
    if len(names) != len(state):
        raise misfit(where, f"{len(state)} tensors, and the model has {len(names)}")
    return dict(zip(names, state.values(), strict=True))


# --- what is left out


def _without_extras(state: State, model: nn.Module, where: str) -> State:
    """Return the tensors without those that are known to change no answer."""
    expected = model.state_dict()
    buffers = dict(model.named_buffers())
    kept = {}
    for name, tensor in state.items():
        if name in expected:
            kept[name] = tensor
            continue
        leaf = name.rsplit(".", 1)[-1]
        if leaf == COUNT or (name in NOTES and tensor.numel() == 1):
            continue
        if leaf == "position_ids" and torch.equal(tensor.flatten(), torch.arange(tensor.numel())):
            continue
        if name in buffers:
            _refuse_other_buffer(buffers[name], tensor, f"{where}: {name}")
            continue
        kept[name] = tensor
    return kept


def _refuse_other_buffer(own: torch.Tensor, given: torch.Tensor, where: str) -> None:
    if own.shape == given.shape and torch.equal(own, given.to(own.dtype)):
        return
    raise EdgeclipError(
        where,
        "differs from what the model computes there itself",
        "check that model and weights belong together",
    )


# --- another image size


def _resized(state: State, model: nn.Module) -> State:
    """Return the tensors with positions resampled to the model's image size."""
    from open_clip.model import resize_pos_embed
    from timm.layers import resample_abs_pos_embed

    state = dict(state)
    if hasattr(model, "visual"):
        resize_pos_embed(state, model)
    for name, expected in model.state_dict().items():
        given = state.get(name)
        if not name.endswith("pos_embed") or given is None or given.shape == expected.shape:
            continue
        trunk: Any = model.get_submodule(name.removesuffix("pos_embed").rstrip("."))
        if not hasattr(trunk, "num_prefix_tokens"):
            continue
        prefix = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        state[name] = resample_abs_pos_embed(
            given, list(trunk.patch_embed.grid_size), num_prefix_tokens=prefix
        )
    return state


# --- under which names


def _renamed(state: State, model: nn.Module, where: str) -> State:
    """Return the tensors under the model's names, as far as their layout is known."""
    names = "\n".join(["", *state])
    for prefixes, rename in LAYOUTS.items():
        if all(f"\n{prefix}" in names for prefix in prefixes):
            state = rename(state, model, where)
            break
    return _text_where_it_is(state, model)


def _with_the_models_rest(state: State, model: nn.Module, where: str) -> State:
    """Return an image tower's tensors with what else the model has; other states as they are."""
    own = model.state_dict()
    tower = {name.removeprefix(VISUAL) for name in own if name.startswith(VISUAL)}
    if state.keys() and state.keys() <= tower:  # the tower's own state_dict()
        state = {f"{VISUAL}{name}": tensor for name, tensor in state.items()}
    if not all(name.startswith(VISUAL) or name in SCALARS for name in state):
        return state
    if SCALARS[0] not in state:
        say_once(f"{where}: an image tower alone; logit_scale is open_clip's initial one")
    return {**{k: v for k, v in own.items() if not k.startswith(VISUAL)}, **state}


def _by_table(state: State, table: Table) -> State:
    found = {}
    for name, tensor in state.items():
        for pattern, new in table.items():
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def _text_where_it_is(state: State, model: nn.Module) -> State:
    """Return the tensors with the text tower's in `text.`, or not, as the model has them."""
    inside = hasattr(model, "text")
    if inside and "token_embedding.weight" in state:
        return {f"text.{k}" if k.startswith(TEXT) else k: v for k, v in state.items()}
    if not inside and "text.token_embedding.weight" in state:
        return {k.removeprefix("text."): v for k, v in state.items()}
    return state


# TinyCLIP (microsoft/Cream): each encoder is a module, and may be wrapped for itself.
TINYCLIP: Table = {r"^_(image|text)_encoder\.": "", r"^_logit_scale\.": ""}


def _tinyclip(state: State, model: nn.Module, where: str) -> State:
    return _by_table(state, TINYCLIP)


# transformers: q, k and v are three layers there, and one here.
BLOCKS: Table = {
    r"\bencoder\.layers\.": "transformer.resblocks.",
    r"\blayer_norm([12])\.": r"ln_\1.",
    r"\bself_attn\.qkv\.(weight|bias)$": r"attn.in_proj_\1",
    r"\bself_attn\.out_proj\.": "attn.out_proj.",
    r"\bmlp\.fc1\.": "mlp.c_fc.",
    r"\bmlp\.fc2\.": "mlp.c_proj.",
}
TEXT_OF_TRANSFORMERS: Table = {
    r"^text_model\.embeddings\.token_embedding\.": "token_embedding.",
    r"^text_model\.embeddings\.position_embedding\.weight$": "positional_embedding",
    r"^text_model\.final_layer_norm\.": "ln_final.",
    r"^text_model\.head\.": "text_projection.",
    r"^text_model\.": "",
}
VISION_OF_CLIP: Table = {
    r"^vision_model\.embeddings\.class_embedding$": "visual.class_embedding",
    r"^vision_model\.embeddings\.patch_embedding\.": "visual.conv1.",
    r"^vision_model\.embeddings\.position_embedding\.weight$": "visual.positional_embedding",
    r"^vision_model\.pre_layrnorm\.": "visual.ln_pre.",
    r"^vision_model\.post_layernorm\.": "visual.ln_post.",
    r"^vision_model\.": "visual.",
}
TRUNK = "visual.trunk."
VISION_OF_SIGLIP: Table = {
    r"^vision_model\.embeddings\.patch_embedding\.": f"{TRUNK}patch_embed.proj.",
    r"^vision_model\.embeddings\.position_embedding\.weight$": f"{TRUNK}pos_embed",
    r"^vision_model\.post_layernorm\.": f"{TRUNK}norm.",
    r"^vision_model\.head\.probe$": f"{TRUNK}attn_pool.latent",
    r"^vision_model\.head\.layernorm\.": f"{TRUNK}attn_pool.norm.",
    r"^vision_model\.head\.attention\.out_proj\.": f"{TRUNK}attn_pool.proj.",
    r"^vision_model\.head\.": f"{TRUNK}attn_pool.",
    r"^vision_model\.encoder\.layers\.": f"{TRUNK}blocks.",
    r"\blayer_norm([12])\.": r"norm\1.",
    r"\bself_attn\.qkv\.": "attn.qkv.",
    r"\bself_attn\.out_proj\.": "attn.proj.",
}


def _transformers(state: State, model: nn.Module, where: str) -> State:
    """CLIP's or SigLIP's names of transformers to open_clip's."""
    state = _joined(state, where)
    vision = {k: v for k, v in state.items() if k.startswith("vision_model.")}
    rest = {k: v for k, v in state.items() if k not in vision}
    found = _by_table(rest, {**TEXT_OF_TRANSFORMERS, **BLOCKS})
    if "vision_model.head.probe" in vision:
        found.update(_pooled(_by_table(vision, VISION_OF_SIGLIP)))
        return found
    found.update(_by_table(vision, {**VISION_OF_CLIP, **BLOCKS}))
    if "text_projection.weight" in found and not _has(model, "text_projection.weight"):
        found["text_projection"] = found.pop("text_projection.weight").T
    if "visual_projection.weight" in found:
        found["visual.proj"] = found.pop("visual_projection.weight").T
    return found


def _has(model: nn.Module, name: str) -> bool:
    return any(known.removeprefix("text.") == name for known in model.state_dict())


def _joined(state: State, where: str) -> State:
    """Return the tensors with the three of an attention's q, k and v in one."""
    found = {}
    for name, tensor in state.items():
        match = re.search(r"\bself_attn\.([qkv])_proj\.", name)
        if match is None:
            found[name] = tensor
        elif match[1] == "q":
            three = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            absent = [n for n in three if n not in state]
            if absent:
                raise misfit(where, f"1 missing (first: {absent[0]})")
            found[name.replace(".q_proj.", ".qkv.")] = torch.cat([state[n] for n in three])
    return found


def _pooled(state: State) -> State:
    """Return SigLIP's image tower with timm's attention pooling: q apart from k and v."""
    pool = f"{TRUNK}attn_pool."
    found = dict(state)
    for kind in ("weight", "bias"):
        three = found.pop(f"{pool}attention.in_proj_{kind}")
        width = len(three) // 3
        found[f"{pool}q.{kind}"] = three[:width]
        found[f"{pool}kv.{kind}"] = three[width:]
    found[f"{TRUNK}pos_embed"] = found[f"{TRUNK}pos_embed"][None]
    return found


# apple's MobileCLIP
TEXT_OF_APPLE: Table = {
    r"^text_encoder\.": "text.",
    r"\bprojection_layer$": "text_projection",
    r"\bembedding_layer\.": "token_embedding.",
    r"\bpositional_embedding\.pos_embed\.pos_embed$": "positional_embedding",
    r"\bfinal_layer_norm\.": "ln_final.",
    r"\btransformer\.(\d+)\.": r"transformer.resblocks.\1.",
    r"\bpre_norm_mha\.0\.": "ln_1.",
    r"\bpre_norm_mha\.1\.qkv_proj\.(weight|bias)$": r"attn.in_proj_\1",
    r"\bpre_norm_mha\.1\.": "attn.",
    r"\bpre_norm_ffn\.0\.": "ln_2.",
    r"\bpre_norm_ffn\.1\.": "mlp.c_fc.",
    r"\bpre_norm_ffn\.4\.": "mlp.c_proj.",
}
VIT_OF_APPLE: Table = {
    r"^image_encoder\.model\.": TRUNK,
    r"\bpatch_emb\.": "patch_embed.backbone.",
    r"\bblock\.conv\.": "conv.",
    r"\bblock\.norm\.": "bn.",
    r"\bpos_embed\.pos_embed\.pos_embed$": "pos_embed",
    r"\bpost_transformer_norm\.": "norm.",
    r"\btransformer\.(\d+)\.": r"blocks.\1.",
    r"\bpre_norm_mha\.0\.": "norm1.",
    r"\bpre_norm_mha\.1\.qkv_proj\.": "attn.qkv.",
    r"\bpre_norm_mha\.1\.out_proj\.": "attn.proj.",
    r"\bpre_norm_ffn\.0\.": "norm2.",
    r"\bpre_norm_ffn\.1\.": "mlp.fc1.",
    r"\bpre_norm_ffn\.4\.": "mlp.fc2.",
    r"\bclassifier\.proj$": "head.weight",
}


def _mobileclip(state: State, model: nn.Module, where: str) -> State:
    text = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
    image = {k: v for k, v in state.items() if k.startswith("image_encoder.")}
    found = {k: v for k, v in state.items() if k not in text and k not in image}
    found.update(_by_table(text, TEXT_OF_APPLE))
    positions = found.get("text.positional_embedding")
    if positions is not None:
        found["text.positional_embedding"] = positions.reshape(positions.shape[-2:])
    if not hasattr(getattr(model, "visual", None), "trunk"):
        raise misfit(where, "they are of apple's MobileCLIP", "choose a MobileCLIP of open_clip")
    if any(".patch_emb." in name for name in image):
        found.update(_apples_vit(image))
        return found
    from timm.models.fastvit import checkpoint_filter_fn

    trunk = checkpoint_filter_fn(image, model.visual.trunk)
    found.update({f"{TRUNK}{k}": v for k, v in trunk.items()})
    return found


def _apples_vit(image: State) -> State:
    found = _by_table(image, VIT_OF_APPLE)
    head = found.get(f"{TRUNK}head.weight")
    if head is not None:  # a plain projection there, a linear layer here
        found[f"{TRUNK}head.weight"] = head.T
        found[f"{TRUNK}head.bias"] = torch.zeros(head.shape[1])
    positions = found.get(f"{TRUNK}pos_embed")
    if positions is not None:
        found[f"{TRUNK}pos_embed"] = positions.reshape(1, *positions.shape[-2:])
    return found


LAYOUTS: dict[tuple[str, ...], Callable[[State, nn.Module, str], State]] = {
    ("_image_encoder.", "_text_encoder."): _tinyclip,
    ("image_encoder.model.", "text_encoder."): _mobileclip,
    ("vision_model.", "text_model."): _transformers,
    # one of the two towers alone
    ("_image_encoder.",): _tinyclip,
    ("image_encoder.model.",): _mobileclip,
    ("vision_model.embeddings.",): _transformers,
    ("text_model.embeddings.",): _transformers,
}
"""what some names of a layout begin with, to how it becomes open_clip's"""
