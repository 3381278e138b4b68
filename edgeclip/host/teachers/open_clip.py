"""Take an open_clip model as a teacher, and its text tower in a form that runs without torch."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.device import tokenizer
from edgeclip.device.records import to_json
from edgeclip.host.recipe import OpenClip
from edgeclip.host.teachers import Teacher, TextTower
from edgeclip.host.towers import weights
from edgeclip.host.towers.tokenization import tokenization


class ImageTower(nn.Module):
    """open_clip's image tower: pixels [B, 3, H, W] to image features [B, D], not normalized."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.visual = model.visual

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        out = self.visual(pixels)
        return out[0] if isinstance(out, tuple) else out  # CoCa's comes with its patches' tokens


class TextModule(nn.Module):
    """open_clip's text tower: input_ids [N, L] to unit features [N, D]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Int[Tensor, "N L"]) -> Float[Tensor, "N D"]:
        return F.normalize(self.model.encode_text(input_ids), dim=-1)


def load(spec: OpenClip) -> Teacher:
    model, preprocess = weights.open_clip_model(spec)
    text = _text_tower(model, spec)
    with torch.inference_mode():
        embed_dim = text.module(torch.zeros(1, text.context_length, dtype=torch.long)).shape[1]
    return Teacher(
        name=f"open_clip {spec.model} ({spec.weights})",
        license=spec.license,
        identity={
            "kind": "open_clip",
            "model": spec.model,
            "config": spec.config,
            "weights": weights.origin(spec),
            "seed": spec.seed,
            "cleaning": to_json(text.cleaning),
        },
        preprocess=preprocess,
        logit_scale=model.logit_scale.exp().item(),
        embed_dim=embed_dim,
        tower=ImageTower(model).eval(),
        features=lambda rows: rows,
        encode_text=encoder(text),
        text=text,
    )


def encoder(text: TextTower) -> Callable[[list[str]], Float[Tensor, "N D"]]:
    """Return a function from texts to unit features [N, D].

    It raises `EdgeclipError` for a text that is longer than the tower's context.
    """
    words = text.words()

    @torch.inference_mode()
    def encode_text(texts: list[str]) -> Float[Tensor, "N D"]:
        device = next(text.module.parameters()).device
        ids = torch.from_numpy(tokenizer.encode(words, texts)).to(device)
        return torch.cat([text.module(part) for part in ids.split(256)]).float().cpu()

    return encode_text


def load_text(spec: OpenClip) -> TextTower:
    return _text_tower(weights.open_clip_model(spec)[0], spec)


def _text_tower(model: nn.Module, spec: OpenClip) -> TextTower:
    made = tokenization(spec)
    return TextTower(
        module=TextModule(model).eval(),
        tokenizer=made.tokenizer,
        cleaning=made.cleaning,
        context_length=int(model.context_length),
    )
