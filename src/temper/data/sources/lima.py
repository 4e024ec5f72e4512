"""LIMA: a conversation as a list of texts, the user's and the assistant's in turn, with its source."""

from typing import Any

from temper.data.sources.messages import conversation, only_words
from temper.records import Chat, Message, Prompt, Role

NAME = "LIMA"
HELP = '{"conversations": ["question", "answer", ...], "source": ...}'
FIELDS = {"conversations"}
KIND = "messages"
TURNS: tuple[Role, Role] = ("user", "assistant")


def recognise(row: dict[str, Any]) -> str:
    said = row.get("conversations")
    return "'conversations' are lists of texts" if isinstance(said, list) and said and isinstance(said[0], str) else ""


def convert(row: dict[str, Any]) -> Chat | Prompt:
    if strange := next((i for i, text in enumerate(row["conversations"], 1) if not isinstance(text, str)), 0):
        raise ValueError(f"conversations: turn {strange} is no text")
    return conversation([Message(role=TURNS[i % 2], content=text) for i, text in enumerate(row["conversations"])])


def write(record: Any, meta: dict[str, Any]) -> dict[str, Any]:
    only_words(record.messages, record.tools, NAME)
    if any(m.role != TURNS[i % 2] for i, m in enumerate(record.messages)):
        raise ValueError(f"{NAME} holds user and assistant in turn, from the user on, and no system turn")
    return {"conversations": [m.content for m in record.messages], **({"source": meta.pop("source")} if "source" in meta else {})}
