"""What a board writes, heard within limits of time and bytes: it may be silent, or never end.

Whatever it says begins its silence anew, so an honest slow board is waited for; how long a silence
may be, and how long one request at most, is the device profile's (`reach`). Everything is read in
blocks: no line, however long, is collected beyond what its reader takes.
"""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

from edgeclip.errors import EdgeclipError, LinkLost

T = TypeVar("T")
BLOCK = 1 << 16
DO = "is it the board that you mean? see what it printed, and: edgeclip doctor --device"


class Patience(NamedTuple):
    """How long a board is waited for, in seconds."""

    silent_s: float
    """without a word"""
    whole_s: float
    """from the beginning, whatever it says"""


class Heard:
    """When a board was last heard, or last took what was sent."""

    def __init__(self) -> None:
        self.first = self.last = time.monotonic()

    def now(self) -> None:
        """Begin its silence anew."""
        self.last = time.monotonic()


class Ear:
    """One of a board's streams. Every read has a limit, and what goes beyond it is refused."""

    def __init__(self, name: str, stream: Any, heard: Heard) -> None:
        self.name = name
        self.stream = stream
        self.heard = heard
        self.rest = bytearray()
        """what was read and not yet taken"""

    async def _more(self) -> bool:
        block = await self.stream.read(BLOCK)
        if block:
            self.heard.now()
        self.rest += block
        return bool(block)

    async def line(self, most: int) -> bytes:
        """Return a line with its end, of at most `most` bytes; at the end of all what is left."""
        looked = 0
        while (end := self.rest.find(b"\n", looked)) < 0:
            looked = len(self.rest)
            if looked > most:
                break
            if not await self._more():
                end = len(self.rest) - 1
                break
        if end + 1 > most or (end < 0 and self.rest):
            raise self.too_much(f"a line of more than {most:,} bytes")
        return self._take(end + 1)

    async def exactly(self, count: int) -> bytes:
        """Return so many bytes. Raises `EOFError` where the board ends before."""
        while len(self.rest) < count:
            if not await self._more():
                raise EOFError(f"{len(self.rest):,} of {count:,} bytes came")
        return self._take(count)

    def _take(self, count: int) -> bytes:
        found = bytes(self.rest[:count])
        del self.rest[:count]
        return found

    def too_much(self, what: str) -> EdgeclipError:
        """Return the error of a board that says more than anybody asked."""
        return EdgeclipError(self.name, f"wrote {what}", f"{DO} {self.name}")


async def in_time(
    name: str, op: str, work: Coroutine[Any, Any, T], heard: Heard, patience: Patience
) -> T:
    """Return what `work` gives. Raises `LinkLost` where the board is silent for too long, or does
    not end. name, op: the device and the request, for the message."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            now = time.monotonic()
            if now - heard.last >= patience.silent_s:
                what = f"said nothing for {patience.silent_s:g} s during '{op}'"
                raise LinkLost(name, what, "where it is only slow, raise the profile's reach.*_s")
            if now - heard.first >= patience.whole_s:
                what = f"did not end within {patience.whole_s:g} s during '{op}'"
                raise LinkLost(name, what, "where it is only slow, raise reach.longest_s")
            left = min(heard.last + patience.silent_s, heard.first + patience.whole_s) - now
            await asyncio.wait([task], timeout=max(left, 0.01))
        return task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])
