"""Compare a large file with digests of its blocks, each when something in it is first read.

A file of hundreds of gigabytes cannot be hashed whenever it is opened. So each block of `BLOCK`
bytes has a digest, made when the file is written. Before bytes are used their blocks are compared,
and which ones were is remembered as long as the process lives: the second epoch hashes nothing.

This protects from damage (a bad disk, half a copy, a stray write), wherever in the file it lies and
however small it is. It does not protect from someone who writes file and digests anew.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgeclip.errors import EdgeclipError

BLOCK = 2**16
"""bytes: what sha256 takes at its full rate, and a disk reads at once (benchmarks/scale.py)"""
SIZE = 16
"""bytes of a digest: the first half of a sha256"""


class Damaged(EdgeclipError):
    """Bytes that are not those that were written. `found`: where and what, without what to do."""

    def __init__(self, where: object, what: str, do: str):
        super().__init__(where, what, do)
        self.found = f"{where}: {what}"


def digest(block: bytes) -> bytes:
    return hashlib.sha256(block).digest()[:SIZE]


def digests(file: Path) -> tuple[np.ndarray, str]:
    """Return the digests of a file's blocks, uint8 [n, SIZE], and the sha256 of all of it, in hex.

    The last block may be shorter. Raises OSError.
    """
    found = bytearray()
    whole = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            found += digest(block)
            whole.update(block)
    return np.frombuffer(bytes(found), np.uint8).reshape(-1, SIZE), whole.hexdigest()


def count(size: int) -> int:
    """Return how many blocks a file of `size` bytes has."""
    return -(-size // BLOCK)


# --- what was compared


class Checked:
    """Files of known sizes, and which of their blocks were compared. Threads may share it.

    Two threads may compare one block at the same time, and both are right.
    """

    def __init__(
        self,
        files: Sequence[Path],
        sizes: Sequence[int],
        known: Callable[[int, int, int], np.ndarray],
        refuse: Callable[[int, str], EdgeclipError],
    ):
        """known: returns the digests of a file's blocks a to b, [b - a, SIZE], where it is given
        (file, a, b); refuse: returns what to raise for a file, and may note it."""
        self.files = files
        self.sizes = np.array(sizes, np.int64)
        self._known = known
        self._refuse = refuse
        blocks = [count(size) for size in sizes]
        self._starts = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])
        self._seen = np.zeros(self._starts[-1], bool)
        self._unseen = len(self._seen)
        self._lock = threading.Lock()

    def look(self, of: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Compare the blocks of bytes low to high [B] of the files numbered `of` [B].

        Raises what `refuse` returns for a block that is not as it was written.
        """
        if not self._unseen:
            return
        first = self._starts[of] + low // BLOCK
        last = self._starts[of] + (high - 1) // BLOCK
        most = int((last - first).max(initial=0))
        for step in range(most + 1):
            block = np.minimum(first + step, last)
            new = block[~self._seen[block]]
            if len(new):
                self._compare(np.unique(new))

    def look_at(self, file: int, low: int, high: int) -> None:
        """Compare the blocks of bytes low to high of one file. Raises as `look`."""
        self.look(np.array([file]), np.array([low]), np.array([high]))

    def look_at_all(self, file: int) -> None:
        """Compare every block of one file. Raises as `look`."""
        blocks = np.arange(self._starts[file], self._starts[file + 1])
        self._compare(blocks[~self._seen[blocks]])

    def _compare(self, blocks: np.ndarray) -> None:
        """Compare blocks, numbered through all files, ascending."""
        of = np.searchsorted(self._starts, blocks, side="right") - 1
        for file in np.unique(of).tolist():
            mine = blocks[of == file]
            self._compare_in(file, (mine - self._starts[file]).tolist())
            with self._lock:
                self._unseen -= int((~self._seen[mine]).sum())
                self._seen[mine] = True

    def _compare_in(self, file: int, blocks: list[int]) -> None:
        known = self._known(file, blocks[0], blocks[-1] + 1)
        # Read and not mapped: what the disk cannot give is then an error, and not a signal.
        try:
            with self.files[file].open("rb", buffering=0) as opened:
                for block in blocks:
                    opened.seek(block * BLOCK)
                    if digest(opened.read(BLOCK)) != known[block - blocks[0]].tobytes():
                        start = block * BLOCK
                        what = f"its bytes {start} to {start + BLOCK - 1} are not those written"
                        raise self._refuse(file, what)
        except OSError as e:
            raise self._refuse(file, f"cannot be read ({e})") from None
