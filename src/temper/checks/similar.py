"""Near-duplicates and shared runs of words, for files that fit into memory. Floor 6, numpy only."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

WORDS = re.compile(r"\w+")
SHINGLE = 5  # words that overlap one by one
BANDS, BAND = 16, 6  # 96 hashes; two texts of similarity s meet with probability 1 - (1 - s^6)^16: 0.99 at 0.8, 0.22 at 0.5
_PRIME = (1 << 31) - 1


def words(text: str) -> list[str]:
    """Lower-case words, without marks."""
    return WORDS.findall(text.lower())


def grams(text: str, n: int) -> set[str]:
    """Runs of n words; the whole text where it is shorter."""
    w = words(text)
    return {" ".join(w[i : i + n]) for i in range(max(1, len(w) - n + 1))} if w else set()


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> Iterator[tuple[int, int, float]]:
    """(i, j, Jaccard similarity of their 5-word runs), i < j, for j the nearest earlier text that is at least that similar.

    Candidates come from MinHash in bands (Broder 1997); what is given is computed exactly. Equal texts are left to the caller.
    """
    rng = np.random.Generator(np.random.Philox(key=7))
    a, b = rng.integers(1, _PRIME, (2, BANDS * BAND, 1), dtype=np.int64)
    seen: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(BANDS)]
    sets = [grams(text, SHINGLE) for text in texts]
    for j, mine in enumerate(sets):
        if not mine:
            continue
        hashes = np.fromiter((zlib.crc32(g.encode()) & 0x7FFFFFFF for g in mine), np.int64, len(mine))
        signature = ((a * (hashes % _PRIME) + b) % _PRIME).min(axis=1).reshape(BANDS, BAND)
        candidates: set[int] = set()
        for band, table in zip(signature, seen, strict=True):
            key = band.tobytes()
            candidates.update(table[key][:20])  # of many alike, the first say enough
            table[key].append(j)
        best = max(((len(sets[i] & mine) / len(sets[i] | mine), -i) for i in candidates), default=(0.0, 0))
        if best[0] >= threshold and texts[-best[1]] != texts[j]:
            yield -best[1], j, best[0]
