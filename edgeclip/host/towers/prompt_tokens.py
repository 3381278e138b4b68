"""Put learnable prompt tokens into a frozen transformer.

Deep, independent visual and text prompts, as in PromptSRC. At each of the first `depth` blocks,
`length` learnable tokens take part in the attention; a block's prompts replace what became of the
block's before, later blocks carry the last ones on. The tower's own weights and code are used as
they are, so that with length 0 the wrapped tower computes the library's result bit for bit
(tests/host/towers/test_prompt_tokens.py).

    image   [class | patches | prompts]      the first block's pass the tower's input norm
    text    [start | prompts | words . end]  the first block's get positions, as words do

Source: PromptSRC (arXiv 2307.06948), the teacher of PromptKD and ComKD-CLIP
(docs/design/methods.md#21-two-stages and #31-student-and-class-features).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from edgeclip.errors import EdgeclipError

STD = 0.02
"""of the normal distribution that prompts start from"""


class Stages(NamedTuple):
    """What a prompted tower needs to know of a vision transformer, whichever library it is from."""

    embed: Callable[[Tensor], Tensor]
    """pixels [B, 3, H, W] to the first block's tokens [B, T, W]"""
    norm: Callable[[Tensor], Tensor]
    """the norm at the end of `embed`"""
    blocks: nn.Module
    finish: Callable[[Tensor], Tensor]
    """the last block's tokens [B, T, W] to features [B, D]"""
    width: int


def _parts(vit: nn.Module) -> Stages:
    from open_clip.transformer import VisionTransformer as OpenClipViT
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    if isinstance(vit, OpenClipViT):
        return Stages(
            vit._embeds,
            vit.ln_pre,
            vit.transformer.resblocks,
            partial(_finish_open_clip, vit),
            vit.class_embedding.shape[0],
        )
    if isinstance(vit, TimmViT):
        return Stages(
            partial(_embed_timm, vit),
            vit.norm_pre,
            vit.blocks,
            lambda x: vit.forward_head(vit.norm(x)),
            vit.embed_dim,
        )
    raise EdgeclipError(
        f"prompts in {type(vit).__name__}",
        "the image tower is no ViT of open_clip or timm",
        "choose a ViT, or do without prompts",
    )


def _finish_open_clip(vit: nn.Module, x: Tensor) -> Tensor:
    pooled = vit._pool(x)[0]
    return pooled if vit.proj is None else pooled @ vit.proj


def _embed_timm(vit: nn.Module, pixels: Tensor) -> Tensor:
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))


class PromptedTower(nn.Module):
    """A ViT image tower with prompts [depth, length, W].

    Pixels [B, 3, H, W] to features [B, D], not normalized. Raises `EdgeclipError` for a tower that
    is no ViT of open_clip or timm, or has fewer than `depth` blocks.
    """

    def __init__(self, vit: nn.Module, length: int, depth: int):
        super().__init__()
        parts = _parts(vit)
        _check_depth(depth, len(parts.blocks), "image")
        self.vit = vit
        self.prompts = nn.Parameter(STD * torch.randn(depth, length, parts.width))

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        parts = _parts(self.vit)
        x = parts.embed(pixels)
        own = x.shape[1]
        for i, block in enumerate(parts.blocks):
            if i < len(self.prompts):
                # No view: torch's flop counter refuses those of a parameter.
                prompts = self.prompts[i].repeat(x.shape[0], 1, 1)
                if i == 0:
                    prompts = parts.norm(prompts)
                x = torch.cat([x[:, :own], prompts], dim=1)
            x = block(x)
        return parts.finish(x[:, :own])


class PromptedText(nn.Module):
    """open_clip's text tower with prompts [depth, length, W].

    input_ids [N, L - length] to unit features [N, D]. The ids are those of the words alone: the
    prompts are put in behind the start token here. `init_ids` [I]: tokens whose embeddings the
    first block's prompts start from; those beyond I, and all of the later blocks', are random.

    Raises `EdgeclipError` for a tower that is not CLIP's, or has fewer than `depth` blocks.
    """

    def __init__(self, model: nn.Module, length: int, depth: int, init_ids: Int[Tensor, "I"]):
        super().__init__()
        from open_clip.transformer import TextTransformer

        text = _text_tower(model)
        of_clip = text is model or isinstance(text, TextTransformer)
        has_class_token = getattr(text, "cls_emb", None) is not None
        if not of_clip or has_class_token or getattr(text, "use_pad_mask", False):
            raise EdgeclipError(
                f"prompts in {type(text).__name__}",
                "the text tower is not CLIP's plain transformer",
                "choose a model with CLIP's text tower",
            )
        _check_depth(depth, len(text.transformer.resblocks), "text")
        self.model = model
        self.length = length
        prefix = "text_" if text is model else ""
        self.pool: str = getattr(text, f"{prefix}pool_type")
        self.eos: int = getattr(text, f"{prefix}eos_id")
        start = text.token_embedding(init_ids[:length]).detach()
        self.prompts = nn.Parameter(STD * torch.randn(depth, length, start.shape[1]))
        with torch.no_grad():
            self.prompts[0, : len(start)] = start

    def forward(self, input_ids: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        from open_clip.transformer import text_global_pool

        text = _text_tower(self.model)
        gap = input_ids.new_zeros(input_ids.shape[0], self.length)
        ids = torch.cat([input_ids[:, :1], gap, input_ids[:, 1:]], dim=1)
        length = ids.shape[1]
        mask = text.attn_mask
        if mask is not None:
            mask = mask[:length, :length]
        x = self._put(text.token_embedding(ids), 0) + text.positional_embedding[:length]
        for i, block in enumerate(text.transformer.resblocks):
            if 0 < i < len(self.prompts):
                x = self._put(x, i)
            x = block(x, attn_mask=mask)
        x = text_global_pool(text.ln_final(x), ids, self.pool, eos_token_id=self.eos)
        if isinstance(text.text_projection, nn.Linear):
            x = text.text_projection(x)
        elif text.text_projection is not None:
            x = x @ text.text_projection
        return F.normalize(x, dim=-1)

    def without_padding(self, input_ids: Int[Tensor, "N M"]) -> Int[Tensor, "N _"]:
        """Return the ids up to the longest text's end where nothing behind it matters, else all.

        That saves most of the work.
        """
        causal = _text_tower(self.model).attn_mask is not None
        if not causal or self.pool not in ("argmax", "eos"):
            return input_ids
        return input_ids[:, : int((input_ids != 0).sum(dim=1).max())]

    def _put(self, x: Tensor, block: int) -> Tensor:
        prompts = self.prompts[block].expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], prompts, x[:, 1 + self.length :]], dim=1)


def _text_tower(model: nn.Module) -> nn.Module:
    """Return the text tower: CustomTextCLIP keeps it apart, CLIP is its own."""
    tower: nn.Module = getattr(model, "text", model)
    return tower


def _check_depth(depth: int, blocks: int, which: str) -> None:
    if depth > blocks:
        raise EdgeclipError(
            f"prompts: depth {depth}",
            f"the {which} tower has {blocks} blocks",
            f"use a depth of 1 to {blocks}",
        )
