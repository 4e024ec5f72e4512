"""Pairs of answers: what their labels follow besides quality, and the pairs that teach nothing or contradict each other.

Measured, and never a reason to remove: P(the chosen answer is longer), and which openings are chosen more or less often than half
the time (a length or a phrase that a reward model learns instead of quality: arXiv:2310.03716). Removed: equal answers, and pairs
that prefer a to b where others prefer b to a, all of them, for nobody knows which is right.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from temper.config import UserError, opt
from temper.data.quality.clean import command
from temper.data.quality.rows import Report, Rows, Step, Verdict, Verdicts, prompt
from temper.data.quality.words import number, words
from temper.data.split import opening
from temper.records import Pair
from temper.stats.intervals import share_interval, win_rate

NAME = "pairs"
EXAMPLES = """
  temper data pairs preferences.jsonl
  temper data pairs hh-rlhf.jsonl.gz --skip-bad --out clean.jsonl
"""
SEEN = 20  # how often an opening must stand in just one of the two answers to be looked at
LISTED = 5


class Options(Step):
    """Check the labels of pairs for bias; remove equal answers and contradictory labels."""

    opening_words: int = opt(1, "words of an answer's opening", ge=1)


def _same(text: str) -> str:
    return " ".join(text.split())


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """One pass; a few numbers a row. Intervals are those of the groups of rows with the same first question."""
    found: Verdicts = {}
    sides: dict[int, list[tuple[int, str, bool]]] = defaultdict(list)  # {prompt, a, b} -> (row, file:line, a before b)
    chosen_length: list[int] = []
    rejected_length: list[int] = []
    group: list[int] = []
    begins: dict[str, list[tuple[bool, int]]] = defaultdict(list)  # opening -> (it is the chosen answer's, group)
    for item in rows:
        pair = item.record
        if not isinstance(pair, Pair):
            raise UserError(f"{item.at}: holds no pair of answers; pairs looks at chosen and rejected")
        a, b = _same(pair.chosen), _same(pair.rejected)
        if a == b:
            found[item.id] = Verdict("equal answers")
            continue
        key = number("\x1f".join([*map(_same, prompt(pair)), *sorted((a, b))]))
        sides[key].append((item.id, item.at, a < b))
        chosen_length.append(len(pair.chosen))
        rejected_length.append(len(pair.rejected))
        group.append(number(opening(pair)))
        x, y = (" ".join(words(text[:200])[: options.opening_words]) for text in (pair.chosen, pair.rejected))
        if x != y:
            begins[x].append((True, group[-1]))
            begins[y].append((False, group[-1]))
    for same in sides.values():
        if len({way for _, _, way in same}) == 2:
            for index, _, way in same:
                found[index] = Verdict("contradictory label", "", next(at for _, at, other in same if other != way))
    if not chosen_length:
        return found
    longer = win_rate(chosen_length, rejected_length, group)
    ties = sum(a == b for a, b in zip(chosen_length, rejected_length, strict=True))
    report.numbers["chosen_longer"] = longer.to_dict()
    report.notes.append(
        f"P(chosen is longer) {longer.mean:.3f} [{longer.low:.3f}, {longer.high:.3f}] of {longer.n} pairs, in characters; "
        f"{ties} of equal length count half"
    )
    openings = {}
    for text, cases in begins.items():
        if len(cases) >= SEEN and text:
            openings[text] = share_interval([first for first, _ in cases], [g for _, g in cases])
    biased = {text: i for text, i in openings.items() if not i.low <= 0.5 <= i.high}
    report.numbers["openings"] = {text: i.to_dict() for text, i in biased.items()}
    for text, i in sorted(biased.items(), key=lambda entry: (-max(entry[1].low - 0.5, 0.5 - entry[1].high), entry[0]))[:LISTED]:
        report.notes.append(f"an answer that begins with {text!r} is chosen {i.mean:.2f} [{i.low:.2f}, {i.high:.2f}] of {i.n} times")
    if openings:
        by_chance = 0.05 * len(openings)
        report.notes.append(
            f"{len(biased)} of {len(openings)} openings are off half beyond their 95% interval; chance alone gives about {by_chance:.1f}"
        )
    return found


main = partial(command, NAME)
