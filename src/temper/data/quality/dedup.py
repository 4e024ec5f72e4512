"""Exact and near duplicates: a row goes where one that stays says the same.

Exact: the same texts but for white space. Near: the sets of word n-grams have a Jaccard similarity of at least `near`; which pairs
are compared is found by MinHash in bands (Broder 1997; n-grams of five words and 0.8 as in arXiv:2107.06499), and their similarity is
then computed, not estimated. Of rows alike the first stays: each that goes has one that stays. No chains: like is like one that stays.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from functools import partial
from hashlib import blake2b
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from temper.config import opt
from temper.data.quality.clean import command
from temper.data.quality.rows import Item, Part, Report, Rows, Step, Verdict, Verdicts, texts, whole
from temper.data.quality.words import Bands, Grams, band_keys, banding, jaccard, ngrams, number, words

NAME = "dedup"
EXAMPLES = """
  temper data dedup chats.jsonl --out clean.jsonl
  temper data dedup chats.jsonl more/ --part prompt --near 0.7 --out clean.jsonl
"""
COMPARED = 200  # rows that a row is compared with at most


class Options(Step):
    """Remove exact and near duplicates; of rows alike the first stays."""

    near: float | None = opt(0.8, "Jaccard similarity of word n-grams from which rows are alike; none: exact duplicates only", gt=0, le=1)
    ngram: int = opt(5, "words of an n-gram", ge=1)
    part: Part = opt("row", "what is compared: the whole row, its prompt, or its answers")


def grams_of(item: Item, options: Options) -> Grams:
    """The set of a row's n-grams, sorted; those of chosen and rejected answers are told apart."""
    each = [
        ngrams(words(text, signs=True), options.ngram) ^ np.uint64(number(name) if name else 0) for name, text in texts(item, options.part)
    ]
    return np.unique(np.concatenate(each)) if each else np.empty(0, np.uint64)


def marks(options: Options, shape: Bands, item: Item) -> tuple[bytes, bytes]:
    """(what equal texts have in common, the keys of the row's bands): empty where the row says nothing, or only equals are asked for."""
    said = "\x1f".join(f"{name}\x1e{' '.join(text.split())}" for name, text in texts(item, options.part))
    digest = blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest() if said else b""
    if not said or options.near is None or not len(grams := grams_of(item, options)):
        return digest, b""
    return digest, band_keys(grams, shape).tobytes()


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """Two passes: the first finds equal texts and who shares a band with whom, the second compares those. 8 bytes a band and row."""
    shape = banding(options.near or 1.0)
    digests, keys, told, keyed = bytearray(), bytearray(), array("q"), array("q")
    for id, (digest, key) in rows.each(partial(marks, options, shape)):
        digests += digest
        keys += key
        told.extend([id] * bool(digest))
        keyed.extend([id] * bool(key))
    equal = _equal(np.frombuffer(told, np.int64), np.frombuffer(digests, np.uint64).reshape(-1, 2))
    table, index = np.frombuffer(keys, np.uint64).reshape(-1, shape.bands), np.frombuffer(keyed, np.int64)
    single = np.array([i not in equal for i in keyed], bool)
    groups = _groups(index[single], table[single])
    del digests, keys, told, keyed, table, index
    at: dict[int, str] = {}
    wanted = set(equal.values())
    kept: dict[int, list[int]] = defaultdict(list)  # group -> its rows that stay
    grams_at: dict[int, tuple[Grams, str]] = {}
    found: Verdicts = {}
    capped = compared = 0
    for item in rows.those(wanted | groups.keys()) if groups or equal else ():
        at[item.id] = item.at
        if item.id not in groups:
            continue
        assert options.near is not None
        grams = grams_of(item, options)
        mine = groups[item.id]
        candidates = dict.fromkeys(i for group in mine for i in kept[group])
        capped += len(candidates) > COMPARED
        for other in islice(candidates, COMPARED):
            compared += 1
            alike = jaccard(grams, grams_at[other][0])
            if alike >= options.near:
                found[item.id] = Verdict("near duplicate", f"Jaccard {alike:.2f}", at[other], grams_at[other][1], alike)
                break
        else:
            grams_at[item.id] = grams, whole(item, options.part)
            for group in mine:
                kept[group].append(item.id)
    for id, same in equal.items():
        found[id] = found[same] if same in found else Verdict("exact duplicate", of=at[same], score=1.0)
    report.numbers.update(bands=shape.bands, rows_per_band=shape.rows, recall=shape.recall, compared=compared, capped=capped)
    if options.near is not None:
        report.notes.append(
            f"pairs of similarity {options.near:g} are compared with a probability of {shape.recall:.1%}; {compared} pairs were"
        )
    if capped:
        report.notes.append(
            f"{capped} rows have more than {COMPARED} rows that may be like them, and were compared with the first of these"
        )
    return found


def _equal(index: NDArray[np.int64], digests: Grams) -> dict[int, int]:
    """row -> the first that says the same, of rows [n] in their order with digests [n, 2]."""
    order = np.lexsort(digests.T)
    new = np.r_[True, (digests[order][1:] != digests[order][:-1]).any(1)] if len(order) else np.empty(0, bool)
    first = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    again = order != first
    return dict(zip(index[order[again]].tolist(), index[first[again]].tolist(), strict=True))


def _groups(index: NDArray[np.int64], table: Grams) -> dict[int, list[int]]:
    """row -> numbers of the groups (rows with the same key of a band) that it shares with others, of rows [n] with keys [n, bands]."""
    groups: dict[int, list[int]] = defaultdict(list)
    if not len(index):
        return groups
    number_of = 0
    for column in table.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        sizes = np.diff(np.r_[starts, len(ordered)])
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            for i in index[order[start : start + size]].tolist():
                groups[i].append(number_of)
            number_of += 1
    return groups


main = partial(command, NAME)
