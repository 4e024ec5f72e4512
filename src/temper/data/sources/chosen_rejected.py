"""Pairs of answers: a prompt with two strings, a prompt with two last turns, or two conversations with a shared prefix."""

from typing import Any

from temper.data.sources import hh
from temper.data.sources.messages import check_shared, turns
from temper.data.sources.prompt_completion import prompt_of
from temper.records import Message, Pair

NAME = "chosen/rejected"
HELP = '{"prompt": ..., "chosen": ..., "rejected": ...}, or two message lists with a shared start'


def recognise(row: dict[str, Any]) -> str:
    if not {"chosen", "rejected"} <= row.keys() or hh.recognise(row) or row.keys() & {"conversations", "messages"}:
        return ""
    if "prompt" in row:
        return "rows with 'prompt', 'chosen' and 'rejected'"
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        return "'chosen' and 'rejected' are lists of messages"
    return ""


def _answer(value: Any, name: str) -> list[Message]:
    """An answer as the messages that it adds to the prompt; the last is the assistant's."""
    if isinstance(value, str):
        return [Message(role="assistant", content=value)]
    messages = turns([value] if isinstance(value, dict) else value, name)
    if messages[-1].role != "assistant":
        raise ValueError(f"{name} ends with a {messages[-1].role} turn, so it holds no answer")
    return messages


def convert(row: dict[str, Any]) -> Pair:
    chosen, rejected = _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")
    prompt = prompt_of(row) if "prompt" in row else []
    if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:  # whole conversations that repeat the prompt
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    check_shared(chosen, rejected, "message", before=len(prompt))
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise ValueError(f"field 'margin' should be a number, got {str(margin)[:60]!r}")
    return Pair(prompt=[*prompt, *chosen[:-1]], chosen=chosen[-1].content, rejected=rejected[-1].content, margin=margin)
