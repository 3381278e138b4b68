"""What the student's image tower sees: the cache's views as pixels, and its frozen features of them."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from edgeclip.device.images import read, stream
from edgeclip.device.preprocess import Preprocess, UnreadableImage
from edgeclip.errors import EdgeclipError
from edgeclip.host import distributed
from edgeclip.host.cache import TeacherCache, decode_view
from edgeclip.host.recipe import Recipe
from edgeclip.host.student import Student
from edgeclip.progress import track


def pixels_of(
    cache: TeacherCache,
    pairs: Iterable[tuple[int, int]],
    preprocess: Preprocess,
    batch_size: int,
    threads: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """pairs: an image and which of its views."""

    def make(pair: tuple[int, int]) -> np.ndarray:
        image = cache.images[pair[0]]
        try:
            return decode_view(read(image), cache.views[pair], preprocess, image.key)
        except UnreadableImage as e:  # it was readable when the cache was built
            raise EdgeclipError(
                cache.folder,
                f"an image changed since the cache was built ({e})",
                "restore it, or delete this cache",
            ) from None

    return stream(pairs, make, batch_size, [], threads)


def to_input(pixels: np.ndarray, preprocess: Preprocess, device: torch.device) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in channels_last layout: `preprocess.normalize` bit for bit, without turning pixels twice."""
    b, h, w, c = pixels.shape
    x = (
        torch.from_numpy(pixels)
        .to(device)
        .reshape(b, h, w * c)
        .float()
        .div_(torch.tensor(255.0, device=device))
    )
    # a whole line's means and deviations at once: over the last three numbers alone nothing is vectorized
    mean, std = (
        torch.tensor(v, dtype=torch.float32, device=device).repeat(w)
        for v in (preprocess.mean, preprocess.std)
    )
    return x.sub_(mean).div_(std).view(b, h, w, c).permute(0, 3, 1, 2)


@torch.no_grad()
def frozen_features(
    student: Student,
    cache: TeacherCache,
    preprocess: Preprocess,
    recipe: Recipe,
    device: torch.device,
) -> Tensor:
    """[n, K, T]: the frozen student tower's features of every cached view; each process computes its share."""
    student.eval()
    n, k = cache.views.shape[:2]
    own, size, threads = (
        np.arange(n)[distributed.local_slice(n)],
        recipe.train.batch_size,
        recipe.train.threads,
    )
    out = []
    parts = (
        (v, part)
        for v in range(k)
        for part in pixels_of(cache, ((int(i), v) for i in own), preprocess, size, threads)
    )
    for _, (_, x) in track(parts, "student features", k * math.ceil(len(own) / size)):
        out.append(student.tower(to_input(x, preprocess, device)))
    return distributed.all_gather(
        torch.cat(out).reshape(k, len(own), -1).transpose(0, 1), distributed.split_sizes(n)
    )
