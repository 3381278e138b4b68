"""Learnable prompt tokens in a frozen transformer: deep, independent visual and text prompts, as in
PromptSRC.

At each of the first `depth` blocks, `length` learnable tokens take part in the attention; a block's
prompts replace what became of the block's before, later blocks carry the last ones on. The tower's
own weights and code are used as they are, so that with length 0 the wrapped tower computes the
library's result bit for bit (`tests/test_prompts.py`).

    image   [class | patches | prompts]           the first block's pass the tower's input norm, as its tokens do
    text    [start | prompts | words . end]       the first block's get positions, as the words they stand for do

Source: PromptSRC (arXiv 2307.06948), the teacher of PromptKD and ComKD-CLIP (METHODS 1.1, 5.1).
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
    """A ViT image tower with prompts [depth, length, W]: pixels [B, 3, H, W] to features [B, D],
    not normalized.

    Raises `EdgeclipError` for a tower that is no ViT of open_clip or timm, or has fewer than
    `depth` blocks.
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
                prompts = self.prompts[i].repeat(
                    x.shape[0], 1, 1
                )  # no view: torch's flop counter refuses those of a parameter
                x = torch.cat([x[:, :own], parts.norm(prompts) if i == 0 else prompts], dim=1)
            x = block(x)
        return parts.finish(x[:, :own])


class PromptedText(nn.Module):
    """open_clip's text tower with prompts [depth, length, W]: input_ids [N, L - length] to unit
    features [N, D].

    The ids are those of the words alone: the prompts are put in behind the start token here.
    `init_ids` [I]: tokens whose embeddings the first block's prompts start from; those beyond I,
    and all of the later blocks', are random.

    Raises `EdgeclipError` for a tower that is not CLIP's, or has fewer than `depth` blocks.
    """

    def __init__(self, model: nn.Module, length: int, depth: int, init_ids: Int[Tensor, "I"]):
        super().__init__()
        from open_clip.transformer import TextTransformer

        text = getattr(
            model, "text", model
        )  # CustomTextCLIP keeps it apart, CLIP is its own text tower
        if (
            not (text is model or isinstance(text, TextTransformer))
            or getattr(text, "cls_emb", None) is not None
            or getattr(text, "use_pad_mask", False)
        ):
            raise EdgeclipError(
                f"prompts in {type(text).__name__}",
                "the text tower is not CLIP's plain transformer",
                "choose a model with CLIP's text tower",
            )
        _check_depth(depth, len(text.transformer.resblocks), "text")
        self.model = model
        self.length = length
        self.pool, self.eos = (
            (text.text_pool_type, text.text_eos_id)
            if text is model
            else (text.pool_type, text.eos_id)
        )
        start = text.token_embedding(init_ids[:length]).detach()
        self.prompts = nn.Parameter(STD * torch.randn(depth, length, start.shape[1]))
        with torch.no_grad():
            self.prompts[0, : len(start)] = start

    def forward(self, input_ids: Int[Tensor, "N M"]) -> Float[Tensor, "N D"]:
        from open_clip.transformer import text_global_pool

        text = getattr(self.model, "text", self.model)
        gap = input_ids.new_zeros(input_ids.shape[0], self.length)
        ids = torch.cat([input_ids[:, :1], gap, input_ids[:, 1:]], dim=1)
        mask = None if text.attn_mask is None else text.attn_mask[: ids.shape[1], : ids.shape[1]]
        x = self._put(text.token_embedding(ids), 0) + text.positional_embedding[: ids.shape[1]]
        for i, block in enumerate(text.transformer.resblocks):
            x = block(self._put(x, i) if 0 < i < len(self.prompts) else x, attn_mask=mask)
        x = text_global_pool(text.ln_final(x), ids, self.pool, eos_token_id=self.eos)
        if isinstance(text.text_projection, nn.Linear):
            x = text.text_projection(x)
        elif text.text_projection is not None:
            x = x @ text.text_projection
        return F.normalize(x, dim=-1)

    def without_padding(self, input_ids: Int[Tensor, "N M"]) -> Int[Tensor, "N _"]:
        """The ids up to the longest text's end where nothing behind it matters, which saves most of
        the work; else all."""
        if getattr(self.model, "text", self.model).attn_mask is None or self.pool not in (
            "argmax",
            "eos",
        ):
            return input_ids
        return input_ids[:, : int((input_ids != 0).sum(dim=1).max())]

    def _put(self, x: Tensor, block: int) -> Tensor:
        prompts = self.prompts[block].expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], prompts, x[:, 1 + self.length :]], dim=1)


def _check_depth(depth: int, blocks: int, which: str) -> None:
    if depth > blocks:
        raise EdgeclipError(
            f"prompts: depth {depth}",
            f"the {which} tower has {blocks} blocks",
            f"use a depth of 1 to {blocks}",
        )
