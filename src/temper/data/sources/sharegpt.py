"""ShareGPT: conversations of turns {from, value}, whose roles go by many names; function calls as turns of their own."""

import json
from typing import Any

from temper.data.sources.messages import conversation, tool_call, tools_of
from temper.records import Chat, Message, Prompt

NAME = "ShareGPT"
HELP = '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}'
FIELDS = {"conversations", "conversation", "items", "messages", "system", "tools"}
KIND = "messages"
ROLES: dict[str, str] = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("human", "user", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "claude", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_FROM = ("from", "role", "user", "speaker")  # what names the role, in this order of trial
_VALUE = ("value", "content", "text")


def said(row: dict[str, Any]) -> Any:
    """The list of turns, under whichever name it stands; None where there is none."""
    return next((row[name] for name in ("conversations", "conversation", "items") if isinstance(row.get(name), list)), None)


def recognise(row: dict[str, Any]) -> str:
    talk = said(row)
    if not talk and isinstance(row.get("messages"), list) and row["messages"] and isinstance(row["messages"][0], dict):
        talk = row["messages"] if {"from", "value"} <= row["messages"][0].keys() else None
    if not talk or not isinstance(talk[0], dict) or row.keys() & {"chosen", "rejected"}:
        return ""
    names = [next((n for n in options if n in talk[0]), "") for options in (_FROM, _VALUE)]
    return f"conversations of turns with {names[0]!r} and {names[1]!r}" if all(names) else ""


def turns(value: Any, name: str) -> list[Message]:
    """Messages from turns {from, value}. Raises ValueError naming the turn that is not one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r} should be a list of turns, got {str(value)[:60]!r}")
    out = []
    for i, turn in enumerate(value, 1):
        at = f"{name}: message {i}"
        who = next((turn[n] for n in _FROM if isinstance(turn.get(n), str)), None) if isinstance(turn, dict) else None
        if who is None:
            raise ValueError(f"{at} has no 'from'")
        text = next((turn[n] for n in _VALUE if n in turn), None)
        if not isinstance(text, str):
            raise ValueError(f"{at} has no text in 'value'")
        role: Any = ROLES.get(who.lower().replace("-", "_"))
        if role is None:
            raise ValueError(f"{at} has role {who!r}; known are {', '.join(ROLES)}")
        if role == "call":
            try:
                calls = json.loads(text)
            except ValueError:
                raise ValueError(f"{at} calls a tool, and not in JSON: {text[:60]!r}") from None
            calls = tuple(tool_call(call, at) for call in (calls if isinstance(calls, list) else [calls]))
            out.append(Message(role="assistant", content="", tool_calls=calls))
        else:
            out.append(Message(role=role, content=text))
    return out


def convert(row: dict[str, Any]) -> Chat | Prompt:
    talk = said(row)
    messages = turns(row["messages"] if talk is None else talk, "conversations")
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0].role != "system":
        messages = [Message(role="system", content=row["system"]), *messages]
    return conversation(messages, tools_of(row))


def written(messages: list[Message]) -> list[dict[str, str]]:
    """Turns {from, value}. Raises ValueError for what they cannot hold."""
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    out = []
    for i, m in enumerate(messages, 1):
        if m.name or m.tool_call_id or (m.tool_calls and (m.content or any(call.id for call in m.tool_calls))):
            raise ValueError(f"{NAME} holds no ids of calls and no words beside them, message {i} has some")
        if m.tool_calls:
            calls = [call.function.model_dump(mode="json") for call in m.tool_calls]
            out.append({"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)})
        else:
            out.append({"from": names[m.role], "value": m.content})
    return out


def write(record: Any, meta: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"conversations": written(record.messages)}
    return {**row, "tools": json.dumps(record.tools, ensure_ascii=False)} if record.tools else row
