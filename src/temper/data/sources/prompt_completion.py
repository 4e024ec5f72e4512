"""A prompt with its completion; a prompt alone serves where answers are sampled."""

from typing import Any

from temper.data.sources.messages import turns
from temper.records import Chat, Message, Prompt

NAME = "prompt/completion"
HELP = '{"prompt": ..., "completion": ...}, or {"prompt": ...} alone'
ANSWERS = ("completion", "response")


def recognise(row: dict[str, Any]) -> str:
    if "prompt" not in row or row.keys() & {"chosen", "rejected", "label", "messages"}:
        return ""
    answer = next((name for name in ANSWERS if name in row), None)
    return f"rows with 'prompt' and {answer!r}" if answer else "rows with 'prompt' alone"


def prompt_of(row: dict[str, Any]) -> list[Message]:
    """The prompt's messages, from a string or a list of messages, with a `system` field in front where there is one."""
    value = row["prompt"]
    if not isinstance(value, str | list):
        raise ValueError(f"field 'prompt' should be text or messages, got {str(value)[:60]!r}")
    if isinstance(value, str) and not value.strip():
        raise ValueError("the prompt is empty")
    messages = [Message(role="user", content=value)] if isinstance(value, str) else turns(value, "prompt")
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0].role != "system":
        messages = [Message(role="system", content=row["system"]), *messages]
    return messages


def convert(row: dict[str, Any]) -> Chat | Prompt:
    messages = prompt_of(row)
    name = next((name for name in ANSWERS if name in row), None)
    if name is None:
        return Prompt(messages=messages)
    answer = row[name]
    if isinstance(answer, list):
        return Chat(messages=[*messages, *turns(answer, name)])
    if not isinstance(answer, str):
        raise ValueError(f"field {name!r} should be text or messages, got {str(answer)[:60]!r}")
    return Chat(messages=[*messages, Message(role="assistant", content=answer)])
