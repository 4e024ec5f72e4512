"""Records as this program writes them: a pair's prompt as messages, with soft label, margin and meta."""

from typing import Any

from temper.records import Chat, Judgement, Pair, Prompt, Ranked, Rated, Record, Steps, Text

NAME = "temper records"
HELP = "what temper itself writes, told by its 'meta'"
FIRST = True
KIND = "any"
FORMS: list[type[Record]] = [Text, Chat, Pair, Ranked, Rated, Steps, Judgement]  # a Prompt has the fields of a Chat
FIELDS = {name for model in FORMS for name in model.model_fields}


def _form(row: dict[str, Any]) -> type[Record] | None:
    """The record whose fields these are, what is text in it being text; a pair's answers as messages are another format's."""
    for model in FORMS:
        needed = {name: field.annotation for name, field in model.model_fields.items() if field.is_required()}
        whole = needed.keys() <= row.keys() <= model.model_fields.keys()
        if whole and all(isinstance(row[name], str) for name, kind in needed.items() if kind is str):
            return model
    return None


def recognise(row: dict[str, Any]) -> str:
    if isinstance(row.get("meta"), dict) and not isinstance(row.get("prompt"), str) and _form(row):
        return "fields of a record of temper's"
    return ""


def convert(row: dict[str, Any]) -> Record:
    model = _form(row)
    assert model is not None
    said = row.get("messages")
    if isinstance(said, list) and not any(isinstance(m, dict) and m.get("role") == "assistant" for m in said):
        model = Prompt
    return model.model_validate(row)


def write(record: Record, meta: dict[str, Any]) -> dict[str, Any]:
    """All of it."""
    row = {**record.model_dump(mode="json"), "meta": {**meta}}
    meta.clear()
    return row
