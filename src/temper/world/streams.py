"""Named random streams: every draw in the world comes from a stream that has a name. Floor 1.

A stream is Philox keyed by SHA-256(version | name | index), so it does not depend on what was drawn before it, on the machine or
on the Python version. `Draw` turns a stream into cheap single draws (one block of uniforms at a time).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

VERSION = "harbour-1"  # tells released worlds apart: changes with a release that changes text, facts, gold or annotators

T = TypeVar("T")


def stream(name: str, index: int = 0) -> np.random.Generator:
    """The generator called `name`, number `index`: always the same one."""
    digest = hashlib.sha256(f"{VERSION}|{name}|{index}".encode()).digest()
    key = [int.from_bytes(digest[0:8], "little"), int.from_bytes(digest[8:16], "little")]
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


class Table:
    """Values with weights, ready to be drawn from: weights need not sum to one."""

    def __init__(self, weights: dict[T, float]) -> None:
        self.values = [value for value, weight in weights.items() if weight > 0]
        total = sum(weights[value] for value in self.values)
        self.share = {value: weights[value] / total for value in self.values}
        self.cumulative = list(accumulate(self.share[value] for value in self.values))


class Draw:
    """Single draws from a stream, about 0.2 microseconds each."""

    BLOCK = 1024

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.block: list[float] = []

    def u(self) -> float:
        """Uniform in [0, 1)."""
        if not self.block:
            self.block = self.rng.random(self.BLOCK).tolist()
        return self.block.pop()

    def below(self, n: int) -> int:
        return int(self.u() * n)

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self.u() * (high - low + 1))

    def chance(self, p: float) -> bool:
        return self.u() < p

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self.u() * len(values))]

    def weighted(self, table: Table):
        at = bisect_right(table.cumulative, self.u())
        return table.values[min(at, len(table.values) - 1)]

    def some(self, values: Sequence[T], k: int) -> list[T]:
        """k different values in random order (fewer where there are fewer)."""
        left = list(values)
        out: list[T] = []
        while left and len(out) < k:
            out.append(left.pop(int(self.u() * len(left))))
        return out

    def shuffled(self, values: Sequence[T]) -> list[T]:
        return self.some(values, len(values))

    def geometric(self, p: float, most: int) -> int:
        """Failures before the first success, at most `most`."""
        n = 0
        while n < most and self.u() >= p:
            n += 1
        return n
