"""Thumbs: an answer with a label, up or down, as KTO takes them (arXiv:2402.01306)."""

from typing import Any

from temper.data.sources import sharegpt
from temper.data.sources.messages import dumped, turns
from temper.data.sources.prompt_completion import ANSWERS, answer_of, prompt_of
from temper.records import Rated

NAME = "thumbs"
HELP = '{"prompt": ..., "completion": ..., "label": true}, or "messages" or "conversations" with a "label"'
LABELS = ("label", "kto_tag")
FIELDS = {"prompt", "system", "messages", "conversations", *ANSWERS, *LABELS}
KIND = "rated"
_UP = {"true", "1", "up", "thumbs_up", "good", "desirable"}
_DOWN = {"false", "0", "-1", "down", "thumbs_down", "bad", "undesirable"}


def _thumb(row: dict[str, Any]) -> float | None:
    value = str(next((row[name] for name in LABELS if name in row), "")).lower()
    return 1.0 if value in _UP else 0.0 if value in _DOWN else None


def recognise(row: dict[str, Any]) -> str:
    said = next((name for name in ("messages", "conversations", *ANSWERS) if name in row), "")
    if _thumb(row) is None or not said or (said in ANSWERS and "prompt" not in row):
        return ""
    return f"rows with {said!r} and a {next(name for name in LABELS if name in row)!r} of two values"


def convert(row: dict[str, Any]) -> Rated:
    if isinstance(row.get("messages"), list):
        messages = turns(row["messages"], "messages")
    elif isinstance(row.get("conversations"), list):
        messages = sharegpt.turns(row["conversations"], "conversations")
    else:
        name = next(name for name in ANSWERS if name in row)
        messages = [*prompt_of(row), *answer_of(row[name], name)]
    if messages[-1].role != "assistant" or messages[-1].tool_calls:
        raise ValueError("the last turn is not an answer in words, so there is nothing that the thumb could rate")
    rating = _thumb(row)
    assert rating is not None
    return Rated(prompt=messages[:-1], answer=messages[-1].content, rating=rating)


def write(record: Rated, meta: dict[str, Any]) -> dict[str, Any]:
    if record.rating not in (0, 1):
        raise ValueError(f"{NAME} go up or down, this rating is {record.rating}")
    completion = [{"role": "assistant", "content": record.answer}]
    return {"prompt": dumped(record.prompt), "completion": completion, "label": bool(record.rating)}
