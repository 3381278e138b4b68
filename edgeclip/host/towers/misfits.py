"""Say in one line why weights do not fit a model, and what to do about it.

The reasons that people meet: another image size, another vocabulary, one tower of the two, a weight
in parts (adapters, quantized numbers), a prefix, one shard of several.
"""

import re
from collections import Counter
from collections.abc import Set
from pathlib import Path

import torch

from edgeclip.errors import EdgeclipError
from edgeclip.host.towers import checkpoint
from edgeclip.host.towers.checkpoint import State

COUNT = "num_batches_tracked"
SCALARS = ("logit_scale", "logit_bias")
VISUAL = "visual."
"""what an open_clip model's image tower begins with"""
IN_PARTS = {
    r"\.(lora_|base_layer\b|modules_to_save\b)": "merge the adapter first (peft: "
    "model.merge_and_unload().save_pretrained(FOLDER))",
    r"\.(SCB|absmax|quant_map|quant_state\b.*|weight_format|weight_scale|scales|qzeros|qweight)$": (
        "its numbers are quantized: give the float weights, edgeclip quantizes by itself"
    ),
    r"\.(parametrizations\.|weight_g$|weight_v$|r$|theta$)": "compute each whole weight and save "
    "it (torch: parametrize.remove_parametrizations, remove_weight_norm)",
}
"""what a weight in parts is called, to what to do about it"""


def misfit(where: str, what: str, do: str | None = None) -> EdgeclipError:
    return EdgeclipError(
        where,
        f"these weights do not fit the model: {what}",
        do or "check that model and weights belong together",
    )


def refuse_misfits(expected: State, state: State, where: str) -> None:
    """Raise `EdgeclipError` unless every tensor has its place, its shape and its type."""
    common = sorted(expected.keys() & state.keys())
    shapes = [k for k in common if expected[k].shape != state[k].shape]
    types = [k for k in common if _other_type(expected[k], state[k])]
    misfits = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "of another shape": shapes,
        "of another type": types,
    }
    what = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in misfits.items() if names]
    if not what:
        return
    advice = (
        _of_one_shard(where)
        or _of_shapes(expected, state, shapes)
        or _in_parts(state.keys() - expected.keys())
    )
    raise misfit(where, ", ".join(what), advice or _of_names(expected, state, where))


def _other_type(expected: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether a tensor is no number of the model's kind: quantized, complex, or whole numbers."""
    if given.is_quantized or given.is_complex():
        return True
    return expected.is_floating_point() and not given.is_floating_point()


# --- what to do; None: it is something else


def _of_one_shard(where: str) -> str | None:
    path = Path(where)
    if not checkpoint.is_one_of_several(path):
        return None
    return f"this is one shard of several: give the index, or the folder {path.parent}"


def _of_shapes(expected: State, state: State, shapes: list[str]) -> str | None:
    if not shapes or expected.keys() != state.keys():
        return None
    name = shapes[0]
    old, new = state[name].shape, expected[name].shape
    if all(map(_is_positions, shapes)):
        return (
            f"they are of another image size ({old[-2]} positions, the model has {new[-2]}): take "
            "the model of that size, or ask for --resize-pos-embed (resize_pos_embed: true)"
        )
    if len(shapes) == 1 and name.endswith("token_embedding.weight"):
        return (
            f"they are of another vocabulary ({old[0]} tokens, the model has {new[0]}): give a "
            f"JSON configuration with vocab_size {old[0]} and the tokenizer of these weights"
        )
    sizes = " and ".join(" x ".join(map(str, shape)) or "a number" for shape in (old, new))
    return f"take the model of these weights ({name}: {sizes} in the model)"


def _is_positions(name: str) -> bool:
    return name.endswith(("visual.positional_embedding", "pos_embed"))


def _in_parts(unknown: Set[str]) -> str | None:
    for pattern, do in IN_PARTS.items():
        if any(re.search(pattern, name) for name in unknown):
            return do
    return None


def _of_names(expected: State, state: State, where: str) -> str | None:
    """Return what to do where names are missing, or more than the model's."""
    if "logit_bias" in state and "logit_bias" not in expected:
        return "give a model with init_logit_bias"
    if _are_one_tower(expected, state):
        return "they are of one tower alone: give both, or with the image tower's --image-only"
    if any(name for name in expected.keys() & state.keys() if not name.endswith(COUNT)):
        return None
    names = sorted(state.keys() - expected.keys())
    prefixes = _prefixes(names, expected)
    if prefixes:
        begins = ", ".join(f"'{prefix}.'" for prefix in prefixes)
        first = next(iter(prefixes))
        return f"its names begin with {begins}: say which are the model's, {where}:{first}"
    tops = sorted({name.split(".")[0] for name in names})
    begins = ", ".join(f"'{top}.'" for top in tops[:4])
    return f"its names begin with {begins}, as none of the model's: give the weights of this model"


def _prefixes(names: list[str], expected: State) -> dict[str, int]:
    """Return what stands before names of the model, to how many of the names; most first."""
    found: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in expected:
                found[".".join(parts[:i])] += 1
                break
    return dict(found.most_common(4))


def _are_one_tower(expected: State, state: State) -> bool:
    """Whether all tensors are of an open_clip model's image tower, or none is."""
    tower = {name for name in expected if name.startswith(VISUAL)}
    held = {name for name in state if name not in SCALARS}
    if not tower or not held:
        return False
    if held <= {name.removeprefix(VISUAL) for name in tower}:  # its own state_dict()
        return True
    return held == tower or held == expected.keys() - tower - set(SCALARS)
