"""Mixing data sets in given proportions, with what it does to their counts.

Rows are chosen without repeats, by (seed, data set); the counts are the shares rounded by largest remainder, so exact to one row.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pydantic

from temper.config import UserError, opt
from temper.data.packing import counts, epoch_order
from temper.data.quality.clean import command
from temper.data.quality.rows import Report, Rows, Step, Verdict, Verdicts

NAME = "mix"
EXAMPLES = """
  temper data mix a.jsonl b.jsonl --weights a=0.7,b=0.3 --out mixed.jsonl
  temper data mix chat=chats/ maths=gsm8k-train.jsonl --weights chat=3,maths=1 --rows 4000 --out mixed.jsonl
"""


class Options(Step):
    """Take rows of several data sets in given proportions."""

    weights: dict[str, float] = opt(..., "the share of each data set by its name, as a=0.7,b=0.3; any positive numbers")
    rows: int | None = opt(None, "rows in all; none: as many as the data sets give without repeats", ge=1)
    seed: int = opt(0, "which rows are taken")

    @pydantic.field_validator("weights", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=")[::2] for part in value.split(",")]
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name stands twice")
        return {name.strip(): share for name, share in pairs}

    @pydantic.field_validator("weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or min(value.values()) < 0 or not sum(value.values()):
            raise ValueError("give each data set a weight of 0 or more, and one of them more than 0")
        return value


def run(options: Options, rows: Rows, report: Report) -> Verdicts:
    """Two passes."""
    if strange := options.weights.keys() - rows.data.keys():
        raise UserError(f"mix: no data set {sorted(strange)[0]!r}; there are {', '.join(rows.data)}")
    if missing := rows.data.keys() - options.weights.keys():
        raise UserError(f"mix: {sorted(missing)[0]!r} has no weight; give it one, 0 to leave it out")
    have = Counter(item.source for item in rows)
    before = sum(have.values())
    take = counts(options.weights, {name: have[name] for name in rows.data}, options.rows)
    total = sum(take.values())
    chosen = {}
    for k, (name, n) in enumerate(take.items()):
        chosen[name] = np.zeros(have[name], bool)
        if n:
            chosen[name][epoch_order(have[name], options.seed, k)[:n]] = True
        report.sources[name] = {"rows": have[name], "share": f"{have[name] / before:.1%}", "taken": n, "of the mix": f"{n / total:.1%}"}
    seen: Counter[str] = Counter()
    verdicts: Verdicts = {}
    for item in rows:
        if not chosen[item.source][seen[item.source]]:
            verdicts[item.id] = Verdict("not in the mix", f"{take[item.source]} of {have[item.source]} rows of {item.source} are")
        seen[item.source] += 1
    return verdicts


main = partial(command, NAME)
