r"""HH dialogues: chosen and rejected are whole conversations in one string, turns marked `\n\nHuman:` and `\n\nAssistant:`."""

import re
from typing import Any

from temper.data.sources.messages import check_shared, only_words
from temper.records import Message, Pair, Role

NAME = "HH dialogues"
HELP = r'{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}'
FIELDS = {"chosen", "rejected"}
KIND = "pairs"
MARK = re.compile(r"\n\n(Human|Assistant):")


def recognise(row: dict[str, Any]) -> str:
    sides = [row.get("chosen"), row.get("rejected")]
    if "prompt" not in row and all(isinstance(s, str) and MARK.match(s) for s in sides):
        return "'chosen' and 'rejected' begin with '\\n\\nHuman:'"
    return ""


def turns(text: str) -> list[Message]:
    """The dialogue's turns, without the blanks around them."""
    parts = MARK.split(text)
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    return [Message(role=roles[name], content=said.strip()) for name, said in zip(parts[1::2], parts[2::2], strict=True)]


def convert(row: dict[str, Any]) -> Pair:
    """The prompt is everything before the last turn and must be the same on both sides."""
    chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
    for side, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if dialogue[-1].role != "assistant":
            raise ValueError(f"the {side} dialogue ends with a Human turn, so it holds no answer")
    check_shared(chosen, rejected, "turn")
    return Pair(prompt=chosen[:-1], chosen=chosen[-1].content, rejected=rejected[-1].content)


def write(record: Pair, meta: dict[str, Any]) -> dict[str, Any]:
    """The dialogue so far, and each answer after it."""
    if strange := next((m.role for m in record.prompt if m.role not in ("user", "assistant")), ""):
        raise ValueError(f"{NAME} hold no {strange} turn")
    only_words(record.prompt, None, NAME)
    names = {"user": "Human", "assistant": "Assistant"}
    before = "".join(f"\n\n{names[m.role]}: {m.content}" for m in record.prompt)
    return {side: f"{before}\n\nAssistant: {answer}" for side, answer in (("chosen", record.chosen), ("rejected", record.rejected))}
