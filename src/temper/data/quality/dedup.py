"""Exact and near duplicates: a row goes where one that stays says the same.

Exact: the same texts but for white space. Near: the sets of word n-grams have a Jaccard similarity of at least `near`; which pairs
are compared is found by MinHash in bands (Broder 1997; n-grams of five words and 0.8 as in arXiv:2107.06499), and their similarity is
then computed, not estimated. Of rows alike the first stays: each that goes has one that stays. No chains: like is like one that stays.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from hashlib import blake2b
from itertools import islice

import numpy as np

from temper.config import opt
from temper.data.quality.clean import command
from temper.data.quality.rows import Item, Part, Report, Rows, Step, Verdict, Verdicts, texts, whole
from temper.data.quality.words import Grams, band_keys, banding, jaccard, ngrams, number, words

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


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """Two passes: the first finds equal texts and who shares a band with whom, the second compares those. 8 bytes a band and row."""
    first: dict[bytes, int] = {}
    at: dict[int, str] = {}
    equal: dict[int, int] = {}  # row -> the first that says the same
    shape = banding(options.near or 1.0)
    keys: list[Grams] = []
    keyed: list[int] = []
    for item in rows:
        said = "\x1f".join(f"{name}\x1e{' '.join(text.split())}" for name, text in texts(item, options.part))
        if not said:
            continue
        digest = blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if (same := first.setdefault(digest, item.id)) != item.id:
            equal[item.id] = same
        elif options.near is not None and len(grams := grams_of(item, options)):
            keys.append(band_keys(grams, shape))
            keyed.append(item.id)
    del first
    groups = _groups(keyed, keys)
    del keys, keyed
    wanted = set(equal.values())
    kept: dict[int, list[int]] = defaultdict(list)  # group -> its rows that stay
    grams_at: dict[int, tuple[Grams, str]] = {}
    found: Verdicts = {}
    capped = compared = 0
    for item in rows if groups or equal else ():
        if item.id in wanted:
            at[item.id] = item.at
        if item.id not in groups:
            continue
        at[item.id] = item.at
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
    for index, same in equal.items():
        found[index] = found[same] if same in found else Verdict("exact duplicate", of=at[same], score=1.0)
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


def _groups(keyed: list[int], keys: list[Grams]) -> dict[int, list[int]]:
    """row -> numbers of the groups (rows with the same key of a band) that it shares with others."""
    groups: dict[int, list[int]] = defaultdict(list)
    if not keys:
        return groups
    table, index, number_of = np.stack(keys), np.array(keyed), 0
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
