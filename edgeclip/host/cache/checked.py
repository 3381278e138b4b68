"""Read a cache by its hashes: a digest of every block of its files, compared when it is first read.

    digests/digests_00.npy   uint8 [blocks, 16]: of the shard's files in the order of `bytes` in the
                             manifest, file after file (edgeclip/host/blocks.py)
    damaged.json             the shards in which a reader found damage; none: the file is not there

The manifest has the sha256 of every digest file, and a digest of itself. So opening reads the
manifest alone, and nothing that is damaged becomes a number. Whoever finds damage notes it, and
`assemble` makes those shards again on the next run of the command that made the cache.
"""

import contextlib
from pathlib import Path

import numpy as np

from edgeclip import disk
from edgeclip.disk import Json
from edgeclip.errors import EdgeclipError
from edgeclip.host import blocks
from edgeclip.host.blocks import BLOCK, SIZE, Checked, Damaged
from edgeclip.progress import say

KIND = "teacher cache"
CLASS_FEATURES = "class_features.npy"
NOTE = "damaged.json"
AGAIN = "run the command that made it again: it makes again what is damaged, and nothing else"


def name(what: str, shard: int, shards: int) -> str:
    """Return a file's place below a cache folder, in clip-retrieval's manner.

    Numbers are of equal length, so that names sort.
    """
    suffix = ".parquet" if what == "metadata" else ".npy"
    return f"{what}/{what}_{shard:0{len(str(shards))}d}{suffix}"


# --- the manifest


def write_manifest(folder: Path, manifest: Json) -> None:
    """Write a cache's manifest."""
    disk.write_sealed(folder / disk.MANIFEST, manifest)


def read_manifest(folder: Path) -> Json:
    """Return a cache's manifest.

    Raises `Damaged` for one that is not as it was written, `EdgeclipError` for another folder.
    """
    try:
        manifest = disk.read_manifest(folder, KIND)
    except EdgeclipError as e:
        if not (folder / disk.MANIFEST).is_file():
            raise
        raise Damaged(
            folder, f"its {disk.MANIFEST} cannot be read ({e})", _delete(folder)
        ) from None
    return manifest


def _delete(folder: Path) -> str:
    return f"delete {folder}, and run the command that made it again"


# --- the digests of a shard


def write_digests(folder: Path, shard: int, shards: int, files: list[str]) -> dict[str, str]:
    """Write the digests of a shard's files; return the sha256 of each file, that one included.

    Raises OSError.
    """
    hashes = {}
    parts = []
    for file in files:
        found, hashes[file] = blocks.digests(folder / file)
        parts.append(found)
    own = name("digests", shard, shards)
    disk.write_array(folder / own, np.concatenate(parts))
    return {**hashes, own: disk.sha256(folder / own)}


class Digests:
    """What is known of a cache's blocks, and which were compared."""

    def __init__(self, folder: Path, manifest: Json):
        self.folder = folder
        self.shards = manifest["shards"]
        self.hashes = manifest["files"]
        self._whole = np.zeros(len(self.shards), bool)
        self._checked: dict[str, Checked] = {}

    def of(self, what: str) -> Checked:
        """Return the files of one kind, img_emb say, to be compared as they are read."""
        if what not in self._checked:
            names = [name(what, i, len(self.shards)) for i in range(len(self.shards))]
            self._checked[what] = Checked(
                [self.folder / file for file in names],
                [shard["bytes"][file] for shard, file in zip(self.shards, names, strict=True)],
                lambda shard, a, b: self._known(what, shard, a, b),
                lambda shard, why: self._refuse(self.folder / names[shard], shard, why),
            )
        return self._checked[what]

    def _known(self, what: str, shard: int, a: int, b: int) -> np.ndarray:
        """Return the digests of blocks a to b of a file, [b - a, SIZE]."""
        own = name("digests", shard, len(self.shards))
        path = self.folder / own
        try:
            if not self._whole[shard]:
                if disk.sha256(path) != self.hashes[own]:
                    raise self._refuse(path, shard, "is not as it was written")
                self._whole[shard] = True
            size = self.shards[shard]["bytes"][own]
            with path.open("rb") as file:
                file.seek(self._header(shard, size) + SIZE * (self._before(what, shard) + a))
                read = file.read(SIZE * (b - a))
        except OSError as e:
            raise self._refuse(path, shard, f"cannot be read ({e})") from None
        return np.frombuffer(read, np.uint8).reshape(-1, SIZE)

    def _before(self, what: str, shard: int) -> int:
        """Return how many blocks of the shard's other files come first."""
        before = 0
        for file, size in self.shards[shard]["bytes"].items():
            if file == name(what, shard, len(self.shards)):
                break
            before += blocks.count(size)
        return before

    def _header(self, shard: int, size: int) -> int:
        """Return where the rows of the digests' own file begin."""
        sizes = self.shards[shard]["bytes"]
        own = name("digests", shard, len(self.shards))
        total = sum(blocks.count(of) for file, of in sizes.items() if file != own)
        return size - SIZE * total

    def _refuse(self, file: Path, shard: int, why: str) -> Damaged:
        note_damage(self.folder, shard)
        return Damaged(file, why, AGAIN)


# --- damage


def note_damage(folder: Path, shard: int) -> None:
    """Note that a shard is damaged, where the folder can be written."""
    with contextlib.suppress(OSError):
        disk.write_json(folder / NOTE, {"shards": sorted({*noted(folder), shard})})


def noted(folder: Path) -> list[int]:
    """Return the shards in which a reader found damage."""
    if not (folder / NOTE).exists():
        return []
    try:
        return list(disk.read_json(folder / NOTE)["shards"])
    except (EdgeclipError, KeyError, TypeError):
        return [0]


def look(folder: Path, manifest: Json) -> None:
    """Raise `Damaged` for what can be told without reading the shards.

    A file that is missing or of another size, class features that are not as written, and what a
    reader noted.
    """
    for shard in manifest["shards"]:
        for file, size in shard["bytes"].items():
            path = folder / file
            if not path.exists():
                raise Damaged(folder, f"{file} is missing", AGAIN)
            found = path.stat().st_size
            if found != size:
                raise Damaged(folder, f"{file} has {found} bytes, and its index says {size}", AGAIN)
    if not _is_whole(folder / CLASS_FEATURES, manifest["files"][CLASS_FEATURES]):
        raise Damaged(folder, f"{CLASS_FEATURES} is missing or not as it was written", AGAIN)
    if noted(folder):
        raise Damaged(folder, f"shards {noted(folder)} were found damaged", AGAIN)


def verify(folder: Path, manifest: Json) -> None:
    """Hash every file of a cache. Raises `Damaged` that names each one that differs, and notes them
    as a reader does."""
    wrong = []
    for i, shard in enumerate(manifest["shards"]):
        files = shard["bytes"]
        changed = [f for f in files if not _is_whole(folder / f, manifest["files"][f])]
        if changed:
            note_damage(folder, i)
            wrong += changed
    if not _is_whole(folder / CLASS_FEATURES, manifest["files"][CLASS_FEATURES]):
        wrong.append(CLASS_FEATURES)
    if wrong:
        raise Damaged(folder, ", ".join(f"{file} was changed" for file in wrong), AGAIN)


def _is_whole(path: Path, digest: str) -> bool:
    return path.exists() and disk.sha256(path) == digest


# --- caches of edgeclip before block digests


def with_digests(folder: Path, manifest: Json) -> Json:
    """Return the manifest of a cache whose files have block digests; write them where there are
    none.

    A cache of an older edgeclip is read whole once, and compared with the hashes that its manifest
    has. Raises `Damaged` where they differ, and `EdgeclipError` where nothing can be written.
    """
    if manifest.get("block_bytes") == BLOCK:
        return manifest
    say(f"{folder}: has no digests of blocks, as caches of an older edgeclip: verified whole now")
    count = len(manifest["shards"])
    hashes = dict(manifest["files"])
    shards = []
    try:
        for i, shard in enumerate(manifest["shards"]):
            own = name("digests", i, count)
            files = [file for file in shard["bytes"] if file != own]
            found = write_digests(folder, i, count, files)
            for file in files:
                if found[file] != hashes[file]:
                    note_damage(folder, i)
                    raise Damaged(folder / file, "is not as it was written", AGAIN)
            hashes[own] = found[own]
            sizes = {file: shard["bytes"][file] for file in files}
            shards.append({**shard, "bytes": {**sizes, own: (folder / own).stat().st_size}})
        new = {**manifest, "block_bytes": BLOCK, "shards": shards, "files": hashes}
        write_manifest(folder, new)
    except OSError as e:
        raise EdgeclipError(
            folder,
            f"its digests cannot be written ({e})",
            "make the folder writable once, or copy it to where it is",
        ) from None
    return read_manifest(folder)
