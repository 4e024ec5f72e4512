"""Words, their n-grams as 64-bit numbers, and MinHash: what duplicates, contamination and scorers are told by. Floor 2.

All of it is the same on every machine and in every process: nothing uses Python's own `hash`.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Grams = NDArray[np.uint64]

_ALONE = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff"  # scripts written without blanks: each character is a word
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[+=<>^%]|[-*/](?=\s*\d)")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_VOCABULARY = 1 << 20  # words whose numbers are remembered


def words(text: str, signs: bool = False) -> list[str]:
    """The words of a text in lower case, without punctuation. signs: those of arithmetic count as words (3 + 4 is not 3 - 4)."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return (_WORD_OR_SIGN if signs else _WORD).findall(text.lower())


def number(text: str) -> int:
    """64 bits of a text's BLAKE2b."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _Numbers(dict[str, int]):
    def __missing__(self, word: str) -> int:
        if len(self) >= _VOCABULARY:
            self.clear()
        self[word] = value = number(word)
        return value


_numbers = _Numbers()


def ngrams(said: list[str], n: int) -> Grams:
    """[max(1, W - n + 1)] the n-grams of W words in their order; fewer words than n are one gram, no words none."""
    if not said:
        return np.empty(0, np.uint64)
    each = np.fromiter(map(_numbers.__getitem__, said), np.uint64, len(said))
    n = min(n, len(each))
    count = len(each) - n + 1
    out = np.zeros(count, np.uint64)
    for k in range(n):
        out = out * _BASE + each[k : count + k]
    out ^= out >> np.uint64(32)  # a polynomial alone mixes its low bits badly
    out *= _BASE
    out ^= out >> np.uint64(29)
    return out


class Bands(NamedTuple):
    """MinHash values in bands: two texts are compared where all values of a band agree. recall: P(compared) at the threshold."""

    bands: int
    rows: int
    recall: float


def banding(threshold: float, hashes: int = 128, recall: float = 0.98) -> Bands:
    """The bands of at most `hashes` values that find a pair of that Jaccard similarity with P = 1 - (1 - t^r)^b >= recall.

    Of these the one with the longest bands, which compares the fewest unlike pairs in vain. Source: Leskovec, Rajaraman and Ullman,
    Mining of Massive Datasets, 3.4.
    """
    found = [Bands(hashes // r, r, 1 - (1 - threshold**r) ** (hashes // r)) for r in range(1, hashes + 1)]
    return next((b for b in reversed(found) if b.recall >= recall), found[0])


@functools.cache
def _permutations(count: int) -> tuple[Grams, Grams]:
    a = np.array([number(f"multiply {i}") | 1 for i in range(count)], np.uint64)
    b = np.array([number(f"add {i}") for i in range(count)], np.uint64)
    return a[:, None], b[:, None]


def band_keys(grams: Grams, shape: Bands) -> Grams:
    """[bands] a number for each band of the MinHash of a set of grams (at least one). Source: Broder 1997."""
    a, b = _permutations(shape.bands * shape.rows)
    least = (grams * a + b).min(axis=1).reshape(shape.bands, shape.rows)
    out = np.arange(1, shape.bands + 1, dtype=np.uint64)
    for column in least.T:
        out = (out * _BASE) ^ (column + (out >> np.uint64(31)))
    return out


def jaccard(a: Grams, b: Grams) -> float:
    """|a and b| / |a or b| of two sets, each sorted and without repeats."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
