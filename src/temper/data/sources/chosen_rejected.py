"""Pairs of answers: a prompt with two strings, a prompt with two last turns, or two conversations with a shared prefix."""

from typing import Any

from temper.data.sources import alpaca, hh, sharegpt
from temper.data.sources.messages import check_shared, dumped
from temper.data.sources.prompt_completion import answer_of, prompt_of
from temper.records import Message, Pair

NAME = "chosen/rejected"
HELP = '{"prompt": ..., "chosen": ..., "rejected": ...}, or two message lists with a shared start; "margin", or "tie": true'
FIELDS = {
    *("prompt", "question", "instruction", "input", "history", "system", "messages", "conversations", "conversation"),
    *("chosen", "rejected", "margin", "tie", "soft", "score_chosen", "score_rejected"),
}
KIND = "pairs"
PROMPTS = ("prompt", "question", "instruction", "conversations", "conversation", "messages")


def recognise(row: dict[str, Any]) -> str:
    if not {"chosen", "rejected"} <= row.keys() or hh.recognise(row):
        return ""
    if name := next((name for name in PROMPTS if name in row), ""):
        return f"rows with {name!r}, 'chosen' and 'rejected'"
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        return "'chosen' and 'rejected' are lists of messages"
    return ""


def _answer(value: Any, name: str) -> list[Message]:
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return sharegpt.turns(turns, name)
    return answer_of(value, name)


def _prompt(row: dict[str, Any], whole: bool) -> list[Message]:
    """The row's own prompt; `messages` beside two whole conversations is one of these again."""
    name = next((name for name in PROMPTS if name in row), "")
    if name == "instruction":
        return alpaca.question_of(row)
    if name.startswith("conversation"):
        messages = sharegpt.turns(row[name], name)
        system = row.get("system")
        return [Message(role="system", content=system), *messages] if system and messages[0].role != "system" else messages
    return prompt_of(row, name) if name and not (name == "messages" and whole) else []


def _number(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"field {name!r} should be a number, got {str(value)[:60]!r}")
    return value


def convert(row: dict[str, Any]) -> Pair:
    """A tie has P(chosen is better) = 1/2; so have two equal scores. Unequal scores are kept in meta: they are no margin in logits."""
    chosen, rejected = _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1].role != "assistant":
            raise ValueError(f"{name} ends with a {answer[-1].role} turn, so it holds no answer")
    prompt = _prompt(row, whole=len(chosen) > 1)
    if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:  # whole conversations that repeat the prompt
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    check_shared(chosen, rejected, "message", before=len(prompt))
    margin, high, low = (_number(row, name) for name in ("margin", "score_chosen", "score_rejected"))
    scores = {"score_chosen": high, "score_rejected": low} if high is not None and low is not None else {}
    soft = _number(row, "soft")
    if row.get("tie") is True or (scores and high == low and soft is None):
        soft = 0.5
    last = [m for m in (chosen[-1], rejected[-1]) if m.tool_calls]
    if last:
        raise ValueError("the last turn of an answer calls tools; a pair's answers are words")
    return Pair(
        prompt=[*prompt, *chosen[:-1]],
        chosen=chosen[-1].content,
        rejected=rejected[-1].content,
        margin=margin,
        soft=1.0 if soft is None else soft,
        meta=scores,
    )


def write(record: Pair, meta: dict[str, Any]) -> dict[str, Any]:
    """As messages: what the prompt is can then not be mistaken."""
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in (record.chosen, record.rejected))
    row: dict[str, Any] = {"prompt": dumped(record.prompt), "chosen": chosen, "rejected": rejected}
    row |= {name: meta.pop(name) for name in ("score_chosen", "score_rejected") if name in meta}
    if record.margin is not None:
        row["margin"] = record.margin
    if record.soft == 0.5:
        row["tie"] = True
    elif record.soft != 1:
        row["soft"] = record.soft
    return row
