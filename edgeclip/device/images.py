"""Where images lie and how they are read: plain files, or members of uncompressed tar shards
(WebDataset).

A `ImageRef` is an address, not pixels, so a list of them is small. `stream` decodes and resizes in
threads ahead of its consumer (PIL lets go of the interpreter lock for both) and keeps the order it
was given, whatever the threads do.
"""

import abc
import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import posixpath
import re
import shlex
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, overload

import numpy as np

from edgeclip import text_file
from edgeclip.device import image_file, tar_file
from edgeclip.device.image_file import LACKING, UnreadableImage
from edgeclip.device.preprocess import Preprocess, open_image, to_pixels
from edgeclip.device.tar_file import Member
from edgeclip.device.walk import entries, no_data, walk
from edgeclip.errors import EdgeclipError
from edgeclip.progress import say, say_once

SUFFIXES = (
    *(".jpg", ".png", ".jpeg", ".webp"),  # open_clip's, in the order in which it looks for them
    *(".jfif", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".pbm"),
)
"""of images, in any case"""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""first bytes, to the program that undoes it"""
CAUSES = 5
"""at most so many are named"""
MAX_CAUSES = 100
"""at most so many are told apart"""
MAX_CAPTION = 2**20
"""bytes"""
MAX_LABEL = 256
"""bytes of a class index, with what may stand around it"""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
MAX_UNREADABLE = 0.01
Index = TypeVar("Index")
Skipped = collections.Counter[str]
"""cause, to how many"""


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
    slices: tuple[str, ...] = ()
    """what the data says that it shares with others: "camera: front\""""


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

    Raises `UnreadableImage` when its file is gone, may not be read, ends before the image does, or
    has more than an image may have.
    """
    where = f"{image.path} ({image.key})"
    try:
        content = image_file.read(Path(image.path), where, image.offset, image.size)
    except FileNotFoundError:
        raise UnreadableImage(where, "there is no such file", "restore it") from None
    except (OSError, ValueError) as e:  # ValueError: a path with a NUL in it
        if isinstance(e, OSError) and e.errno in LACKING:
            raise
        what = f"cannot be read ({getattr(e, 'strerror', None) or e})"
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


def index_tar(path: Path, skipped: Skipped | None = None) -> list[ImageRef]:
    """Return the images of one WebDataset shard.

    A sample is `key.jpg` beside optional `key.cls` (class index; -1: none) and `key.txt` (caption).
    Of several images the first by `SUFFIXES` is taken. skipped: counts, by cause, the samples that
    have no image or a caption that cannot be read. Raises `EdgeclipError` for a file that is
    missing, no tar, compressed, or cut off, and for a label that is no number.
    """
    skipped = collections.Counter() if skipped is None else skipped
    _refuse_compressed(path)
    found = samples(path, skipped)
    images = []
    with tar_file.open_file(path) as file:
        for key, members in found.items():
            image = _image_of(members)
            if image is None:
                skip(skipped, _without_image(members))
                continue
            caption = members.get(".txt")
            if caption is not None and not caption.is_file:
                skip(skipped, "with a link, a device or a sparse file in place of a caption")
                continue
            if caption is not None and caption.size > MAX_CAPTION:
                skip(skipped, f"with a caption of more than {MAX_CAPTION:,} bytes")
                continue
            try:
                text = _text(file, caption)
            except EdgeclipError:
                skip(skipped, "with a caption that is not UTF-8")
                continue
            label = _label(file, members.get(".cls"), path)
            where = f"{path.stem}/{key}"
            images.append(ImageRef(where, str(path), image.offset, image.size, label, text))
    return images


def skip(skipped: Skipped, cause: str) -> None:
    """Count a cause; of the names in a data set, which may all differ, only so many are kept."""
    if cause not in skipped and len(skipped) >= MAX_CAUSES:
        cause = "for other causes"
    skipped[cause] += 1


def _refuse_compressed(path: Path) -> None:
    """Refuse a missing shard, and one whose images have no place in its file."""
    with tar_file.open_file(path) as file:
        start = file.read(8)
    for mark, program in COMPRESSED.items():
        if start.startswith(mark):
            file_name = shlex.quote(str(path))
            do = f"decompress it: {program} -dc {file_name} > NEW.tar"
            raise EdgeclipError(path, f"is compressed ({program}); images are read in place", do)


def samples(path: Path, skipped: Skipped) -> dict[str, dict[str, Member]]:
    """Return the members of each sample by their suffix, in the shard's order.

    Raises `EdgeclipError` for what is no tar, and for two members of one name.
    """
    found: dict[str, dict[str, Member]] = collections.defaultdict(dict)
    for member in tar_file.members(path):
        # WebDataset's rule: a folder may have dots, and a hidden file is none of a sample.
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, dot, suffix = name.partition(".")
        if member.is_folder or no_data(member.name) or (dot and not stem):
            continue
        cause = _bad_name(member.name)
        if cause is None and not dot:
            cause = "without a suffix"
        if cause is not None:
            skip(skipped, cause)
            continue
        members = found[folder + slash + stem]
        if "." + suffix.lower() in members:
            raise tar_file.damaged(path, f"two members are called '{member.name}'")
        members["." + suffix.lower()] = member
    return found


def _bad_name(name: str) -> str | None:
    """Return what is wrong with a member's name; None: nothing."""
    # What was not UTF-8 on disk is a lone surrogate in Python.
    if any("\ud800" <= c <= "\udfff" for c in name):
        return "with a name that is not UTF-8"
    if CONTROL.search(name):
        return "with a control character in its name"
    if posixpath.normpath(name).split("/")[0] in ("", ".."):
        return "with a path that leaves the shard (/ or ../ at its start)"
    return None


def _image_of(members: dict[str, Member]) -> Member | None:
    for suffix in SUFFIXES:
        member = members.get(suffix)
        if member is not None and member.is_file:
            return member
    return None


def _without_image(members: dict[str, Member]) -> str:
    """Return why a sample has no image."""
    for suffix in sorted(members):
        last = "." + suffix.rpartition(".")[2]
        if last in SUFFIXES and last != suffix:
            return f"with a dot in the name before {last} (WebDataset's keys end at the first dot)"
        if suffix in SUFFIXES:
            return "with a link, a device or a sparse file in place of an image"
    named = [suffix[:20] for suffix in sorted(members)[:5]]
    return f"without an image ({', '.join(named)})"


def _text(file: BinaryIO, member: Member | None) -> str:
    """Return a member's text; empty where there is none. Raises `EdgeclipError` for what is no
    text."""
    if member is None:
        return ""
    file.seek(member.offset)
    return text_file.decode(file.read(member.size), member.name).strip()


def _label(file: BinaryIO, member: Member | None, path: Path) -> int:
    """Return the class index in a member; -1 where there is none."""
    if member is None:
        return -1
    where = f"{path} ({member.name})"
    do = "write a number from 0 on"
    if not member.is_file or member.size > MAX_LABEL:
        what = f"a link, a device, a sparse file or more than {MAX_LABEL} bytes is no class index"
        raise EdgeclipError(where, what, do)
    text = _text(file, member)
    if re.fullmatch(r"-1|[0-9]{1,9}", text):
        return int(text)
    raise EdgeclipError(where, f"{text[:40]!r} is no class index", do)


def index_folder(folder: Path, skipped: Skipped | None = None) -> list[ImageRef]:
    """Return every image below `folder`, sorted by path; a linked folder is followed, once.

    skipped: counts the other files by their suffix. Raises `EdgeclipError` for a folder that cannot
    be read.
    """
    files: list[Path] = []
    for _, there in walk(folder):
        files += there
    return _images_among(files, folder, collections.Counter() if skipped is None else skipped)


def index_classes(root: Path, skipped: Skipped | None = None) -> dict[str, list[ImageRef]]:
    """Return the images of every sub-folder of `root` by its name, both sorted.

    skipped: as `index_folder`. Raises `EdgeclipError` as `index_folder`, and where links put a
    folder into two classes.
    """
    skipped = collections.Counter() if skipped is None else skipped
    folders, beside = entries(root)
    for path in beside:
        if path.suffix.lower() in SUFFIXES:
            skipped["in no class folder"] += 1

    classes = {}
    class_of: dict[Path, str] = {}
    for folder in folders:
        files: list[Path] = []
        for real, there in walk(folder):
            if class_of.setdefault(real, folder.name) != folder.name:
                raise EdgeclipError(
                    root,
                    f"{real} is in two classes, '{class_of[real]}' and '{folder.name}', by a link",
                    "remove the link",
                )
            files += there
        classes[folder.name] = _images_among(files, folder, skipped)
    return classes


def _images_among(files: list[Path], folder: Path, skipped: Skipped) -> list[ImageRef]:
    images = []
    for path in sorted(files):
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            images.append(ImageRef(str(path.relative_to(folder)), str(path)))
        else:
            skip(skipped, suffix[:20] or "without a suffix")
    return images


def say_skipped(where: object, kept: int, skipped: Mapping[str, int], what: str) -> None:
    """Print, once, how many of `what` were left out of an index, and why.

    kept: how many were not. skipped: a `Skipped`.
    """
    total = sum(skipped.values())
    if not total:
        return
    counts = collections.Counter(skipped).most_common()
    causes = [f"{count:,} {cause}" for cause, count in counts[:CAUSES]]
    if counts[CAUSES:]:
        causes.append(f"{sum(count for _, count in counts[CAUSES:]):,} for other causes")
    say_once(f"{where}: {total:,} of {kept + total:,} {what} skipped: {', '.join(causes)}")


def load_first(
    images: Sequence[ImageRef], order: Iterable[int], count: int, spec: Preprocess
) -> tuple[list[int], list[np.ndarray]]:
    """Return the first `count` readable images in `order`: places, and pixels uint8 [H, W, 3].

    Fewer where there are no more. Raises `EdgeclipError` when more than 1 % of `images` were met
    that could not be read; fewer are printed.
    """
    skipped: list[str] = []
    places = []
    pixels = []
    batches = stream(order, lambda i: load_pixels(images[i], spec), 1, skipped)
    with contextlib.closing(batches):
        for one, batch in itertools.islice(batches, count):
            places.append(int(one[0]))
            pixels.append(batch[0])
    where = Path(images[0].path).parent if len(images) else "images"
    refuse_unreadable(skipped, len(images), where)
    for line in skipped:
        say(f"skipped: {line}")
    return places, pixels


def stream(
    order: Iterable[Index],
    make: Callable[[Index], np.ndarray],
    batch_size: int,
    skipped: list[str],
    threads: int = 2,
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
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
