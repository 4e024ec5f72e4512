"""Conversations as a list of messages, each with role and content, as OpenAI's interface has them: with system, tools, many turns."""

import contextlib
import json
from typing import Any

from temper.records import Chat, Function, Message, Prompt, ToolCall

NAME = "messages"
HELP = '{"messages": [{"role": ..., "content": ...}, ...]}, with "tools" where it has some'
FIELDS = {"messages", "tools"}
KIND = "messages"
LAST = True


def recognise(row: dict[str, Any]) -> str:
    said = row.get("messages")
    return "rows with 'messages'" if isinstance(said, list) and not row.keys() & {"chosen", "rejected"} else ""


def _content(value: Any, at: str) -> str:
    """The text of a content, which may come in parts of text."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        if strange := next((str(part.get("type")) for part in value if not isinstance(part.get("text"), str)), ""):
            raise ValueError(f"{at} holds a part of type {strange!r}; only text is read")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{at} has no text in 'content'")
    return value


def tool_call(value: Any, at: str) -> ToolCall:
    """A call from {function: {name, arguments}} or {name, arguments}; arguments as an object or as its JSON."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{at} calls a tool without a name: {str(value)[:60]!r}")
    if value.get("type", "function") != "function":
        raise ValueError(f"{at} calls a tool of type {value['type']!r}; known is 'function'")
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"{at} calls {function['name']!r} with arguments that are not a JSON object: {str(function['arguments'])[:60]!r}")
    call_id = value.get("id")
    return ToolCall(id=None if call_id is None else str(call_id), function=Function(name=function["name"], arguments=arguments))


def turns(value: Any, name: str) -> list[Message]:
    """Messages from a list of {role, content}. Raises ValueError naming the message that is not one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r} should be a list of messages, got {str(value)[:60]!r}")
    out = []
    for i, turn in enumerate(value, 1):
        at = f"{name}: message {i}"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{at} has no 'role'")
        calls = turn.get("tool_calls") or None
        if calls is not None and (turn["role"] != "assistant" or not isinstance(calls, list)):
            raise ValueError(f"{at} has 'tool_calls', which should be a list in a turn of the assistant's")
        content = _content("" if calls and turn.get("content") is None else turn.get("content"), at)
        role: Any = {"developer": "system"}.get(turn["role"], turn["role"])
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"{at} has role {turn['role']!r}; known are system, user, assistant, tool")
        named = {key: str(turn[key]) for key in ("name", "tool_call_id") if turn.get(key) is not None}
        out.append(Message(role=role, content=content, tool_calls=tuple(tool_call(c, at) for c in calls) if calls else None, **named))
    return out


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools: a list of schemas, or its JSON."""
    value = row.get("tools")
    with contextlib.suppress(ValueError):
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError(f"field 'tools' should be a list of schemas, got {str(value)[:60]!r}")
    return value or None


def check_shared(chosen: list[Message], rejected: list[Message], unit: str, before: int = 0) -> None:
    """Raises ValueError naming the first turn before the answers at which two conversations differ."""
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        raise ValueError(f"the prompts of chosen and rejected differ from {unit} {before + at + 1} on, so the answers cannot be compared")


def conversation(messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Chat | Prompt:
    """A conversation; a prompt where no turn is the assistant's."""
    return (Chat if any(m.role == "assistant" for m in messages) else Prompt)(messages=messages, tools=tools)


def convert(row: dict[str, Any]) -> Chat | Prompt:
    return conversation(turns(row["messages"], "messages"), tools_of(row))


def dumped(messages: list[Message]) -> list[dict[str, Any]]:
    return [m.model_dump(mode="json") for m in messages]


def write(record: Any, meta: dict[str, Any]) -> dict[str, Any]:
    row = {"messages": dumped(record.messages)}
    return {**row, "tools": record.tools} if record.tools else row


def only_words(messages: list[Message], tools: Any, name: str) -> None:
    """Raises ValueError where a format that knows only words would lose tools or calls."""
    if tools or any(m.tool_calls or m.name or m.tool_call_id or m.role == "tool" for m in messages):
        raise ValueError(f"{name} holds no tools and calls")


def one_question(record: Any, name: str) -> tuple[str, str, str]:
    """(system, question, answer) of a conversation that is no more. Raises ValueError where it is more."""
    only_words(record.messages, record.tools, name)
    system = record.messages[0].content if record.messages[0].role == "system" else ""
    rest = record.messages[1:] if record.messages[0].role == "system" else record.messages
    if [m.role for m in rest] != ["user", "assistant"]:
        raise ValueError(f"{name} holds one question and its answer, this conversation has {len(rest)} turns")
    return system, rest[0].content, rest[1].content
