"""A prompt with its completion; a prompt alone serves where answers are sampled."""

from typing import Any

from temper.data.sources.messages import dumped, tools_of, turns
from temper.records import Chat, Message, Prompt

NAME = "prompt/completion"
HELP = '{"prompt": ..., "completion": ...}, or {"prompt": ...} alone'
ANSWERS = ("completion", "response")
FIELDS = {"prompt", "system", "tools", *ANSWERS}
KIND = "messages"
LAST = True


def recognise(row: dict[str, Any]) -> str:
    if "prompt" not in row or row.keys() & {"chosen", "rejected", "messages"}:
        return ""
    answer = next((name for name in ANSWERS if name in row), None)
    return f"rows with 'prompt' and {answer!r}" if answer else "rows with 'prompt' alone"


def prompt_of(row: dict[str, Any], name: str = "prompt") -> list[Message]:
    """The prompt's messages, from a string or a list of messages, with a `system` field in front where there is one."""
    value = row[name]
    if not isinstance(value, str | list):
        raise ValueError(f"field {name!r} should be text or messages, got {str(value)[:60]!r}")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"the {name} is empty")
    messages = [Message(role="user", content=value)] if isinstance(value, str) else turns(value, name)
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0].role != "system":
        messages = [Message(role="system", content=row["system"]), *messages]
    return messages


def answer_of(value: Any, name: str) -> list[Message]:
    """An answer as the messages that it adds to the prompt; the last is the assistant's."""
    if isinstance(value, str):
        return [Message(role="assistant", content=value)]
    if not isinstance(value, list | dict):
        raise ValueError(f"field {name!r} should be text or messages, got {str(value)[:60]!r}")
    messages = turns([value] if isinstance(value, dict) else value, name)
    if messages[-1].role != "assistant":
        raise ValueError(f"{name} ends with a {messages[-1].role} turn, so it holds no answer")
    return messages


def convert(row: dict[str, Any]) -> Chat | Prompt:
    messages = prompt_of(row)
    name = next((name for name in ANSWERS if name in row), None)
    if name is None:
        return Prompt(messages=messages, tools=tools_of(row))
    return Chat(messages=[*messages, *answer_of(row[name], name)], tools=tools_of(row))


def words_or_messages(messages: list[Message], role: str) -> Any:
    """The text where it is one turn of that role's words and no more, else the messages."""
    plain = len(messages) == 1 and messages[0] == Message(role=messages[0].role, content=messages[0].content)
    return messages[0].content if plain and messages[0].role == role else dumped(messages)


def write(record: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """As strings where both sides are one turn, else as messages."""
    tools = {"tools": record.tools} if record.tools else {}
    if not isinstance(record, Chat):
        return {"prompt": words_or_messages(record.messages, "user"), **tools}
    if record.messages[-1].role != "assistant":
        raise ValueError(f"{NAME} ends with an answer, this conversation with a {record.messages[-1].role} turn")
    prompt, answer = words_or_messages(record.messages[:-1], "user"), words_or_messages(record.messages[-1:], "assistant")
    if isinstance(prompt, list) or isinstance(answer, list):
        prompt, answer = dumped(record.messages[:-1]), dumped(record.messages[-1:])
    return {"prompt": prompt, "completion": answer, **tools}
