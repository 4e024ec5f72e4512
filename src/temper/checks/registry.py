"""What a check is, what it looks at, and the one list of all of them. Floor 6."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from temper.config import UserError
from temper.data.quality import rows as quality
from temper.data.trees import where
from temper.forest import Tree
from temper.judges.rating import reads
from temper.methods.base import Prepared
from temper.records import Prompt, Record

Severity = Literal["error", "warning", "note"]
SHOWN = 5  # rows of a finding that are named in the terminal
_BETWEEN = re.compile("( = | against )")
_PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+(?::\d+)?)")
LOOK = 2000  # rows that the slower checks look at before training; `temper doctor` looks at all


class Found(NamedTuple):
    """What a check yields. rows: file:line each. do: instead of the check's own advice. detail: more lines."""

    severity: Severity
    what: str
    rows: Sequence[str] = ()
    do: str = ""
    detail: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that was found: how bad, in which rows, why it matters, what to do."""

    check: str
    severity: Severity
    what: str
    rows: tuple[str, ...] = ()
    why: str = ""
    do: str = ""
    detail: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the terminal: what and where; for more than a note, also why and what to do."""
        at = f" [{listed(self.rows)}]" if self.rows else ""
        out = [f"{self.severity}: {self.check}: {self.what}{at}", *(f"    {line}" for line in self.detail)]
        if self.severity != "note":
            out += [f"    why: {self.why}", f"    do:  {self.do}"]
        return out


def listed(rows: Sequence[str]) -> str:
    """The first rows, a file named once on each side: `chats.jsonl:3, 7 = 5, 9 = test.jsonl:2, 11 = 3, ... (9 in all)`."""
    shown: list[str] = []
    last: dict[int, str] = {}  # side -> the file named there
    for row in rows[:SHOWN]:
        sides = []
        for side, place in enumerate(_BETWEEN.split(row)):
            if found := _PLACE.fullmatch(place):
                known = last.get(side, last.get(0)) == found["file"]
                last[side], place = found["file"], found["line"] if known else place
            sides.append(place)
        shown.append("".join(sides))
    return ", ".join(shown) + (f", ... ({len(rows):,} in all)" if len(rows) > SHOWN else "")


def many(n: int, what: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


@dataclass
class Case:
    """One input of one stage, as far as it can be had: rows always, tokens and model where they are there."""

    method: str
    settings: Mapping[str, Any]  # flat, every default written out
    spec: str  # what was read
    records: Sequence[Record]
    unread: Sequence[tuple[str, str]] = ()  # (file:line, why) of rows that cannot be used
    prepared: Prepared | None = None
    steps: int = 0  # optimiser steps in all
    thorough: bool = True  # False: right before training, where a check may look at LOOK rows and measures no memory
    evaluation_sets: Sequence[str] = ()  # files of test questions
    ranks: int = 1  # processes that train together
    measured: dict[str, Any] = field(default_factory=dict)  # by one check, for another

    @property
    def some(self) -> Sequence[Record]:
        """The rows for checks whose time is felt."""
        return self.records if self.thorough else self.records[:LOOK]

    def at(self, index: int) -> str:
        """file:line of a record."""
        return where(self.records[index], index)

    @cached_property
    def rows(self) -> list[int]:
        """Of each tree, the index of its record. Empty where a record has several (documents cut into windows)."""
        p = self.prepared
        kept = [i for i in range(len(self.records)) if i not in p.corpus.kept.dropped] if p else []
        return kept if p and len(kept) == len(p.corpus.trees) else []

    def tree_at(self, k: int) -> str:
        """file:line of the record that a tree was made of."""
        return self.at(self.rows[k]) if self.rows else f"window {k + 1}"

    @property
    def learns(self) -> bool:
        """Whether the trees have targets: prompts and documents are no answers."""
        return self.prepared is not None and not isinstance(next(iter(self.records), None), Prompt)


class Check(NamedTuple):
    """A function of a case, and what its findings mean."""

    name: str
    run: Callable[[Case], Iterator[Found]]
    why: str
    do: str


CHECKS: dict[str, Check] = {}  # in the order in which they run


def check(name: str, *, why: str, do: str) -> Callable:
    """Register a check under its name. why: it matters; do: about it."""

    def register(run: Callable[[Case], Iterator[Found]]) -> Callable[[Case], Iterator[Found]]:
        assert name not in CHECKS, name
        CHECKS[name] = Check(name, run, why, do)
        return run

    return register


def findings(one: Check, found: Iterable[Found]) -> list[Finding]:
    """What a check yields, with what it means."""
    return [Finding(one.name, f.severity, f.what, tuple(f.rows), one.why, f.do or one.do, tuple(f.detail)) for f in found]


def run_checks(case: Case, names: Sequence[str] = ()) -> list[Finding]:
    """What the checks (all, or those named) find, the worst first. A check whose subject raises UserError finds that."""
    out = []
    for one in [CHECKS[name] for name in names] if names else CHECKS.values():
        try:
            found = list(one.run(case))
        except UserError as error:
            found = [Found("error", str(error))]
        out += findings(one, found)
    return sorted(out, key=lambda f: ("error", "warning", "note").index(f.severity))


# ---------------------------------------------------------------- what a record says, and how long it is


def lengths(tree: Tree) -> list[int]:
    """Tokens along the path to the end of each segment."""
    out: list[int] = []
    for s in tree:
        out.append(len(s.tokens) + (out[s.parent] if s.parent >= 0 else 0))
    return out


def answers(record: Record) -> list[str]:
    """The answers that end a record, the best first; a document's text; none of a prompt."""
    return list(quality.answers(record).values())


def said(record: Record) -> str:
    """All that a record says, as one string."""
    return "\n".join([*quality.prompt(record), *answers(record)])


def reward_models(values: Mapping[str, Any]) -> list[str]:
    """The folders of the models that a stage's --reward is made of."""
    return [name for name in (reads(values["reward"]) if values.get("reward") else ()) if not name.endswith((".py", ".json"))]
