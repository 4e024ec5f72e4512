"""Alpaca: an instruction, an optional input, the output."""

from typing import Any

from temper.data.sources.messages import only_words
from temper.records import Chat, Message

NAME = "Alpaca"
HELP = '{"instruction": ..., "input": ..., "output": ...}'
FIELDS = {"instruction", "input", "output", "system", "history"}
KIND = "chat"


def recognise(row: dict[str, Any]) -> str:
    return "rows with 'instruction' and 'output'" if "instruction" in row and "output" in row else ""


def question_of(row: dict[str, Any]) -> list[Message]:
    """System turn, history and question; the input, where there is one, follows the instruction after an empty line."""
    row = {**row, **{name: row.get(name) or "" for name in ("instruction", "input", "system")}}
    for name in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"field {name!r} should be text, got {str(row[name])[:60]!r}")
    if not row["instruction"].strip() and not row["input"].strip():
        raise ValueError("the instruction is empty")
    messages = [Message(role="system", content=row["system"])] if row["system"].strip() else []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"field 'history' should be a list of [question, answer], has {str(turn)[:60]!r}")
        messages += [Message(role="user", content=turn[0]), Message(role="assistant", content=turn[1])]
    question = "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
    return [*messages, Message(role="user", content=question)]


def convert(row: dict[str, Any]) -> Chat:
    """The input stays in meta too, so that the row can be written again."""
    meta = {"input": row["input"]} if (row.get("input") or "").strip() and (row.get("instruction") or "").strip() else {}
    return Chat(messages=[*question_of(row), Message(role="assistant", content=row["output"])], meta=meta)


def write(record: Chat, meta: dict[str, Any]) -> dict[str, Any]:
    """Earlier turns as `history`; the end of the question that meta calls its input as `input`."""
    messages = list(record.messages)
    only_words(messages, record.tools, NAME)
    system = messages.pop(0).content if messages[0].role == "system" else ""
    if [m.role for m in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise ValueError(f"{NAME} holds questions and their answers, this conversation ends with a question")
    said = [m.content for m in messages]
    question, more = said[-2], ""
    if isinstance(meta.get("input"), str) and question.endswith("\n\n" + meta["input"]):
        more = meta.pop("input")
        question = question.removesuffix("\n\n" + more)
    row: dict[str, Any] = {"instruction": question, "input": more, "output": said[-1]}
    if system:
        row["system"] = system
    return {**row, "history": [list(turn) for turn in zip(said[:-2:2], said[1:-2:2], strict=True)]} if len(said) > 2 else row
