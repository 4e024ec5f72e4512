"""Tables of votes and scores, which name systems and hold no text: recognised, so that it can be said."""

from typing import Any

from temper.records import Record

NAME = "votes"
HELP = "a table with left, right, winner, or scores computed from one; no text to train on"
FIELDS: set[str] = set()


def recognise(row: dict[str, Any]) -> str:
    return next(
        (f"a table with {', '.join(f)}" for f in (("left", "right", "winner"), ("algorithm", "item", "score")) if {*f} <= row.keys()), ""
    )


def convert(row: dict[str, Any]) -> Record:
    raise ValueError("a vote or score names systems and holds no text; give a file of conversations, pairs or prompts")
