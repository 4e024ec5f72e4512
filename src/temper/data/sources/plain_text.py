"""Plain text: a .txt file, or rows with a `text`."""

from typing import Any

from temper.records import Text

NAME = "plain text"
HELP = 'a .txt file, or {"text": ...}'


def recognise(row: dict[str, Any]) -> str:
    if "text" in row and not row.keys() & {"messages", "prompt", "chosen", "instruction", "label"}:
        return f"a text file, in {row['parts']} parts" if "parts" in row else "rows with 'text'"
    return ""


def convert(row: dict[str, Any]) -> Text:
    """A long file comes in parts, which say so: only the last is followed by an end token."""
    meta = {name: row[name] for name in ("part", "parts") if isinstance(row.get(name), int)}
    return Text(text=row["text"], meta=meta if len(meta) == 2 else {})
