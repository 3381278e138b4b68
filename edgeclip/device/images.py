"""Where images lie and how they are read: plain files, or members of uncompressed tar shards
(WebDataset).

A `ImageRef` is an address, not pixels, so a list of them is small. `stream` decodes and resizes in
threads ahead of its consumer (PIL lets go of the interpreter lock for both) and keeps the order it
was given, whatever the threads do.
"""

import abc
import collections
import concurrent.futures
import hashlib
import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

import numpy as np

from edgeclip.device.preprocess import Preprocess, UnreadableImage, open_image, to_pixels
from edgeclip.errors import EdgeclipError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_UNREADABLE = 0.01
Index = TypeVar("Index")


class ImageRef(NamedTuple):
    key: str
    """unique in its data set"""
    path: str
    """of the file, or of the shard that holds it"""
    offset: int = 0
    size: int = -1
    """bytes from `offset`; -1: to the end of the file"""
    label: int = -1
    """index into the class list; -1: none"""
    caption: str = ""


class Lookup(Sequence[ImageRef], abc.ABC):
    """Images that are looked up when they are asked for: a subclass knows how many, and which is
    the i-th, 0 <= i < n."""

    @abc.abstractmethod
    def at(self, i: int) -> ImageRef: ...

    @overload
    def __getitem__(self, i: int) -> ImageRef: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[ImageRef]: ...
    def __getitem__(self, i: int | slice) -> ImageRef | Sequence[ImageRef]:
        found = range(len(self))[i]  # raises IndexError
        if isinstance(found, int):
            return self.at(found)
        return [self.at(j) for j in found]


def read(image: ImageRef) -> bytes:
    """Return an image's own bytes.

    Raises `UnreadableImage` when its file is gone, may not be read or ends before the image does.
    """
    where = f"{image.path} ({image.key})"
    try:
        with Path(image.path).open("rb") as file:
            file.seek(image.offset)
            content = file.read(image.size)
    except FileNotFoundError:
        raise UnreadableImage(where, "there is no such file", "restore it") from None
    except OSError as e:
        what = f"cannot be read ({e.strerror})"
        raise UnreadableImage(where, what, "check its rights and its disk") from None
    if len(content) < image.size:
        raise UnreadableImage(where, "the shard is shorter than its index says", "restore it")
    return content


def load_pixels(image: ImageRef, spec: Preprocess) -> np.ndarray:
    """Return an image as uint8 [H, W, 3] of the encoder's size. Raises `UnreadableImage`."""
    return to_pixels(open_image(read(image), image.key), spec)


def digest(image: ImageRef) -> str:
    """Return the sha256 of an image's bytes, in hex. Raises as `read`."""
    return hashlib.sha256(read(image)).hexdigest()


def index_tar(path: Path) -> list[ImageRef]:
    """Return the images of one WebDataset shard.

    A sample is `key.jpg` beside optional `key.cls` (class index) and `key.txt` (caption). Raises
    `EdgeclipError` for a file that is missing, no tar, or cut off.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            samples = _samples(tar)
            refuse_cut(tar)
            images = []
            for key, members in samples.items():
                image = _image_of(members)
                if image is None:
                    continue
                label = -1
                if ".cls" in members:
                    label = int(_content(tar, members[".cls"]))
                images.append(
                    ImageRef(
                        f"{path.stem}/{key}",
                        str(path),
                        image.offset_data,
                        image.size,
                        label,
                        _content(tar, members.get(".txt")),
                    )
                )
            return images
    except FileNotFoundError:
        raise EdgeclipError(path, "there is no such file", "check the path") from None
    except (tarfile.TarError, ValueError, OSError) as e:
        raise EdgeclipError(
            path, f"not a readable WebDataset shard ({e})", "replace or remove it"
        ) from None


def _samples(tar: tarfile.TarFile) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Return the members of each sample by their suffix, in the shard's order."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = collections.defaultdict(dict)
    for member in tar:
        # WebDataset's rule: a folder may have dots, and a hidden file is none of a sample.
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, dot, suffix = name.partition(".")
        if not (member.isfile() and stem and dot):
            continue
        members = samples[folder + slash + stem]
        if "." + suffix.lower() in members:
            raise tarfile.ReadError(f"two members are called '{member.name}'")
        members["." + suffix.lower()] = member
    return samples


def _image_of(members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    for suffix, member in members.items():
        if suffix in SUFFIXES:
            return member
    return None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> str:
    """Return a member's text; empty where there is none."""
    file = tar.extractfile(member) if member is not None else None
    return file.read().decode().strip() if file is not None else ""


def refuse_cut(tar: tarfile.TarFile) -> None:
    """Raise `tarfile.ReadError` unless the archive, read to its end, ends with a block of zeros.

    tarfile takes one that was cut off between two members, or has rubbish there, for a whole one.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it was cut off, or is damaged in the middle")


def index_folder(folder: Path) -> list[ImageRef]:
    """Return every image below `folder`, sorted by path."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
    return [ImageRef(str(p.relative_to(folder)), str(p)) for p in files]


def stream(
    order: Iterable[Index],
    make: Callable[[Index], np.ndarray],
    batch_size: int,
    skipped: list[str],
    threads: int = 2,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (indices [B], stacked make(index) [B, ...]) in `order`, the last batch short.

    What `make` raises as `UnreadableImage` is left out and its message put into `skipped`;
    `refuse_unreadable` judges the count.
    """
    pending: collections.deque[tuple[Index, concurrent.futures.Future[np.ndarray]]] = (
        collections.deque()
    )
    todo = iter(order)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for i in itertools.islice(todo, 2 * batch_size):
                pending.append((i, pool.submit(make, i)))
            indices: list[Index] = []
            arrays: list[np.ndarray] = []
            while pending:
                i, future = pending.popleft()
                for ahead in itertools.islice(todo, 1):
                    pending.append((ahead, pool.submit(make, ahead)))
                try:
                    arrays.append(future.result())
                    indices.append(i)
                except UnreadableImage as e:
                    skipped.append(str(e))
                if len(arrays) == batch_size or (arrays and not pending):
                    yield np.array(indices), np.stack(arrays)
                    indices = []
                    arrays = []
        finally:
            pool.shutdown(cancel_futures=True)


def refuse_unreadable(skipped: list[str], total: int, where: object) -> None:
    """Raise `EdgeclipError` when more than 1 % of `total` images could not be read.

    Fewer are the caller's to report.
    """
    if len(skipped) > MAX_UNREADABLE * total:
        what = f"{len(skipped)} of {total} images are unreadable, more than {MAX_UNREADABLE:.0%}"
        raise EdgeclipError(where, f"{what} (first: {skipped[0]})", "repair the data")
