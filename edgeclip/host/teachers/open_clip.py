"""Take an open_clip model as a teacher, and its text tower in a form that runs without torch."""

import json
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.device import tokenizer
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host.recipe import OpenClip
from edgeclip.host.teachers import Teacher, TextTower
from edgeclip.host.towers import weights


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
            "weights": weights.source(spec.weights),
            "seed": spec.seed,
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
    words = tokenizer.load(text.tokenizer, text.context_length)

    @torch.inference_mode()
    def encode_text(texts: list[str]) -> Float[Tensor, "N D"]:
        device = next(text.module.parameters()).device
        ids = torch.from_numpy(tokenizer.encode(words, texts, text.context_length)).to(device)
        return torch.cat([text.module(part) for part in ids.split(256)]).float().cpu()

    return encode_text


def load_text(spec: OpenClip) -> TextTower:
    return _text_tower(weights.open_clip_model(spec)[0], spec)


def _text_tower(model: nn.Module, spec: OpenClip) -> TextTower:
    return TextTower(
        module=TextModule(model).eval(),
        tokenizer=clip_tokenizer_json(spec.model),
        context_length=int(model.context_length),
    )


WORDS = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""what CLIP's tokenizer splits a text into before byte pairs are merged"""


def clip_tokenizer_json(model: str) -> str:
    """Return open_clip's byte-pair tokenizer as a tokenizer.json; the ids are equal.

    Its text cleaning (ftfy, HTML entities) stays on the host side of the contract: labels are taken
    as they are typed. Raises `EdgeclipError` for a model with another kind of tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models
    from tokenizers import normalizers as N
    from tokenizers import pre_tokenizers as P
    from tokenizers.processors import TemplateProcessing

    theirs = _clip_tokenizer(model)
    bpe = Tokenizer(
        models.BPE(
            vocab=dict(theirs.encoder),
            merges=[m for m in theirs.bpe_ranks if len(m) == 2],
            end_of_word_suffix="</w>",
            unk_token="<end_of_text>",
        )
    )
    one_space = N.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = N.Sequence([N.NFC(), one_space, N.Strip(), N.Lowercase()])
    split = P.Split(Regex(WORDS), "removed", invert=True)
    to_bytes = P.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = P.Sequence([split, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    ends = [(name, theirs.encoder[name]) for name in ("<start_of_text>", "<end_of_text>")]
    bpe.post_processor = TemplateProcessing(
        single="<start_of_text> $A <end_of_text>", special_tokens=ends
    )
    value: Json = json.loads(bpe.to_str())
    return json.dumps(value, ensure_ascii=False)


def _clip_tokenizer(model: str) -> Any:
    """Return open_clip's SimpleTokenizer for a model; raise `EdgeclipError` where it has
    another."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    if model not in open_clip.list_models():
        return SimpleTokenizer()
    try:
        theirs = open_clip.get_tokenizer(model)
    except Exception as e:  # a Hugging Face tokenizer that would have to be fetched
        raise EdgeclipError(
            model,
            f"its tokenizer could not be loaded ({type(e).__name__})",
            "use a model with CLIP's own tokenizer",
        ) from None
    if not isinstance(theirs, SimpleTokenizer):
        raise EdgeclipError(
            model,
            "its tokenizer is not CLIP's byte-pair tokenizer",
            "use a model with CLIP's own tokenizer",
        )
    return theirs
