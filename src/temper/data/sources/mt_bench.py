"""MT-Bench questions: two turns that are asked one after the other (arXiv:2306.05685)."""

from typing import Any

from temper.records import Message, Prompt

NAME = "MT-Bench questions"
HELP = '{"question_id": ..., "category": ..., "turns": [...], "reference": [...]}'
FIELDS = {"turns"}
KIND = "prompts"
OWN = ("question_id", "category", "turns", "reference")


def recognise(row: dict[str, Any]) -> str:
    return "rows with 'question_id' and 'turns'" if "question_id" in row and isinstance(row.get("turns"), list) else ""


def convert(row: dict[str, Any]) -> Prompt:
    """The first turn is the prompt; all of them stand in meta, for the next is asked after the first is answered."""
    if not row["turns"] or not all(isinstance(turn, str) and turn.strip() for turn in row["turns"]):
        raise ValueError("field 'turns' should be a list of questions")
    return Prompt(messages=[Message(role="user", content=row["turns"][0])], meta={"turns": row["turns"]})


def write(record: Prompt, meta: dict[str, Any]) -> dict[str, Any]:
    if len(record.messages) != 1 or meta.get("turns", [record.messages[0].content])[0] != record.messages[0].content:
        raise ValueError(f"{NAME} are the user's turns only")
    if "question_id" not in meta:
        raise ValueError(f"{NAME} have a question_id, this prompt has none in its meta")
    own = {name: meta.pop(name) for name in OWN if name in meta}
    return {"turns": [record.messages[0].content], **own}
