"""The order of an epoch without a list of it: the i-th image of a shuffled set is computed when it
is asked for.

A Feistel network of four rounds permutes the numbers below a power of four; what falls outside the
set is sent through again until it falls inside (cycle walking; Black and Rogaway 2002), fewer than
four times on average. Same seed, same order, on any machine; any position can be asked for first,
so a run goes on where it stopped and each process takes its own share.
"""

import numpy as np

ROUNDS = 4


class Shuffled:
    """A permutation of 0 .. n - 1: `shuffled[positions]` [B] are its values there."""

    def __init__(self, n: int, seed: int):
        self.n = n
        self.half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Return the values, int64 [B], at `positions`, int64 [B], each in 0 .. n - 1."""
        x = self._once(np.asarray(positions).astype(np.uint64))
        outside = np.flatnonzero(x >= self.n)
        while outside.size:
            x[outside] = self._once(x[outside])
            outside = np.flatnonzero(x >= self.n)
        return x.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        left = x >> self.half
        right = x & self.mask
        for key in self.keys:
            mixed = left ^ (_mix(right ^ key) & self.mask)
            left = right
            right = mixed
        out: np.ndarray = (left << self.half) | right
        return out


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finalizer: every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
