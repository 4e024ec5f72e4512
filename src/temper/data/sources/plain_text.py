"""Plain text: a .txt file, or rows with a `text`."""

from typing import Any

from temper.records import Text

NAME = "plain text"
FIELDS = {"text", "part", "parts"}
KIND = "text"
LAST = True
HELP = 'a .txt file, or {"text": ...}'


def recognise(row: dict[str, Any]) -> str:
    if "text" in row and not row.keys() & {"messages", "prompt", "chosen", "instruction", "label"}:
        return f"a text file, in {row['parts']} parts" if "parts" in row else "rows with 'text'"
    return ""


def convert(row: dict[str, Any]) -> Text:
    """A long file comes in parts, which say so: only the last is followed by an end token."""
    meta = {name: row[name] for name in ("part", "parts") if isinstance(row.get(name), int)}
    return Text(text=row["text"], meta=meta if len(meta) == 2 else {})


def write(record: Text, meta: dict[str, Any]) -> dict[str, Any]:
    return {"text": record.text, **{name: meta.pop(name) for name in ("part", "parts") if name in meta}}
