"""The rows that a cleaning works on, and what a step says of a row. Floor 2.

Rows are never held: every pass reads the files anew and leaves out what is no longer there, so that memory grows by a byte per row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import pydantic

from temper.config import Settings, UserError
from temper.data import files, sources
from temper.data.ahead import ahead, cores, cut
from temper.records import Chat, Pair, Prompt, Ranked, Rated, Record, Steps, Text, one_line

Part = Literal["row", "prompt", "answer"]
T = TypeVar("T")


class Item(NamedTuple):
    """A row: its number among all that were read (removed ones included), file:line, the name of its data, as it stood, what it holds."""

    id: int
    at: str
    source: str
    row: Any
    records: list[Record]

    @property
    def record(self) -> Record:
        """The first record: but for trees and scored lists the only one."""
        return self.records[0]


class Verdict(NamedTuple):
    """Why a row is removed, or flagged only. of: which row or evaluation item it repeats; like: the text of that one."""

    reason: str
    detail: str = ""
    of: str = ""
    like: str = ""
    score: float | None = None
    flag: bool = False

    @property
    def why(self) -> str:
        """One line."""
        return f"{self.reason}{f' of {self.of}' if self.of else ''}{f': {self.detail}' if self.detail else ''}"


Verdicts = dict[int, Verdict]  # by the index of the row; rows that are not in it stay


@dataclass
class Report:
    """What a step did. `numbers` for programs, `notes` for people: what the step measured besides."""

    step: str
    settings: dict[str, Any] = field(default_factory=dict)
    rows_in: int = 0
    rows_out: int = 0
    removed: int = 0
    flagged: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def named(specs: Sequence[str]) -> dict[str, str]:
    """Data by name: `NAME=SPEC`, or a spec whose name is that of its file without endings. Raises UserError for a name given twice."""
    out: dict[str, str] = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not equals or not rest or any(c in name for c in "/:?") or Path(spec).exists():
            name, rest = (Path(spec).name.split(".")[0] or spec) if not spec.startswith("world:") else spec.partition("?")[0], spec
        if name in out:
            raise UserError(f"{spec}: a second data set of the name {name!r}; give it another as NAME={rest}")
        out[name] = rest
    return out


def records(row: files.Row) -> list[Record]:
    """What a row holds, by its own format. Raises ValueError (pydantic's too) saying what is wrong with the row."""
    if row.broken:
        raise ValueError(row.broken)
    known = sources.first(row.value)
    if known is None:
        raise ValueError("a row of no known format")
    sources._check_text(row.value)
    made = sources.records_of(known[0], row.value)
    if not made:
        raise ValueError(f"a row of {known[0].NAME} that holds nothing")
    return made


def read_rows(spec: str) -> Iterator[tuple[str, files.Row]]:
    """(file:line, row as it stands) of what a spec names, streamed; rows that make one (messages of a tree) put together.

    Raises UserError where it cannot be read or is of no known format.
    """
    if spec.startswith("world:"):
        for k, record in enumerate(sources._world(spec)[0], 1):
            yield f"{spec}:{k}", files.Row(k, record.model_dump(mode="json"))
        return
    for name, stream in sources._places(spec):
        sample = list(islice(stream, sources.SAMPLE))
        known = sources.recognise(row.value for row in sample)
        if known is None and sample:
            raise UserError(sources._unrecognised(name, sample))
        every: Iterator[files.Row] = chain(sample, stream)
        for row in known[0].gather(every) if known and hasattr(known[0], "gather") else every:
            yield f"{name}:{row.line}", row


class Rows:
    """The rows of named data that are still there. Raises UserError at the first row that cannot be used, unless `skip_bad`."""

    def __init__(self, data: Mapping[str, str], skip_bad: bool = False) -> None:
        self.data = dict(data)
        self.bad: Verdicts = {}
        self.alive = bytearray()
        if "-" in self.data.values():
            raise UserError("-: standard input can be read only once, and rows are read several times; give a file")
        for found in ahead(_wrong, cut((at, row) for _, at, row in self.raw()), cores()):
            for at, why in found:
                if why and not skip_bad:
                    raise UserError(f"{at}: {why}; correct the row (--skip-bad removes such rows and lists them)")
                if why:
                    self.bad[len(self.alive)] = Verdict("unusable row", why)
                self.alive.append(not why)
        if not any(self.alive):
            raise UserError(f"{', '.join(self.data.values())}: holds no row that can be used")

    def raw(self) -> Iterator[tuple[str, str, files.Row]]:
        """(name of the data, file:line, row) of all rows, removed ones too."""
        for name, spec in self.data.items():
            for at, row in read_rows(spec):
                yield name, at, row

    def __len__(self) -> int:
        return sum(self.alive)

    def _there(self) -> Iterator[tuple[int, str, str, Any]]:
        """(number, file:line, name of the data, row) of the rows that are still there."""
        read = 0
        for id, (name, at, row) in enumerate(self.raw()):
            read = id + 1
            if id < len(self.alive) and self.alive[id]:
                yield id, at, name, row.value
        if read != len(self.alive):
            raise UserError(f"{', '.join(self.data.values())}: changed while it was read; leave it alone and try again")

    def __iter__(self) -> Iterator[Item]:
        return map(_item, self._there())

    def those(self, numbers: Collection[int]) -> Iterator[Item]:
        """Those of these numbers."""
        return (_item(row) for row in self._there() if row[0] in numbers)

    def each(self, work: Callable[[Item], T]) -> Iterator[tuple[int, T]]:
        """(number, what `work` gives) of each row that is still there, in order; by several processes where there are many rows."""
        for found in ahead(partial(_worked, work), cut(self._there()), cores()):
            yield from found


class Items(list[Item]):
    """Rows that are in memory, for a step that takes `Rows`."""

    def those(self, numbers: Collection[int]) -> Iterator[Item]:
        """Those of these numbers."""
        return (item for item in self if item.id in numbers)

    def each(self, work: Callable[[Item], T]) -> Iterator[tuple[int, T]]:
        """(number, what `work` gives) of each row."""
        return ((item.id, work(item)) for item in self)


def _item(row: tuple[int, str, str, Any]) -> Item:
    return Item(*row, records(files.Row(0, row[3])))


def _worked(work: Callable[[Item], T], rows: Sequence[tuple[int, str, str, Any]]) -> list[tuple[int, T]]:
    return [(row[0], work(_item(row))) for row in rows]


def _wrong(rows: Sequence[tuple[str, files.Row]]) -> list[tuple[str, str]]:
    """(file:line, what is wrong with the row or "") of each."""
    out = []
    for at, row in rows:
        try:
            records(row)
        except ValueError as error:
            out.append((at, one_line(error) if isinstance(error, pydantic.ValidationError) else str(error)))
        else:
            out.append((at, ""))
    return out


# ---------------------------------------------------------------- what a record says


def prompt(record: Record) -> list[str]:
    """The turns before the answer that counts (the last); of plain text none."""
    if isinstance(record, Chat):
        last = max(i for i, m in enumerate(record.messages) if m.role == "assistant")
        return [m.content for m in record.messages[:last]]
    if isinstance(record, Prompt):
        return [m.content for m in record.messages]
    return [m.content for m in getattr(record, "prompt", [])]


def answers(record: Record) -> dict[str, str]:
    """The answers by their part in the row, the best first; a plain text is an answer to nothing."""
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Chat):
        return {"answer": next(m.content for m in reversed(record.messages) if m.role == "assistant")}
    if isinstance(record, Pair):
        return {"chosen": record.chosen, "rejected": record.rejected}
    if isinstance(record, Ranked):
        return {f"answer {i}": answer for i, answer in enumerate(record.answers, 1)}
    if isinstance(record, Rated):
        return {"answer": record.answer}
    if isinstance(record, Steps):
        return {"answer": "\n".join(record.steps)}
    return {name: getattr(record, name) for name in ("a", "b") if hasattr(record, name)}


def best(record: Record) -> str:
    """The answer that would be learned: the only, the chosen or the highest ranked; "" where there is none."""
    return next(iter(answers(record).values()), "")


def texts(item: Item, part: Part = "row") -> list[tuple[str, str]]:
    """(part, text) of all that a row holds, each text once.

    The part is "" but for answers that are compared: chosen and rejected must not be exchanged.
    """
    out: dict[tuple[str, str], None] = {}
    for record in item.records:
        if part != "answer":
            out.update(dict.fromkeys(("", text) for text in prompt(record)))
        if part != "prompt":
            said = answers(record)
            out.update(dict.fromkeys((name if len(said) > 1 else "", text) for name, text in said.items()))
    return list(out)


def whole(item: Item, part: Part = "row") -> str:
    """The texts as one."""
    return "\n\n".join(text for _, text in texts(item, part))


class Step(Settings):
    """Base of the settings of a step."""
