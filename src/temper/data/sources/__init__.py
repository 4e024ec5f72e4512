"""Reading data: recognise the format of a file by its rows, make records of them, and account for every row. Floor 2.

A format is one file in this package, found by itself. It defines
    NAME, HELP           how messages call it, and what a row looks like
    FIELDS               the fields that it reads; a row's other fields are kept in the record's `meta`
    recognise(row)       why this row (a dict) is of the format, or "" when it is not
    convert(row)         the record that the row holds; ValueError says what is wrong with the row
and, where it has reason to,
    flatten(row, kind)   instead of `convert` for a row that holds several records: those of it that make that kind
    gather(rows)         first puts together the rows that make one, as messages of a tree
    KIND, write(record, meta)   the kind of record that a row can be written from, and that row; takes out of `meta` what it writes
    FIRST, LAST = True   asked before the others, whose rows it narrows down; or after them, for its rows are the plainest
"""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import pydantic

from temper.config import UserError
from temper.data import hub
from temper.data.ahead import cut
from temper.data.files import PACKED, STDIN, SUFFIXES, Row, rows
from temper.records import Chat, Message, Pair, Prompt, Ranked, Rated, Record, Steps, Text, one_line

Kind = Literal["text", "chat", "pairs", "prompts", "comparisons", "rated", "steps", "messages", "any"]
KINDS: dict[str, tuple[type[Record], ...]] = {
    "text": (Text,), "chat": (Chat,), "pairs": (Pair,), "prompts": (Prompt,), "comparisons": (Pair, Ranked), "rated": (Rated,),
    "steps": (Steps,), "messages": (Chat, Prompt), "any": (Record,),
}  # fmt: skip
SAMPLE = 100  # rows that are looked at to recognise a format
_WHAT = {
    Text: "plain text", Chat: "conversations", Pair: "pairs of answers", Prompt: "prompts", Ranked: "rankings of answers",
    Rated: "rated answers", Steps: "solutions with labelled steps",
}  # fmt: skip


@functools.cache
def formats() -> dict[str, types.ModuleType]:
    """Every format of this package by its NAME, in the order in which they are asked."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {m.NAME: m for m in sorted(modules, key=lambda m: (not hasattr(m, "FIRST"), hasattr(m, "LAST"), m.__name__))}


def first(row: Any) -> tuple[types.ModuleType, str] | None:
    """(format, why) of one row; None where it is of no known format."""
    if isinstance(row, dict):
        for module in formats().values():
            if reason := module.recognise(row):
                return module, reason
    return None


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
        many = self.used > self.rows - len(self.skipped)  # rows that hold several records
        count = f"{self.used} records of {self.rows} rows" if many else f"{self.used} of {self.rows} rows"
        parts = [f"{self.spec}: {self.source} ({self.why}); {count}"]
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
        if known := first(row):
            found[known[0].NAME] += 1
            why.setdefault(known[0].NAME, known[1])
    if not found:
        return None
    name = found.most_common(1)[0][0]
    return formats()[name], why[name]


def _said(record: Pair | Ranked | Rated | Steps, answer: str) -> Chat:
    """The conversation with that answer; what else the record knows stays in meta, so that `_unsaid` can make it again."""
    more = record.model_dump(exclude={"prompt", "meta", "chosen", "answer"}, exclude_defaults=True)
    if isinstance(record, Ranked):
        more["answers"] = record.answers[1:]
    return Chat(messages=[*record.prompt, Message(role="assistant", content=answer)], meta={**record.meta, **more})


def _unsaid(chat: Chat) -> Record:
    """The pair, ranking or rated answer that a conversation was made from, where its meta tells; else the conversation."""
    last, meta = chat.messages[-1].content, chat.meta
    forms: list[tuple[type[Record], dict[str, Any]]] = [
        (Pair, {"chosen": last, "rejected": meta.get("rejected")}),
        (Ranked, {"answers": [last, *meta["answers"]] if isinstance(meta.get("answers"), list) else None}),
        (Rated, {"answer": last, "rating": meta.get("rating")}),
    ]
    for model, own in forms:
        if None not in own.values():
            more = {k: v for k, v in meta.items() if k in model.model_fields}
            rest = {k: v for k, v in meta.items() if k not in more}
            return model.model_validate({**more, **own, "prompt": chat.messages[:-1], "meta": rest})
    return chat


def _as_chat(record: Record) -> tuple[list[Record], str]:
    match record:
        case Chat():
            last = max(i for i, m in enumerate(record.messages) if m.role == "assistant")
            if last + 1 < len(record.messages):
                kept = record.model_copy(update={"messages": record.messages[: last + 1]})
                return [kept], "turns after the last answer, which train nothing, left out"
            return [record], ""
        case Pair():
            return [_said(record, record.chosen)], "the chosen answers as conversations, the rejected ones in their meta"
        case Ranked():
            return [_said(record, record.answers[0])], "the best answers as conversations, the others in their meta"
        case Rated():
            good, what = record.rating > 0.5, "thumbs up"
            return ([_said(record, record.answer)], f"answers with {what}") if good else ([], f"answers without {what} left out")
        case Steps():
            if any(label is not None and label <= 0 for label in record.labels):
                return [], "solutions with a wrong step left out"
            return [_said(record, "\n".join(record.steps))], "solutions without a wrong step, a line for each step"
    return [], ""


def _as_prompts(record: Record) -> tuple[list[Record], str]:
    if not isinstance(record, Chat):
        prompt = getattr(record, "prompt", None)
        if not prompt:
            return [], ""
        what = _WHAT.get(type(record), "judgements").split(" of ")[0]
        return [Prompt(messages=prompt, meta={**record.meta})], f"the prompts of the {what}"
    messages = list(record.messages)
    if messages[-1].role != "user":
        messages = messages[: max(i for i, m in enumerate(messages) if m.role == "assistant")]
    if not messages or messages[-1].role not in ("user", "tool"):
        raise ValueError("no user turn before the last answer, so there is no prompt")
    return [Prompt(messages=messages, tools=record.tools, meta=record.meta)], "conversations without their last answer"


def _as_pairs(record: Record) -> tuple[list[Record], str]:
    if not isinstance(record, Ranked):
        return [], ""
    made: list[Record] = []
    scores = record.scores or range(len(record.answers), 0, -1)
    for (a, high), (b, low) in itertools.combinations(zip(record.answers, scores, strict=True), 2):
        if high > low and a.strip() != b.strip():
            made.append(Pair(prompt=record.prompt, chosen=a, rejected=b, meta={**record.meta}))
    return made, "rankings as all their pairs, ties left out"


def _as_rated(record: Record) -> tuple[list[Record], str]:
    if isinstance(record, Pair) and record.soft != 0.5:
        up, down = (record.chosen, record.rejected) if record.soft > 0.5 else (record.rejected, record.chosen)
        two = [Rated(prompt=record.prompt, answer=a, rating=r, meta={**record.meta}) for a, r in ((up, 1), (down, 0))]
        return [*two], "pairs as a thumb up and a thumb down"
    return [], ""


def as_kind(record: Record, kind: str) -> tuple[list[Record], str]:
    """(what the record makes of that kind, what was done or ""). Raises ValueError where it does not hold what the kind needs.

    One record, more (the pairs of a ranking), or none where what was done says so.
    """
    made: list[Record] = []
    done = ""
    if isinstance(record, Chat) and kind in ("pairs", "comparisons", "rated"):
        record = _unsaid(record)
    if kind == "chat" or (kind == "messages" and not isinstance(record, Chat | Prompt)):
        made, done = _as_chat(record)
    elif kind == "comparisons" and isinstance(record, Ranked) and record.scores and len(set(record.scores)) < len(record.scores):
        first = dict(zip(reversed(record.scores), reversed(record.answers), strict=True))
        if len(first) < 2:
            return [], "rankings of equal scores only left out"
        scores = sorted(first, reverse=True)
        made, done = (
            [record.model_copy(update={"answers": [first[s] for s in scores], "scores": scores})],
            "of equal scores the first answer",
        )
    elif isinstance(record, KINDS[kind]):
        return [record], ""
    elif kind in ("prompts", "pairs", "rated"):
        made, done = {"prompts": _as_prompts, "pairs": _as_pairs, "rated": _as_rated}[kind](record)
    if not made and not done:
        needed = " or ".join(_WHAT[k] for k in KINDS[kind])
        raise ValueError(f"holds {_WHAT.get(type(record), 'other records')}, needed are {needed}")
    return made, done


def _problem(record: Record) -> str:
    """What is wrong with a record that its fields allow: an answer that says nothing, or what another says; turns out of order; or ""."""
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
    if isinstance(record, Rated) and not record.answer.strip():
        return "the answer is empty"
    return _disorder(getattr(record, "messages", None) or getattr(record, "prompt", []), getattr(record, "tools", None))


_AFTER = {"system": {""}, "user": {"", "system", "assistant"}, "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}


def _disorder(messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
    """Which message does not belong where it stands, is an empty answer, or calls or answers what is not there; or ""."""
    known = {str(tool.get("function", tool).get("name")) for tool in tools or []}
    before, called = "", set()
    for i, m in enumerate(messages, 1):
        at = f"message {i} ({m.role})"
        if before not in _AFTER[m.role]:
            return f"{at} follows {'an' if before == 'assistant' else 'a'} {before} turn" if before else f"{at} opens the conversation"
        if m.role == "assistant" and not m.content.strip() and not m.tool_calls:
            return f"{at} is empty"
        for call in m.tool_calls or ():
            if known and call.function.name not in known:
                return f"{at} calls {call.function.name!r}, which is not among its tools {', '.join(sorted(known))}"
            called.add(call.id)
        if m.tool_call_id is not None and m.tool_call_id not in called:
            return f"{at} answers the call {m.tool_call_id!r}, which no message makes"
        before = m.role
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
    found = sorted(p for p in path.iterdir() if p.is_file() and (p.with_suffix("") if p.suffix in PACKED else p).suffix in SUFFIXES)
    if not found:
        raise UserError(f"{spec}: the folder holds no {', '.join(SUFFIXES)} file, plain or with {' or '.join(PACKED)}")
    return found


def _places(spec: str) -> list[tuple[str, Iterator[Row]]]:
    """(name, rows) of each file that a spec names, or of the hub's data set."""
    if hub.is_name(spec):
        return [(spec, hub.rows(spec))]
    return [("standard input" if path == STDIN else str(path), rows(path)) for path in _files(spec)]


class _WrongKind(ValueError):
    """A good row that does not hold what is needed."""


class Piece(NamedTuple):
    """Rows of one file, or of the world, that stand one after the other, and what is to be made of them."""

    name: str
    format: str
    kind: str
    rows: list[Row]  # of the world, records


@dataclass
class Made:
    """What a piece gave."""

    name: str
    records: list[Any]
    rows: int
    used: int
    bad: list[tuple[str, str]]  # (file:line, reason)
    wrong: str  # why a good row does not hold what is needed
    done: Counter[str]


def pieces(spec: str, kind: str, report: Report) -> Iterator[Piece]:
    """What a spec names, piece by piece; the formats go into the report. Raises UserError where nothing can be read or recognised."""
    if spec.startswith("world:"):
        records, report.why = _world(spec)
        report.source = "the embedded world"
        if not records:
            raise UserError(f"{spec}: gives no rows; ask for a larger n")
        yield from (Piece(spec, "", kind, part) for part in cut(Row(k, record) for k, record in enumerate(records, 1)))
        return
    for name, found in _places(spec):
        sample = list(itertools.islice(found, SAMPLE))
        if not sample:
            raise UserError(f"{name}: is empty; give a file with data")
        known = recognise(row.value for row in sample if not row.broken)
        if known is None:
            if all(row.broken for row in sample):
                raise UserError(f"{name}:{sample[0].line}: {sample[0].broken}; no row of the file can be used")
            raise UserError(_unrecognised(name, sample))
        module, why = known
        if module.NAME not in report.source.split(" and "):
            several = bool(report.source)
            report.source, report.why = (f"{report.source} and {module.NAME}", f"{report.why}, {why}") if several else (module.NAME, why)
        every: Iterable[Row] = itertools.chain(sample, found)
        gathered = module.gather(every) if hasattr(module, "gather") else every
        yield from (Piece(name, module.NAME, kind, part) for part in cut(gathered))


def make(piece: Piece) -> Made:
    """The records of a piece's rows, and what is wrong with the others."""
    out = Made(piece.name, [], len(piece.rows), 0, [], "", Counter())
    module = formats().get(piece.format)
    for row in piece.rows:
        at = f"{piece.name}:{row.line}"
        try:
            made, done = _make(module, row, piece.kind) if module else _of_the_world(piece.name, row.value, piece.kind)
        except ValueError as error:
            out.bad.append((at, str(error)))
            out.wrong = out.wrong or (str(error) if isinstance(error, _WrongKind) else "")
            continue
        out.done.update(done)
        for record in made:
            record.meta["at"] = at
        out.records += made
    out.used = len(out.records)
    return out


def _of_the_world(spec: str, record: Record, kind: str) -> tuple[list[Record], set[str]]:
    try:
        made, done = as_kind(record, kind)
    except ValueError as error:
        raise UserError(f"{spec}: {error}; give another of its datasets") from None
    return [r.model_copy(update={"meta": {**r.meta}}) for r in made], {done} - {""}


def _make(module: types.ModuleType, row: Row, kind: str) -> tuple[list[Record], set[str]]:
    """(the records of a row, what was done to make them of that kind)."""
    if row.broken:
        raise ValueError(row.broken)
    if not isinstance(row.value, dict):
        raise ValueError(f"a row is an object with named fields, got {_short(row.value)}")
    own = first(row.value)
    if own is None or (own[0] is not module and "temper records" not in (own[0].NAME, module.NAME)):  # its own rows go with any
        what = f"a row of {own[0].NAME} in a file of {module.NAME}" if own else f"not a row of {module.NAME} ({module.HELP})"
        raise ValueError(f"{what}, has {_fields(row.value)}")
    try:
        _check_text(row.value)
        whole = records_of(own[0], row.value, kind)
    except pydantic.ValidationError as error:
        raise ValueError(one_line(error)) from None
    records: list[Record] = []
    done = set() if whole else {f"rows without {kind} left out"}
    for record in whole:
        try:
            made, how = as_kind(record, kind)
        except pydantic.ValidationError as error:
            raise ValueError(one_line(error)) from None
        except ValueError as error:
            raise _WrongKind(str(error)) from None
        records += made
        done |= {how} - {""}
    if problem := next(filter(None, map(_problem, records)), ""):
        raise ValueError(problem)
    return records, done


def records_of(module: types.ModuleType, row: dict[str, Any], kind: str = "any") -> list[Record]:
    """What a row of a format holds, the fields that the format does not read in `meta`. Raises ValueError for what is wrong with it."""
    made = module.flatten(row, kind) if hasattr(module, "flatten") else [module.convert(row)]
    rest = {name: value for name, value in row.items() if name not in module.FIELDS and name != "meta"}
    given = row.get("meta")
    known = {**rest, **(given if isinstance(given, dict) else {})}
    return [r.model_copy(update={"meta": {**known, **r.meta}}) for r in made]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(row: dict) -> str:
    return ", ".join(repr(str(k)) for k in list(row)[:8]) or "no field"


def _unrecognised(name: str, sample: list[Row]) -> str:
    row = next((r for r in sample if isinstance(r.value, dict)), sample[0])
    came = f"a row with {_fields(row.value)}" if isinstance(row.value, dict) else _short(row.value)
    known = "; ".join(f"{m.NAME} ({m.HELP})" for m in formats().values())
    return f"{name}:{row.line}: {came} is of no known format; known are {known}"


M = TypeVar("M", bound=Made)


def settle(found: Iterable[M], report: Report, skip_bad: bool) -> Iterator[M]:
    """What pieces gave, as far as it may be used; rows and conversions go into the report.

    Without skip_bad all rows of a file are still read before the first bad one is a UserError, so that it says how many there are.
    """
    for name, parts in itertools.groupby(found, key=lambda made: made.name):
        bad: list[tuple[str, str]] = []
        wrong, good = "", 0
        for made in parts:
            report.rows += made.rows
            report.conversions.update(made.done)
            bad += made.bad
            wrong, good = wrong or made.wrong, good + made.used
            if skip_bad or not bad:
                report.used += made.used
                yield made
        if wrong and not good:
            raise UserError(f"{name}: {report.source}: {wrong}; give a file that holds them")
        if bad and not (skip_bad and good):
            raise UserError(_refusal(name, bad, bool(good)))
        report.skipped += bad


def stream(spec: str, kind: Kind, report: Report, skip_bad: bool = False) -> Iterator[Record]:
    """What `read` gives, one record after the other: sets larger than memory. The report grows along."""
    for made in settle(map(make, pieces(spec, kind, report)), report, skip_bad):
        yield from made.records


def _refusal(name: str, bad: list[tuple[str, str]], some_good: bool) -> str:
    (at, reason), more = bad[0], bad[1:]
    lines = ", ".join(at.removeprefix(f"{name}:") for at, _ in more[:10])
    also = f" (and {len(more)} more bad rows, lines {lines}{', ...' if len(more) > 10 else ''})" if more else ""
    what = "correct the row (--skip-bad leaves such rows out and lists them)" if some_good else "no row of the file can be used"
    return f"{at}: {reason}{also}; {what}"


def read(spec: str, kind: Kind, skip_bad: bool = False) -> Records:
    """Records of one kind from a file, a folder of files, standard input (`-`), a data set of the hub (`owner/name?split=train`) or the
    embedded world (`world:NAME?n=1000&seed=0&split=train`).

    A pair serves as a conversation (its chosen answer) or a prompt, a conversation as a prompt. A row that cannot be used is a
    UserError `file:line: ...`; with skip_bad it is left out and listed in the report. Every record's meta has `at`: file:line or spec:row.
    """
    report = Report(spec)
    records = list(stream(spec, kind, report, skip_bad))
    if not records:
        raise UserError(f"{spec}: {report.summary()}; nothing is left to use")
    return Records(records, report)
