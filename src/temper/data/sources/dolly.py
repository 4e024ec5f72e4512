"""Dolly: an instruction, its context where it has one, the response, a category."""

from typing import Any

from temper.data.sources import alpaca
from temper.records import Chat

NAME = "Dolly"
HELP = '{"instruction": ..., "context": ..., "response": ..., "category": ...}'
FIELDS = {"instruction", "context", "response"}
KIND = "chat"


def recognise(row: dict[str, Any]) -> str:
    return "rows with 'instruction' and 'response'" if {"instruction", "response"} <= row.keys() else ""


def convert(row: dict[str, Any]) -> Chat:
    """The context follows the instruction after an empty line, and stays in meta so that the row can be written again."""
    if not isinstance(row["response"], str):
        raise ValueError(f"field 'response' should be text, got {str(row['response'])[:60]!r}")
    chat = alpaca.convert({"instruction": row["instruction"], "input": row.get("context"), "output": row["response"]})
    return chat.model_copy(update={"meta": {"context": row["context"]} if chat.meta else {}})


def write(record: Chat, meta: dict[str, Any]) -> dict[str, Any]:
    if "context" in meta:
        meta["input"] = meta.pop("context")
    row = alpaca.write(record, meta)
    if row.keys() & {"system", "history"}:
        raise ValueError(f"{NAME} holds one question and its answer, and no system turn")
    if "input" in meta:
        meta["context"] = meta.pop("input")
    category = {"category": meta.pop("category")} if "category" in meta else {}
    return {"instruction": row["instruction"], "context": row["input"], "response": row["output"], **category}
