"""Reading data: recognise the format of a file by its rows, make records of them, and account for every row. Floor 2.

A format is one file in this package, found by itself. It defines
    NAME, HELP           how messages call it, and what a row looks like
    recognise(row)       why this row (a dict) is of the format, or "" when it is not
    convert(row)         the record that the row holds; ValueError says what is wrong with the row
    FIRST = True         (optional) asked before the others, whose rows it narrows down
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import types
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl

import pydantic

from temper.config import UserError
from temper.data.files import SUFFIXES, Row, rows
from temper.records import Chat, Message, Pair, Prompt, Ranked, Record, Text, one_line

Kind = Literal["text", "chat", "pairs", "prompts", "comparisons"]
KINDS: dict[str, tuple[type[Record], ...]] = {
    "text": (Text,), "chat": (Chat,), "pairs": (Pair,), "prompts": (Prompt,), "comparisons": (Pair, Ranked),
}  # fmt: skip
SAMPLE = 100  # rows that are looked at to recognise a format
_WHAT = {Text: "plain text", Chat: "conversations", Pair: "pairs of answers", Prompt: "prompts", Ranked: "rankings of answers"}


@functools.cache
def formats() -> dict[str, types.ModuleType]:
    """Every format of this package by its NAME, in the order in which they are asked."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {m.NAME: m for m in sorted(modules, key=lambda m: (not getattr(m, "FIRST", False), m.__name__))}


@dataclass
class Report:
    """What was read: the format and why, how many rows, what was left out and why, what was converted."""

    spec: str
    source: str = ""
    why: str = ""
    rows: int = 0
    used: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (file:line, reason)
    conversions: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line: source, format and why, rows used and skipped with the first reasons, conversions."""
        parts = [f"{self.spec}: {self.source} ({self.why}); {self.used} of {self.rows} rows"]
        if self.skipped:
            first = "; ".join(f"{at.removeprefix(self.spec + ':')}: {reason}" for at, reason in self.skipped[:10])
            parts.append(f"{len(self.skipped)} skipped (line: why): {first}{'; ...' if len(self.skipped) > 10 else ''}")
        parts += [f"{name}: {n} rows" for name, n in self.conversions.items()]
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """The skipped rows, one line each."""
        return [f"{at}: {reason}" for at, reason in self.skipped]


class Records(NamedTuple):
    """What `read` returns."""

    records: list[Any]
    report: Report


def recognise(sample: Iterable[Any]) -> tuple[types.ModuleType, str] | None:
    """(format, why) of the most rows of a sample; None when no row is of a known format."""
    found: Counter[str] = Counter()
    why: dict[str, str] = {}
    for row in sample:
        for name, module in formats().items():
            if isinstance(row, dict) and (reason := module.recognise(row)):
                found[name] += 1
                why.setdefault(name, reason)
                break
    if not found:
        return None
    name = found.most_common(1)[0][0]
    return formats()[name], why[name]


def as_kind(record: Record, kind: str) -> tuple[Record, str]:
    """(the record as that kind, what was done or ""). Raises ValueError where the record does not hold what the kind needs."""
    if isinstance(record, Pair) and kind == "chat":
        return Chat(
            messages=[*record.prompt, Message(role="assistant", content=record.chosen)], meta=record.meta
        ), "the chosen answers as conversations"
    if isinstance(record, Pair) and kind == "prompts":
        return Prompt(messages=record.prompt, meta=record.meta), "the prompts of the pairs"
    if isinstance(record, Chat) and kind == "prompts":
        messages = list(record.messages)
        if messages[-1].role != "user":
            messages = messages[: max(i for i, m in enumerate(messages) if m.role == "assistant")]
        if not messages or messages[-1].role not in ("user", "tool"):
            raise ValueError("no user turn before the last answer, so there is no prompt")
        return Prompt(messages=messages, meta=record.meta), "conversations without their last answer"
    if isinstance(record, Chat) and kind == "chat":
        last = max(i for i, m in enumerate(record.messages) if m.role == "assistant")
        if last + 1 < len(record.messages):
            kept = record.model_copy(update={"messages": record.messages[: last + 1]})
            return kept, "turns after the last answer, which train nothing, left out"
        return record, ""
    if isinstance(record, KINDS[kind]):
        return record, ""
    needed = " or ".join(_WHAT[k] for k in KINDS[kind])
    raise ValueError(f"holds {_WHAT.get(type(record), 'other records')}, needed are {needed}")


def _useless_answer(record: Record) -> str:
    """Which answer says nothing, or only what another one says; or ""."""
    if isinstance(record, Pair | Ranked):
        if isinstance(record, Pair):
            answers = {"the chosen answer": record.chosen, "the rejected answer": record.rejected}
        else:
            answers = {f"answer {i}": answer for i, answer in enumerate(record.answers, 1)}
        first: dict[str, str] = {}
        for name, answer in answers.items():
            if not answer.strip():
                return f"{name} is empty"
            if (same := first.setdefault(answer.strip(), name)) != name:
                return f"{name} is the same as {same}, so neither is the better"
    if isinstance(record, Chat):
        return next(
            (
                f"message {i} (assistant) is empty"
                for i, m in enumerate(record.messages, 1)
                if m.role == "assistant" and not m.content.strip()
            ),
            "",
        )
    return ""


def _check_text(value: Any) -> None:
    """Raises ValueError for half a surrogate pair, which no tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"half a surrogate pair (\\u{ord(value[error.start]):04x}) in the text") from None
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_text(item)


def _world(spec: str) -> tuple[list[Record], str]:
    name, _, query = spec.removeprefix("world:").partition("?")
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in ("n", "seed", "split"):
            raise UserError(f"{spec}: no option {key!r}; there are n, seed and split, as in world:{name}?n=1000&seed=0")
        options[key] = value
        if key != "split":
            if not value.isascii() or not value.isdigit():
                raise UserError(f"{spec}: {key} is {value!r}; give a whole number")
            options[key] = int(value)
    from temper.world import dataset  # here, so that reading files does not build the town

    try:
        records = list(dataset(name, **options))
    except (KeyError, ValueError) as error:
        raise UserError(f"{spec}: {error.args[0] if error.args else error}") from None
    return records, ", ".join([name, *(f"{k}={v}" for k, v in options.items())])


def _files(spec: str) -> list[Path]:
    path = Path(spec)
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.is_file() and (p.with_suffix("") if p.suffix == ".gz" else p).suffix in SUFFIXES)
    if not found:
        raise UserError(f"{spec}: the folder holds no {', '.join(SUFFIXES)} file, plain or with .gz")
    return found


def _read_file(path: Path, kind: str, skip_bad: bool, report: Report) -> list[Record]:
    read = list(rows(path))
    if not read:
        raise UserError(f"{path}: is empty; give a file with data")
    report.rows += len(read)
    known = recognise(row.value for row in [r for r in read if not r.broken][:SAMPLE])
    if known is None:
        broken = next((r for r in read if r.broken), None)
        if broken is not None and all(r.broken for r in read[:SAMPLE]):
            raise UserError(f"{path}:{broken.line}: {broken.broken}; give one JSON object per line")
        raise UserError(_unrecognised(path, read))
    module, why = known
    report.source, report.why = module.NAME, why
    out: list[Record] = []
    bad: list[tuple[str, str]] = []
    wrong: list[str] = []  # why good rows do not hold what is needed
    for row in read:
        at = f"{path}:{row.line}"
        try:
            record, done = _make(module, row, kind)
        except ValueError as error:
            bad.append((at, str(error)))
            wrong += [str(error)] if isinstance(error, _WrongKind) else []
            continue
        record.meta["at"] = at
        out.append(record)
        if done:
            report.conversions[done] += 1
    if wrong and not out:
        raise UserError(f"{path}: {module.NAME}: {wrong[0]}; give a file that holds them")
    if bad and not (skip_bad and out):
        (at, reason), more = bad[0], bad[1:]
        lines = ", ".join(at.rpartition(":")[2] for at, _ in more[:10])
        also = f" (and {len(more)} more bad rows, lines {lines}{', ...' if len(more) > 10 else ''})" if more else ""
        what = "correct the row (--skip-bad leaves such rows out and lists them)" if out else "no row of the file can be used"
        raise UserError(f"{at}: {reason}{also}; {what}")
    report.skipped += bad
    return out


class _WrongKind(ValueError):
    """A good row that does not hold what is needed."""


def _make(module: types.ModuleType, row: Row, kind: str) -> tuple[Record, str]:
    if row.broken:
        raise ValueError(row.broken)
    if not isinstance(row.value, dict):
        raise ValueError(f"a row is an object with named fields, got {_short(row.value)}")
    if not module.recognise(row.value):
        raise ValueError(f"not a row of {module.NAME} ({module.HELP}), has {_fields(row.value)}")
    try:
        _check_text(row.value)
        record = module.convert(row.value)
    except pydantic.ValidationError as error:
        raise ValueError(one_line(error)) from None
    try:
        record, done = as_kind(record, kind)
    except pydantic.ValidationError as error:
        raise ValueError(one_line(error)) from None
    except ValueError as error:
        raise _WrongKind(str(error)) from None
    if problem := _useless_answer(record):
        raise ValueError(problem)
    return record, done


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(row: dict) -> str:
    return ", ".join(repr(str(k)) for k in list(row)[:8]) or "no field"


def _unrecognised(path: Path, read: Sequence[Row]) -> str:
    first = next((r for r in read if isinstance(r.value, dict)), None)
    came = f"{path}:{first.line}: a row with {_fields(first.value)}" if first else f"{path}:{read[0].line}: {_short(read[0].value)}"
    return f"{came} is of no known format; known are " + "; ".join(f"{m.NAME} ({m.HELP})" for m in formats().values())


def read(spec: str, kind: Kind, skip_bad: bool = False) -> Records:
    """Records of one kind from a file, a folder of files, or the embedded world (`world:NAME?n=1000&seed=0&split=train`).

    A pair serves as a conversation (its chosen answer) or a prompt, a conversation as a prompt. A row that cannot be used is a
    UserError `file:line: ...`; with skip_bad it is left out and listed in the report. Every record's meta has `at`: file:line or spec:row.
    """
    report = Report(spec)
    if spec.startswith("world:"):
        made, report.why = _world(spec)
        report.source, report.rows = "the embedded world", len(made)
        records = []
        for k, record in enumerate(made, 1):
            try:
                record, done = as_kind(record, kind)
            except ValueError as error:
                raise UserError(f"{spec}: {error}; give another of its datasets") from None
            if done:
                report.conversions[done] += 1
            records.append(record.model_copy(update={"meta": {**record.meta, "at": f"{spec}:{k}"}}))
        if not records:
            raise UserError(f"{spec}: gives no rows; ask for a larger n")
    else:
        records = [r for path in _files(spec) for r in _read_file(path, kind, skip_bad, report)]
    report.used = len(records)
    return Records(records, report)
