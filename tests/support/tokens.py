"""CLIP's tokenizer as edgeclip ships it, and open_clip's own."""

import functools

from edgeclip.device import tokenizer
from edgeclip.device.tokenizer import Words
from edgeclip.host.recipe import OpenClip
from edgeclip.host.towers.tokenization import Tokenization, tokenization


@functools.cache
def clips() -> Tokenization:
    return tokenization(OpenClip(model="ViT-B-32", weights="random"))


def clip_words(context_length: int = 77) -> Words:
    return tokenizer.load(clips().tokenizer, context_length, clips().cleaning)
