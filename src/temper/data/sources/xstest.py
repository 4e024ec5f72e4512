"""XSTest: prompts that only look unsafe, and contrasts that are (arXiv:2308.01263)."""

from typing import Any

from temper.records import Message, Prompt

NAME = "XSTest prompts"
HELP = "a table with id, prompt, type, label (safe or unsafe), focus, note"
FIELDS = {"prompt"}
KIND = "prompts"
COLUMNS = ("id", "prompt", "type", "label", "focus", "note")


def recognise(row: dict[str, Any]) -> str:
    return "a table with 'prompt', 'type' and 'focus'" if {"prompt", "type", "focus"} <= row.keys() else ""


def convert(row: dict[str, Any]) -> Prompt:
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ValueError("the prompt is empty")
    if row.get("label", "safe") not in ("safe", "unsafe"):
        raise ValueError(f"label {row['label']!r}: known are safe and unsafe")
    return Prompt(messages=[Message(role="user", content=row["prompt"])])


def write(record: Prompt, meta: dict[str, Any]) -> dict[str, Any]:
    if len(record.messages) != 1 or not {"type", "focus"} <= meta.keys():
        raise ValueError(f"{NAME} are one turn with a type and a focus")
    row = {"prompt": record.messages[0].content, **{name: meta.pop(name) for name in COLUMNS if name in meta}}
    return {name: row[name] for name in COLUMNS if name in row}
