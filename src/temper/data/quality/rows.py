"""The rows that a cleaning works on, and what a step says of a row. Floor 2.

Rows are never held: every pass reads the files anew and leaves out what is no longer there, so that memory grows by a byte per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from temper.config import Settings, UserError
from temper.data import files, sources
from temper.records import Chat, Pair, Prompt, Ranked, Rated, Record, Steps, Text

Part = Literal["row", "prompt", "answer"]


class Item(NamedTuple):
    """A row: its number among all that were read (removed ones included), file:line, the name of its data, as it stood, what it holds."""

    id: int
    at: str
    source: str
    row: Any
    record: Record


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


def _record(module: Any, row: files.Row) -> Record:
    """Raises ValueError (pydantic's too) saying what is wrong with the row."""
    if row.broken:
        raise ValueError(row.broken)
    if not isinstance(row.value, dict) or not module.recognise(row.value):
        raise ValueError(f"not a row of {module.NAME} ({module.HELP})")
    sources._check_text(row.value)
    return module.convert(row.value)


def read_rows(spec: str) -> Iterator[tuple[str, files.Row, Any]]:
    """(file:line, row as it stands, its format or the record itself) of a file, a folder or the embedded world, streamed.

    Raises UserError where a file cannot be read or its format is not known.
    """
    if spec.startswith("world:"):
        for k, record in enumerate(sources._world(spec)[0], 1):
            yield f"{spec}:{k}", files.Row(k, record.model_dump(mode="json")), record
        return
    for path in sources._files(spec):
        stream = files.rows(path)
        sample = list(islice(stream, sources.SAMPLE))
        known = sources.recognise(row.value for row in sample)
        if known is None and sample:
            raise UserError(sources._unrecognised(path, sample))
        for row in chain(sample, stream):
            yield f"{path}:{row.line}", row, known and known[0]


class Rows:
    """The rows of named data that are still there. Raises UserError at the first row that cannot be used, unless `skip_bad`."""

    def __init__(self, data: Mapping[str, str], skip_bad: bool = False) -> None:
        self.data = dict(data)
        self.bad: Verdicts = {}
        self.alive = bytearray()
        for _, at, row, made in self.raw():
            if not isinstance(made, Record):
                try:
                    _record(made, row)
                except ValueError as error:
                    why = sources.one_line(error) if isinstance(error, sources.pydantic.ValidationError) else str(error)
                    if not skip_bad:
                        raise UserError(f"{at}: {why}; correct the row (--skip-bad removes such rows and lists them)") from None
                    self.bad[len(self.alive)] = Verdict("unusable row", why)
            self.alive.append(len(self.alive) not in self.bad)
        if not any(self.alive):
            raise UserError(f"{', '.join(self.data.values())}: holds no row that can be used")

    def raw(self) -> Iterator[tuple[str, str, files.Row, Any]]:
        """(name of the data, file:line, row, format) of all rows, removed ones too."""
        for name, spec in self.data.items():
            for at, row, made in read_rows(spec):
                yield name, at, row, made

    def __len__(self) -> int:
        return sum(self.alive)

    def __iter__(self) -> Iterator[Item]:
        index = -1
        for index, (name, at, row, made) in enumerate(self.raw()):
            if index >= len(self.alive):
                break
            if self.alive[index]:
                yield Item(index, at, name, row.value, made if isinstance(made, Record) else _record(made, row))
        if index + 1 != len(self.alive):
            raise UserError(f"{', '.join(self.data.values())}: changed while it was read; leave it alone and try again")


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


def texts(record: Record, part: Part = "row") -> list[tuple[str, str]]:
    """(part, text) of the record. The part is "" but for answers that are compared: chosen and rejected must not be exchanged."""
    asked = [("", text) for text in prompt(record)] if part != "answer" else []
    if part == "prompt":
        return asked
    said = answers(record)
    return asked + [(name if len(said) > 1 else "", text) for name, text in said.items()]


def whole(record: Record, part: Part = "row") -> str:
    """The texts as one."""
    return "\n\n".join(text for _, text in texts(record, part))


class Step(Settings):
    """Base of the settings of a step."""
