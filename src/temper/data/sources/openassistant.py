"""OpenAssistant message trees (arXiv:2304.07327), as trees or as a list of their messages; replies are ranked, 0 the best."""

from collections.abc import Iterable, Iterator
from typing import Any

from temper.data.files import Row
from temper.records import Chat, Message, Ranked, Record, Role

NAME = "OpenAssistant trees"
HELP = '{"message_tree_id": ..., "prompt": {"text": ..., "role": "prompter", "replies": [...]}}, or a row for each message'
FIELDS = {"prompt"}
ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}


def recognise(row: dict[str, Any]) -> str:
    root = row.get("prompt")
    if isinstance(root, dict) and "replies" in root and "message_id" in root:
        return "trees of messages with 'replies'"
    return "messages with 'message_id' and 'message_tree_id'" if {"message_id", "message_tree_id", "role", "text"} <= row.keys() else ""


def gather(rows: Iterable[Row]) -> Iterator[Row]:
    """Trees as they are; a list of messages as trees, each at the line of its first message."""
    nodes: dict[str, dict[str, Any]] = {}
    lines: dict[str, int | str] = {}
    roots: list[str] = []
    for row in rows:
        if not isinstance(row.value, dict) or "message_tree_id" not in row.value or "prompt" in row.value or "message_id" not in row.value:
            yield row
            continue
        node = {**row.value, "replies": []}
        nodes[node["message_id"]], lines[node["message_id"]] = node, row.line
    for name, node in nodes.items():
        if (parent := node.get("parent_id")) is None:
            roots.append(name)
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            yield Row(lines[name], None, f"message {name} replies to {parent}, which is not in the file")
    for name in roots:
        yield Row(lines[name], {"message_tree_id": nodes[name]["message_tree_id"], "prompt": nodes[name]})


def _replies(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The replies that were kept, the best ranked first, those without a rank last."""
    kept = [r for r in node.get("replies") or [] if not r.get("deleted") and r.get("review_result") is not False]
    return sorted(kept, key=lambda r: (r.get("rank") is None, r.get("rank") or 0))


def _message(node: dict[str, Any]) -> Message:
    if node.get("role") not in ROLES or not isinstance(node.get("text"), str):
        raise ValueError(f"message {node.get('message_id')} has role {node.get('role')!r}; known are prompter and assistant, with a text")
    return Message(role=ROLES[node["role"]], content=node["text"])


def _walk(node: dict[str, Any], before: list[Message]) -> Iterator[tuple[list[Message], list[dict[str, Any]]]]:
    """(path to a message, its replies) of the message and all below it."""
    path, replies = [*before, _message(node)], _replies(node)
    yield path, replies
    for reply in replies:
        yield from _walk(reply, path)


def _threads(node: dict[str, Any], before: list[Message]) -> Iterator[list[Message]]:
    """Conversations that take the best answer to each question; they part where the user goes on in several ways."""
    path, replies = [*before, _message(node)], _replies(node)
    going_on = [list(_threads(reply, path)) for reply in (replies if path[-1].role == "assistant" else replies[:1])]
    if any(going_on):
        yield from (thread for threads in going_on for thread in threads)
    elif path[-1].role == "assistant":
        yield path


def flatten(row: dict[str, Any], kind: str) -> list[Record]:
    """Conversations by the best answers; for comparisons, every set of two and more ranked answers as a ranking."""
    root = row["prompt"]
    meta = {"lang": root["lang"]} if "lang" in root else {}
    if kind not in ("pairs", "comparisons"):
        return [Chat(messages=thread, meta={**meta}) for thread in _threads(root, [])]
    made: list[Record] = []
    for path, replies in _walk(root, []):
        ranked = [_message(r).content for r in replies if r.get("rank") is not None]
        if path[-1].role == "user" and len(ranked) > 1:
            made.append(Ranked(prompt=path, answers=ranked, meta={**meta}))
    return made
