"""Self-Instruct's seed tasks: an instruction with instances of it, each an input and the output (arXiv:2212.10560)."""

from typing import Any

from temper.data.sources import alpaca
from temper.records import Chat, Record

NAME = "seed tasks"
HELP = '{"instruction": ..., "instances": [{"input": ..., "output": ...}]}'
FIELDS = {"instruction", "instances"}
KIND = "chat"
OWN = ("id", "name", "is_classification")


def recognise(row: dict[str, Any]) -> str:
    return "rows with 'instruction' and 'instances'" if "instruction" in row and isinstance(row.get("instances"), list) else ""


def flatten(row: dict[str, Any], kind: str) -> list[Record]:
    """A conversation for each instance."""
    if not row["instances"]:
        raise ValueError("the task has no instance")
    made: list[Record] = []
    for i, one in enumerate(row["instances"], 1):
        if not isinstance(one, dict) or not isinstance(one.get("output"), str):
            raise ValueError(f"instance {i} has no text in 'output'")
        made.append(alpaca.convert({"instruction": row["instruction"], "input": one.get("input"), "output": one["output"]}))
    return made


def write(record: Chat, meta: dict[str, Any]) -> dict[str, Any]:
    """A task with one instance."""
    row = alpaca.write(record, meta)
    if row.keys() & {"system", "history"}:
        raise ValueError(f"{NAME} hold one question and its answer, and no system turn")
    own = {name: meta.pop(name) for name in OWN if name in meta}
    return {**own, "instruction": row["instruction"], "instances": [{"input": row["input"], "output": row["output"]}]}
