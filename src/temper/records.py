"""What a line of data is: Text, Chat, Prompt, Pair, Ranked, Rated, Steps, Judgement; JSONL in and out (floor 0)."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import pydantic

from temper.config import UserError

Role = Literal["system", "user", "assistant", "tool"]


def _unset(default: Any = None) -> Any:
    """A field that is not written where it is None."""
    return pydantic.Field(default, exclude_if=lambda value: value is None)


class Function(pydantic.BaseModel):
    """Which function a tool call names, and with what arguments."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = pydantic.Field(min_length=1)
    arguments: dict[str, Any] = {}


class ToolCall(pydantic.BaseModel):
    """A call of a tool, as chat templates take it: arguments as an object."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    type: Literal["function"] = "function"
    id: str | None = _unset()
    function: Function


class Message(pydantic.BaseModel):
    """One turn, as chat templates take it. name, tool_call_id: of a tool's turn, its function and the call that it answers."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] | None = _unset()
    name: str | None = _unset()
    tool_call_id: str | None = _unset()


class Record(pydantic.BaseModel):
    """Base of all records: frozen, unknown fields refused, numbers finite; what else is known of a row stands in `meta`."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    meta: dict[str, Any] = {}


def _ends_with_question(messages: list[Message]) -> list[Message]:
    if not messages:
        raise ValueError("a prompt needs at least one message")
    if messages[-1].role not in ("user", "tool"):
        raise ValueError(f"a prompt ends with a user turn, this one with {messages[-1].role!r}")
    return messages


class Text(Record):
    """A document to continue."""

    text: str


class Chat(Record):
    """A conversation; its assistant turns are what can be learned. tools: the JSON schemas of the functions that it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = _unset()

    @pydantic.field_validator("messages")
    @classmethod
    def _answered(cls, messages: list[Message]) -> list[Message]:
        if not any(m.role == "assistant" for m in messages):
            raise ValueError("a conversation needs an assistant turn")
        return messages


class Prompt(Record):
    """Messages that wait for an answer: the last is the user's (or a tool's)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = _unset()

    _check = pydantic.field_validator("messages")(_ends_with_question)


class Pair(Record):
    """Two answers to one prompt. soft: P(chosen is better); margin: how much better, where a rater said so."""

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None = None
    soft: float = pydantic.Field(default=1.0, ge=0, le=1)

    _check = pydantic.field_validator("prompt")(_ends_with_question)


class Ranked(Record):
    """Two or more answers to one prompt, the best first. scores: of each answer, where a rater gave some; equal scores are a tie."""

    prompt: list[Message]
    answers: list[str] = pydantic.Field(min_length=2)
    scores: list[float] | None = _unset()

    _check = pydantic.field_validator("prompt")(_ends_with_question)

    @pydantic.model_validator(mode="after")
    def _descending(self) -> Ranked:
        if self.scores is not None and (len(self.scores) != len(self.answers) or self.scores != sorted(self.scores, reverse=True)):
            raise ValueError(f"{len(self.answers)} answers, the best first, need as many falling scores, got {self.scores}")
        return self


class Rated(Record):
    """One answer with a rating (thumbs: 1 up, 0 down)."""

    prompt: list[Message]
    answer: str
    rating: float

    _check = pydantic.field_validator("prompt")(_ends_with_question)


class Steps(Record):
    """A solution in steps, each with a label (1 right, 0 wrong, None unknown)."""

    prompt: list[Message]
    steps: list[str]
    labels: list[float | None]

    _check = pydantic.field_validator("prompt")(_ends_with_question)

    @pydantic.model_validator(mode="after")
    def _aligned(self) -> Steps:
        if len(self.steps) != len(self.labels):
            raise ValueError(f"{len(self.steps)} steps but {len(self.labels)} labels")
        return self


class Judgement(Record):
    """A rater's verdict on two answers."""

    prompt: list[Message]
    a: str
    b: str
    verdict: Literal["a", "b", "tie"]
    rater: str

    _check = pydantic.field_validator("prompt")(_ends_with_question)


R = TypeVar("R", bound=Record)


def one_line(error: pydantic.ValidationError) -> str:
    """All that a ValidationError says, in one line: `messages.0.role: got 'bot', input should be ...`."""
    parts = []
    for e in error.errors(include_url=False):
        loc = ".".join(str(part) for part in e["loc"])
        message = e["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if e["type"] == "missing":
            parts.append(f"field {loc!r} is missing")
        elif e["type"] == "extra_forbidden":
            parts.append(f"unknown field {loc!r}")
        elif e["type"] == "value_error":
            parts.append(f"{loc}: {message}" if loc else message)
        else:
            came = repr(e["input"])
            parts.append(f"{loc}: got {came if len(came) <= 60 else came[:57] + '...'}, {message}")
    return "; ".join(parts)


def make(cls: type[R], values: Any, where: str) -> R:
    """`cls` from a dict; UserError `where: ...` when it does not fit."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: not a {cls.__name__}: {one_line(error)}") from None


def read_jsonl(path: str | Path, cls: type[R]) -> list[R]:
    """All records of a file that `write_jsonl` wrote. Lines end with LF only. Raises UserError `file:line: ...`."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    out = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: byte {error.start} of the line is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON: {error}") from None
        out.append(make(cls, values, f"{path}:{number}"))
    return out


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the name only when all is written: aside, fsynced, renamed.

    Raises UserError when the disk refuses; an older file of the name is then untouched, as it is after any other error.
    """
    path = Path(path)
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(aside, path)
        aside = None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)


def line(row: Any) -> bytes:
    """A row as it stands in a JSONL file: UTF-8, LF, sorted keys."""
    return (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_jsonl(path: str | Path, records: Iterable[Record]) -> None:
    """One record per line, atomically (see `atomic`)."""
    with atomic(path) as file:
        file.writelines(line(record.model_dump(mode="json")) for record in records)
