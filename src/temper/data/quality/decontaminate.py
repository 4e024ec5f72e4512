"""Rows that hold something of an evaluation set, so that what is measured later was not learned by heart.

Three ways to be found, each against every text of every row of the evaluation sets, questions and reference answers alike:
a run of `ngram` words in common (13 as in arXiv:2005.14165, appendix C; texts of 8 to 12 words count as a whole, shorter ones only
where a turn says just that); or, for texts said a little otherwise, a turn that holds at least `near` of the text's 3-grams.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from temper.config import UserError, opt
from temper.data import files, sources
from temper.data.quality.clean import command
from temper.data.quality.rows import Report, Rows, Step, Verdict, Verdicts, named, prompt, read_rows, texts
from temper.data.quality.words import Grams, ngrams, words

NAME = "decontaminate"
EXAMPLES = """
  temper data decontaminate chats.jsonl --against mt-bench=question.jsonl gsm8k-test.jsonl --out clean.jsonl
  temper data decontaminate chats.jsonl --against world:evaluation --ngram 8 --near none
"""
SHORTEST = 8  # words that a shorter run has at least; arXiv:2005.14165 takes 8 to 13 by the length of the items
TURN = 3  # words of a text that is found where a turn says just that
NEAR = 3  # words of the n-grams of `near`


class Options(Step):
    """Remove rows that share a run of words with an evaluation set, or nearly repeat one of its texts."""

    against: list[str] = opt(..., "evaluation sets: files, folders or world:NAME, as NAME=FILE to name them", min_length=1)
    ngram: int = opt(13, "words in a row that must not be shared", ge=SHORTEST)
    near: float | None = opt(
        0.8, "share of an evaluation text's 3-grams in one turn from which it counts as repeated; none: do not look", gt=0, le=1
    )


class Text(NamedTuple):
    """A text of an evaluation set, and where it stands."""

    at: str
    said: str
    words: list[str]


def evaluation_texts(spec: str) -> Iterator[tuple[str, str]]:
    """(file:line, text) of all texts in the rows of an evaluation set, whatever its format; system turns and `meta` left out."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list) and not (isinstance(value, dict) and value.get("role") == "system"):
            for item in [v for k, v in value.items() if k != "meta"] if isinstance(value, dict) else value:
                yield from strings(item)

    if spec.startswith("world:"):
        rows: Iterator[tuple[str, files.Row]] = read_rows(spec)
    else:  # as it stands: an evaluation set need not be of a format that trains
        rows = ((f"{name}:{row.line}", row) for name, stream in sources._places(spec) for row in stream)
    for at, row in rows:
        if row.broken:
            raise UserError(f"{at}: {row.broken}; correct the evaluation set")
        for text in strings(row.value):
            yield at, text


class Index:
    """What evaluation texts are found by."""

    def __init__(self, found: list[Text], ngram: int, near: float | None) -> None:
        self.texts, self.ngram, self.near = found, ngram, near
        runs: dict[int, list[tuple[Grams, int]]] = defaultdict(list)
        self.turns: dict[int, int] = {}  # the one gram of a whole short text -> text
        self.grams: dict[int, Grams] = {}  # text -> its set of 3-grams
        rare: list[tuple[Grams, int]] = []
        for k, text in enumerate(found):
            n = min(len(text.words), ngram)
            if n >= SHORTEST:
                runs[n].append((ngrams(text.words, n), k))
                if near is not None:
                    self.grams[k] = np.unique(ngrams(text.words, NEAR))
            else:
                self.turns.setdefault(int(ngrams(text.words, n)[0]), k)
        self.runs = {n: _table(pairs) for n, pairs in sorted(runs.items(), reverse=True)}
        if self.grams:
            assert near is not None
            every, count = np.unique(np.concatenate(list(self.grams.values())), return_counts=True)
            for k, grams in self.grams.items():
                # a turn with `near` of the grams has one of any (1 - near) |grams| + 1 of them: the rarest
                by_rarity = grams[np.argsort(count[np.searchsorted(every, grams)], kind="stable")]
                rare.append((by_rarity[: len(grams) - int(np.ceil(near * len(grams) - 1e-9)) + 1], k))
        self.rare = _table(rare, all_owners=True)

    def find(self, turn: str) -> Verdict | None:
        """What of the evaluation sets a turn holds."""
        said = words(turn)
        if not said:
            return None
        for n, (keys, owners) in self.runs.items():
            if len(said) < n:
                continue
            grams = ngrams(said, n)
            at = np.minimum(np.searchsorted(keys, grams), len(keys) - 1)
            if len(hits := np.flatnonzero(keys[at] == grams)):
                text = self.texts[owners[at[hits[0]]]]
                return Verdict("copy", f"{n} words in a row: {' '.join(said[hits[0] : hits[0] + n])}", text.at, text.said)
        if self.near is not None and len(self.rare[0]):
            mine = np.unique(ngrams(said, NEAR))
            keys, owners = self.rare
            low, high = np.searchsorted(keys, mine), np.searchsorted(keys, mine, side="right")
            for k in sorted({int(k) for a, b in zip(low, high, strict=True) for k in owners[a:b]}):
                share = np.isin(self.grams[k], mine, assume_unique=True).mean()
                if share >= self.near:
                    text = self.texts[k]
                    return Verdict("near copy", f"holds {share:.0%} of its 3-grams", text.at, text.said, float(share))
        return None

    def same(self, turn: str) -> Verdict | None:
        """The short text of the evaluation sets that a turn repeats word for word."""
        said = words(turn)
        if TURN <= len(said) < SHORTEST and (k := self.turns.get(int(ngrams(said, len(said))[0]))) is not None:
            return Verdict("copy", "the whole turn", self.texts[k].at, self.texts[k].said)
        return None


def _table(pairs: list[tuple[Grams, int]], all_owners: bool = False) -> tuple[Grams, np.ndarray]:
    """Sorted grams and the text of each; a gram of several texts once, with the first of them, unless `all_owners`."""
    if not pairs:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    keys = np.concatenate([grams for grams, _ in pairs])
    owners = np.concatenate([np.full(len(grams), k) for grams, k in pairs])
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    if all_owners:
        return keys, owners
    keys, first = np.unique(keys, return_index=True)
    return keys, owners[first]


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """One pass. The evaluation sets are held in memory, the rows are not."""
    sets = named(options.against)
    found: list[Text] = []
    of: dict[str, str] = {}  # file:line -> evaluation set
    for name, spec in sets.items():
        before = len(found)
        for at, said in evaluation_texts(spec):
            if len(split := words(said)) >= TURN:
                found.append(Text(at, said, split))
                of[at] = name
        if len(found) == before:
            raise UserError(f"--against {spec}: holds no text of {TURN} words or more")
        report.sources[name] = {"texts": len(found) - before, "rows that hold them": 0}
    index = Index(found, options.ngram, options.near)
    verdicts: Verdicts = {}
    for item in rows:
        asked = prompt(item.record)
        every = (index.same(turn) for turn in asked)
        hit = next((v for v in every if v), None) or next((v for _, turn in texts(item) if (v := index.find(turn))), None)
        if hit:
            verdicts[item.id] = hit
            report.sources[of[hit.of]]["rows that hold them"] += 1
    report.notes += [f"{name}: {n['rows that hold them']} rows hold one of its {n['texts']} texts" for name, n in report.sources.items()]
    return verdicts


main = partial(command, NAME)
