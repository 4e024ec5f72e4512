"""Records as this program writes them: a pair's prompt as messages, with soft label, margin and meta."""

from typing import Any

from temper.records import Chat, Pair, Prompt, Ranked, Record, Text

NAME = "temper records"
HELP = "what temper itself writes, told by its 'meta'"
FIRST = True
FIELDS: dict[frozenset[str], type[Record]] = {frozenset(model.model_fields): model for model in (Text, Chat, Pair, Ranked)}


def recognise(row: dict[str, Any]) -> str:
    return "fields of a record of temper's" if isinstance(row.get("meta"), dict) and frozenset(row) in FIELDS else ""


def convert(row: dict[str, Any]) -> Record:
    model = FIELDS[frozenset(row)]
    said = row.get("messages")
    if isinstance(said, list) and not any(isinstance(m, dict) and m.get("role") == "assistant" for m in said):
        model = Prompt
    return model.model_validate(row)
