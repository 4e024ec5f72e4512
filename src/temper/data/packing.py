"""Micro-batches by a token budget, and which rows a step reads: pure functions of sizes and of (seed, step). Floor 2."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import numpy as np

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


@functools.lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n rows in an epoch: a permutation [n] by (seed, epoch), from the raw Philox stream. Read-only."""
    bits = np.random.Philox(key=np.array([seed & _MASK, epoch & _MASK], dtype=np.uint64))
    # raw bits sorted, not Generator.permutation: numpy promises the bit stream for ever, the algorithms on it not
    order = np.argsort(bits.random_raw(n), kind="stable")
    order.setflags(write=False)
    return order


def batch_indices(n: int, batch: int, seed: int, step: int) -> list[int]:
    """The rows of optimiser step `step` (0-based): rows step*batch to (step+1)*batch of all epochs laid end to end.

    No row comes twice within an epoch and none is left out; a batch may span the border of two epochs.
    """
    if n < 1 or batch < 1 or step < 0:
        raise ValueError(f"n={n}, batch={batch}, step={step}: needs at least one row, one row per batch, and a step from 0 on")
    out: list[int] = []
    at = step * batch
    while len(out) < batch:
        epoch, first = divmod(at, n)
        part = epoch_order(n, seed, epoch)[first : first + batch - len(out)]
        out += part.tolist()
        at += len(part)
    return out
