"""A process's share of a batch as its towers see it, micro-batch by micro-batch."""

import numpy as np
import torch

from edgeclip.device.preprocess import Preprocess
from edgeclip.host import distributed
from edgeclip.host.distill.batches import Batch
from edgeclip.host.distill.pixels import to_input
from edgeclip.host.distill.step import MicroBatch
from edgeclip.host.distill.text import Texts
from edgeclip.host.recipe import MaskedFeature


def of_pixels(
    pixels: np.ndarray,
    count: int,
    preprocess: Preprocess,
    hide: MaskedFeature | None,
    device: torch.device,
) -> list[MicroBatch]:
    """Return `count` micro-batches of the pixels uint8 [b, H, W, 3]; hide: parts of each."""
    return [
        MicroBatch(pixels=to_input(x, preprocess, device), hide=hide)
        for x in np.array_split(pixels, count)
    ]


def with_texts(
    micro_batches: list[MicroBatch],
    texts: Texts,
    batch: Batch,
    drawn: np.ndarray,
    device: torch.device,
) -> list[MicroBatch]:
    """Return the micro-batches with their images' captions, and a share each of the class prompts.

    drawn: [P] rows of texts.prompts that the whole batch draws.
    """
    count = len(micro_batches)
    own = distributed.local_slice(len(batch.rows))
    places = batch.view[own] % texts.captions.shape[1]
    captions = texts.captions[batch.rows[own], places].tensor_split(count)
    prompts = texts.prompts[drawn[distributed.local_slice(len(drawn))]].tensor_split(count)
    return [
        micro_batch._replace(captions=c.to(device), prompts=p.to(device))
        for micro_batch, c, p in zip(micro_batches, captions, prompts, strict=True)
    ]
