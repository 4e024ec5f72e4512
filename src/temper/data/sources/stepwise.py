"""Solutions in steps, each with a label: whether it is right."""

from typing import Any

from temper.data.sources.prompt_completion import prompt_of, words_or_messages
from temper.records import Steps

NAME = "labelled steps"
HELP = '{"prompt": ..., "completions": ["step", ...], "labels": [true, ...]}'
FIELDS = {"prompt", "system", "completions", "labels"}
KIND = "steps"


def recognise(row: dict[str, Any]) -> str:
    if "prompt" in row and isinstance(row.get("completions"), list) and isinstance(row.get("labels"), list):
        return "rows with 'prompt', 'completions' and 'labels'"
    return ""


def convert(row: dict[str, Any]) -> Steps:
    return Steps(prompt=prompt_of(row), steps=row["completions"], labels=[None if x is None else float(x) for x in row["labels"]])


def write(record: Steps, meta: dict[str, Any]) -> dict[str, Any]:
    labels = [bool(x) if x in (0, 1) else x for x in record.labels]
    return {"prompt": words_or_messages(record.prompt, "user"), "completions": record.steps, "labels": labels}
