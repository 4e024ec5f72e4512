"""A held-out share of the records, chosen by what they say. Floor 2."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from temper.records import Chat, Record, Text

R = TypeVar("R", bound=Record)


def opening(record: Record) -> str:
    """What a record is grouped by: a document's text; a conversation's first user turn, without surrounding blanks.

    The first turn and not the whole prompt: files of dialogues hold the same conversation at several lengths.
    """
    if isinstance(record, Text):
        return record.text
    messages = record.messages if isinstance(record, Chat) else getattr(record, "messages", None) or getattr(record, "prompt", [])
    return next((m.content.strip() for m in messages if m.role == "user"), messages[0].content.strip() if messages else "")


def key(record: Record) -> int:
    """64 bits of the hash of a record's opening."""
    text = opening(record).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def held_out(keys: np.ndarray, share: float | int, seed: int = 0) -> np.ndarray:
    """[n] bool: which records to hold out, by their keys [n] (uint64). Groups of one key are ranked by a hash of (seed, key)."""
    wanted = share if isinstance(share, int) else round(share * len(keys))
    if share < 0 or (isinstance(share, float) and share >= 1):
        raise ValueError(f"share {share}: a part in [0, 1) or a number of records")
    if isinstance(share, float) and share > 0:
        wanted = max(1, wanted)
    unique, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(unique), bool)
    left = wanted
    for g in np.argsort(_mixed(unique, seed), kind="stable")[: len(unique) - 1]:
        if sizes[g] <= left:
            chosen[g] = True
            left -= sizes[g]
        if not left:
            break
    return chosen[group]


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """A hash of each key with the seed: two rounds of splitmix64 (doi:10.1145/2714064.2660195)."""
    x = keys.astype(np.uint64)
    with np.errstate(over="ignore"):
        for salt in (seed & (1 << 64) - 1, 0):
            x = (x ^ np.uint64(salt)) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x ^= x >> np.uint64(31)
    return x


def split(records: Sequence[R], share: float | int, seed: int = 0) -> tuple[list[R], list[R]]:
    """(kept, held out), both in the order of `records`. share: a part in [0, 1) as a float, or a number of records as an int.

    Records with the same opening stay together, so that no prompt stands in both. The choice depends on what the records say and hardly
    changes when rows are added. At least one group is kept.
    """
    out = held_out(np.fromiter(map(key, records), np.uint64, len(records)), share, seed)
    return [r for r, x in zip(records, out, strict=True) if not x], [r for r, x in zip(records, out, strict=True) if x]
