"""Raters by name, in their simplest form, and the world's gold score as one. Floor 4."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from temper.config import UserError
from temper.judges.rating import Answer, Rater
from temper.judges.reward_model import RewardModel
from temper.world import Ask, gold

PARTS = ("total", "helpful", "harmless", "honest", "concise", "format")


class Gold:
    """The embedded world's exact score of an answer, or a part of it; None for prompts of other origin."""

    def __init__(self, part: str = "total") -> None:
        self.part, self.name = part, "gold" if part == "total" else f"gold:{part}"

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        return [getattr(gold(Ask.of(a.prompt), a.text), self.part) if "ask" in a.prompt.meta else None for a in answers]


def rater(spec: str, *, tokenizer: Any = None, seed: int = 0, **how: Any) -> Rater:
    """`gold`, `gold:PART`, or the folder of a reward model. tokenizer: the policy's, which a reward model must share; how: its device and
    precision. Raises UserError for anything else."""
    name, _, part = spec.partition(":")
    if name == "gold":
        if part and part not in PARTS:
            raise UserError(f"{spec}: gold has no part {part!r}; it has {', '.join(PARTS[1:])}")
        return Gold(part or "total")
    if not Path(spec).expanduser().exists():
        raise UserError(f"{spec}: no such folder, and not gold or gold:PART ({', '.join(PARTS[1:])})")
    model = RewardModel(spec, **how)
    if tokenizer is not None and model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{spec}: its tokenizer is not that of the policy; train a reward model on the policy's")
    return model
