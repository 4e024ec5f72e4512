"""Micro-batches by a token budget, and which rows a step reads: pure functions of sizes and of (seed, step). Floor 2."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import numpy as np

from temper.config import UserError

_MASK = (1 << 64) - 1


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: groups of indices whose sizes add up to at most `budget`; a larger item has a group of its own.

    Every index stands in exactly one group; indices ascend within a group and groups ascend by their first index. Deterministic.
    Raises ValueError on a budget or a size below 1.
    """
    if budget < 1:
        raise ValueError(f"budget {budget}: a micro-batch needs room for at least one token")
    if any(size < 1 for size in sizes):
        raise ValueError("a size below 1 token cannot be packed")
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), ascending
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(room, (sizes[i], -1))
        if at < len(room):
            left, group = room.pop(at)
        else:
            left, group = budget, len(groups)
            groups.append([])
        groups[group].append(i)
        if left > sizes[i]:
            bisect.insort(room, (left - sizes[i], group))
    return sorted(sorted(group) for group in groups)


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n rows in an epoch: a permutation [n] by (seed, epoch), from the raw Philox stream. Read-only."""
    order = np.argsort(_raw(n, seed, epoch), kind="stable").astype(np.int32 if n < 1 << 31 else np.int64)
    order.setflags(write=False)
    return order


def _raw(n: int, seed: int, epoch: int) -> np.ndarray:
    # raw bits sorted, not Generator.permutation: numpy promises the bit stream for ever, the algorithms on it not
    return np.random.Philox(key=np.array([seed & _MASK, epoch & _MASK], dtype=np.uint64)).random_raw(n)


def counts(weights: dict[str, float], have: dict[str, int], total: int | None) -> dict[str, int]:
    """Rows to take of each data set, by largest remainder. total None: the most that needs no row twice.

    Raises UserError where a data set has fewer rows than its share.
    """
    whole = sum(weights.values())
    share = {name: weight / whole for name, weight in weights.items()}

    def rounded(total: int) -> dict[str, int]:
        exact = {name: total * p for name, p in share.items()}
        out = {name: int(x + 1e-9) for name, x in exact.items()}
        rest = sorted(share, key=lambda name: (round(out[name] - exact[name], 9), name))
        return {name: n + (name in rest[: total - sum(out.values())]) for name, n in out.items()}

    if total is None:
        total = int(min(have[name] / p for name, p in share.items() if p) + 1e-9)
        while any(n > have[name] for name, n in rounded(total).items()):  # a remainder that fell to the one that has no more
            total -= 1
        if not total:
            raise UserError(f"mix: {', '.join(f'{name} has {have[name]} rows' for name, p in share.items() if p)}: nothing can be taken")
    out = rounded(total)
    for name, n in out.items():
        if n > have[name]:
            most = int(have[name] / share[name])
            raise UserError(f"mix: {n} rows of {name!r} are its share of {total}, it has {have[name]}; ask for at most {most} rows in all")
    return out


class Order:
    """The rows of every step, as a function of (seed, step): one data set, or several that are mixed.

    have: rows of each data set, which stand one after the other. take: how many of each an epoch reads; all, unless they are mixed. Every
    stretch of an epoch holds each data set's share to within a row, and a data set gives no row twice before it has given them all.
    together: for each data set the group of each row, or None; rows of a group follow each other.
    """

    def __init__(
        self,
        have: Sequence[int],
        take: Sequence[int] | None = None,
        seed: int = 0,
        together: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        self.have, self.take, self.seed = tuple(have), tuple(take or have), seed
        self.together = tuple(together or (None,) * len(self.have))
        self.n = sum(self.take)
        self._first = np.concatenate([[0], np.cumsum(self.have)])
        self._grouped: dict[tuple[int, int], np.ndarray] = {}  # the last orders of groups

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray]:
        """For each place in an epoch: which data set, and how many of its rows come before. Data set s is due at (k + 1/2) / take[s]."""
        due = np.concatenate([(np.arange(n) + 0.5) / n for n in self.take if n])
        order = np.argsort(due, kind="stable")
        source = np.repeat(np.arange(len(self.take), dtype=np.int16), self.take)[order]
        return source, np.concatenate([np.arange(n) for n in self.take])[order]

    def _of(self, source: int, epoch: int) -> np.ndarray:
        """The order of a data set's rows in its own epoch."""
        key = epoch + (source << 32)
        groups = self.together[source]
        if groups is None:
            return epoch_order(self.have[source], self.seed, key)
        if (source, epoch) not in self._grouped:
            if len(self._grouped) > 2 * len(self.have):
                self._grouped.clear()
            drawn = _raw(int(groups.max()) + 1, self.seed, key)
            self._grouped[source, epoch] = np.argsort(drawn[groups], kind="stable")
        return self._grouped[source, epoch]

    def rows(self, batch: int, step: int) -> list[int]:
        """The rows of optimiser step `step` (0-based): places step*batch to (step+1)*batch of all epochs laid end to end."""
        if self.n < 1 or batch < 1 or step < 0:
            raise ValueError(f"n={self.n}, batch={batch}, step={step}: needs at least one row, one row per batch, and a step from 0 on")
        at = np.arange(step * batch, (step + 1) * batch)
        if len(self.have) == 1:
            source, drawn = np.zeros(batch, np.int16), at
        else:
            epoch, place = np.divmod(at, self.n)
            source = self._pattern[0][place]
            drawn = epoch * np.array(self.take)[source] + self._pattern[1][place]
        out = np.empty(batch, np.int64)
        for s in np.unique(source):
            own, place = np.divmod(drawn[source == s], self.have[s])
            found = np.empty(len(own), np.int64)
            for e in np.unique(own):
                found[own == e] = self._of(int(s), int(e))[place[own == e]]
            out[source == s] = self._first[s] + found
        return out.tolist()


def batch_indices(n: int, batch: int, seed: int, step: int) -> list[int]:
    """The rows of a step of one data set of n rows: no row comes twice within an epoch and none is left out; a batch may span epochs."""
    return Order([n], seed=seed).rows(batch, step)
