"""What the student's image tower sees: the cache's views as pixels, and its frozen features."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from edgeclip.device.image_file import UnreadableImage
from edgeclip.device.images import read, stream
from edgeclip.device.preprocess import Preprocess
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
    """Yield (pairs [b, 2], pixels uint8 [b, H, W, 3]); pairs: an image and which of its views.

    Raises `EdgeclipError` for an image that was readable when the cache was built, and is not now.
    """

    def make(pair: tuple[int, int]) -> np.ndarray:
        image = cache.images[pair[0]]
        try:
            return decode_view(read(image), cache.views[pair], preprocess, image.key)
        except UnreadableImage as e:
            raise EdgeclipError(
                cache.folder,
                f"an image changed since the cache was built ({e})",
                "restore it, or delete this cache",
            ) from None

    return stream(pairs, make, batch_size, [], threads)


def to_input(pixels: np.ndarray, preprocess: Preprocess, device: torch.device) -> Tensor:
    """Return uint8 [B, H, W, 3] as float32 [B, 3, H, W] in channels_last layout.

    It is `preprocess.normalize` bit for bit, without turning pixels twice.
    """
    b, h, w, c = pixels.shape
    x = torch.from_numpy(pixels).to(device).reshape(b, h, w * c).float()
    x = x.div_(torch.tensor(255.0, device=device))
    # A whole line at once: over the last three numbers alone nothing is vectorized.
    mean = torch.tensor(preprocess.mean, dtype=torch.float32, device=device).repeat(w)
    std = torch.tensor(preprocess.std, dtype=torch.float32, device=device).repeat(w)
    return x.sub_(mean).div_(std).view(b, h, w, c).permute(0, 3, 1, 2)


@torch.no_grad()
def frozen_features(
    student: Student,
    cache: TeacherCache,
    preprocess: Preprocess,
    recipe: Recipe,
    device: torch.device,
) -> Tensor:
    """Return [n, K, T] the frozen student tower's features of every cached view.

    Each process computes its share.
    """
    student.eval()
    n, k = cache.views.shape[:2]
    own = np.arange(n)[distributed.local_slice(n)]
    size = recipe.train.batch_size

    def batches() -> Iterator[np.ndarray]:
        for view in range(k):
            pairs = ((int(i), view) for i in own)
            for _, x in pixels_of(cache, pairs, preprocess, size, recipe.train.threads):
                yield x

    out = []
    for x in track(batches(), "student features", k * math.ceil(len(own) / size)):
        out.append(student.tower(to_input(x, preprocess, device)))
    features = torch.cat(out).reshape(k, len(own), -1).transpose(0, 1)
    return distributed.all_gather(features, distributed.split_sizes(n))
