"""Alpaca: an instruction, an optional input, the output."""

from typing import Any

from temper.records import Chat, Message

NAME = "Alpaca"
HELP = '{"instruction": ..., "input": ..., "output": ...}'


def recognise(row: dict[str, Any]) -> str:
    return "rows with 'instruction' and 'output'" if "instruction" in row and "output" in row else ""


def convert(row: dict[str, Any]) -> Chat:
    """The input, where there is one, follows the instruction after an empty line."""
    for name in ("instruction", "input", "output", "system"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"field {name!r} should be text, got {str(row[name])[:60]!r}")
    if not row["instruction"].strip() and not row.get("input", "").strip():
        raise ValueError("the instruction is empty")
    question = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part.strip())
    system = [Message(role="system", content=row["system"])] if row.get("system", "").strip() else []
    return Chat(messages=[*system, Message(role="user", content=question), Message(role="assistant", content=row["output"])])
