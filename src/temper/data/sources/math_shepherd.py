"""Math-Shepherd: a question and its solution in one text, each step ended by a sign, + or - in the label (arXiv:2312.08935)."""

from typing import Any

from temper.records import Message, Steps

NAME = "Math-Shepherd"
HELP = '{"input": "... Step 1: ... ки", "label": "... Step 1: ... +"}'
FIELDS = {"input", "label"}
SIGN = "ки"


def recognise(row: dict[str, Any]) -> str:
    text, label = row.get("input"), row.get("label")
    return f"an 'input' with steps that end with {SIGN!r}" if isinstance(text, str) and isinstance(label, str) and SIGN in text else ""


def convert(row: dict[str, Any]) -> Steps:
    pieces = row["input"].split(SIGN)
    labels: list[float | None] = []
    at = 0
    for i, piece in enumerate(pieces[:-1], 1):
        at += len(piece) + 1
        if row["label"][at - 1 - len(piece) : at - 1] != piece or row["label"][at - 1 : at] not in ("+", "-"):
            raise ValueError(f"step {i} of the label is not the input's step with + or - in the place of {SIGN!r}")
        labels.append(1.0 if row["label"][at - 1] == "+" else 0.0)
    question, mark, begun = pieces[0].partition("Step 1:")
    if not mark or not question.strip():
        raise ValueError("the input has no question before 'Step 1:'")
    steps = [text.strip() for text in (mark + begun, *pieces[1:-1])]
    return Steps(prompt=[Message(role="user", content=question.strip())], steps=steps, labels=labels)
