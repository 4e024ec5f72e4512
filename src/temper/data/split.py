"""A held-out share of the records, chosen by what they say. Floor 2."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from temper.records import Chat, Record, Text

R = TypeVar("R", bound=Record)


def opening(record: Record) -> str:
    """What a record is grouped by: a document's text; a conversation's first user turn, without surrounding blanks.

    The first turn and not the whole prompt: files of dialogues hold the same conversation at several lengths.
    """
    if isinstance(record, Text):
        return record.text
    messages = record.messages if isinstance(record, Chat) else getattr(record, "messages", None) or getattr(record, "prompt", [])
    return next((m.content.strip() for m in messages if m.role == "user"), messages[0].content.strip() if messages else "")


def split(records: Sequence[R], share: float | int, seed: int = 0) -> tuple[list[R], list[R]]:
    """(kept, held out), both in the order of `records`. share: a part in [0, 1) as a float, or a number of records as an int.

    Records with the same opening stay together, so that no prompt stands in both. Groups are ranked by a hash of (seed,
    opening): the choice depends on what the records say and hardly changes when rows are added. At least one group is kept.
    """
    wanted = share if isinstance(share, int) else round(share * len(records))
    if share < 0 or (isinstance(share, float) and share >= 1):
        raise ValueError(f"share {share}: a part in [0, 1) or a number of records")
    if isinstance(share, float) and share > 0:
        wanted = max(1, wanted)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        groups[opening(record)].append(i)

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{seed}\x00{key}".encode("utf-8", "surrogatepass")).digest()

    out: set[int] = set()
    for key in sorted(groups, key=rank)[: len(groups) - 1]:
        if len(out) + len(groups[key]) <= wanted:
            out.update(groups[key])
        if len(out) == wanted:
            break
    return [r for i, r in enumerate(records) if i not in out], [r for i, r in enumerate(records) if i in out]
