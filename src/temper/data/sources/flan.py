"""FLAN: a task's template filled in, and what should come out."""

from typing import Any

from temper.data.sources.messages import one_question
from temper.records import Chat, Message

NAME = "FLAN"
HELP = '{"inputs": ..., "targets": ...}'
FIELDS = {"inputs", "targets"}
KIND = "chat"


def recognise(row: dict[str, Any]) -> str:
    return "rows with 'inputs' and 'targets'" if row.keys() >= FIELDS else ""


def convert(row: dict[str, Any]) -> Chat:
    for name in ("inputs", "targets"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"field {name!r} should be text, got {str(row[name])[:60]!r}")
    return Chat(messages=[Message(role="user", content=row["inputs"]), Message(role="assistant", content=row["targets"])])


def write(record: Chat, meta: dict[str, Any]) -> dict[str, Any]:
    system, question, answer = one_question(record, NAME)
    if system:
        raise ValueError(f"{NAME} holds no system turn")
    return {"inputs": question, "targets": answer}
