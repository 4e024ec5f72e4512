"""Conversations as a list of messages, each with role and content."""

from typing import Any

from temper.records import Chat, Message, Prompt

NAME = "messages"
HELP = '{"messages": [{"role": ..., "content": ...}, ...]}'


def recognise(row: dict[str, Any]) -> str:
    return "rows with 'messages'" if isinstance(row.get("messages"), list) and not row.keys() & {"chosen", "rejected", "label"} else ""


def turns(value: Any, name: str) -> list[Message]:
    """Messages from a list of {role, content}. Raises ValueError naming the message that is not one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r} should be a list of messages, got {str(value)[:60]!r}")
    out = []
    for i, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ValueError(f"{name}: message {i} has no 'role'")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"{name}: message {i} has no text in 'content'")
        if turn.get("tool_calls"):
            raise ValueError(f"{name}: message {i} calls tools, which is not supported")
        role: Any = {"developer": "system"}.get(turn["role"], turn["role"])
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"{name}: message {i} has role {turn['role']!r}; known are system, user, assistant, tool")
        out.append(Message(role=role, content=turn["content"]))
    return out


def check_shared(chosen: list[Message], rejected: list[Message], unit: str, before: int = 0) -> None:
    """Raises ValueError naming the first turn before the answers at which two conversations differ."""
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
        raise ValueError(f"the prompts of chosen and rejected differ from {unit} {before + at + 1} on, so the answers cannot be compared")


def convert(row: dict[str, Any]) -> Chat | Prompt:
    messages = turns(row["messages"], "messages")
    if any(m.role == "assistant" for m in messages):
        return Chat(messages=messages)
    return Prompt(messages=messages)
