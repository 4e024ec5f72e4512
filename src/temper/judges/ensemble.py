"""Several raters as one: their mean, their worst, or their mean less what they disagree on (arXiv:2310.02743 eq. 3 to 5). Floor 4.

A policy finds what one reward model overrates; members trained from other seeds overrate other things. What all of them learned from
their raters' bias no aggregation removes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from temper.config import UserError
from temper.judges.rating import Answer, Rater
from temper.judges.reward_model import RewardModel

Combine = Callable[[np.ndarray], np.ndarray]  # [members, n] -> [n]


class Ensemble:
    """Members as one rater; an answer that one of them cannot rate has no score."""

    def __init__(self, name: str, members: Sequence[Rater], combine: Combine) -> None:
        if not members:
            raise UserError(f"{name}: no members; give at least one")
        self.name, self.members, self.combine = name, list(members), combine

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        rated = [member.rate(answers) for member in self.members]
        whole = [i for i in range(len(answers)) if all(scores[i] is not None for scores in rated)]
        out: list[float | None] = [None] * len(answers)
        if whole:
            combined = self.combine(np.array([[scores[i] for i in whole] for scores in rated], dtype=float))
            for i, score in zip(whole, combined.tolist(), strict=True):
                out[i] = score
        return out


def mean(members: Sequence[Rater]) -> Ensemble:
    """mean_i R_i."""
    return Ensemble("mean", members, lambda r: r.mean(0))


def worst(members: Sequence[Rater]) -> Ensemble:
    """min_i R_i (worst-case optimisation): an answer is as good as its severest member says."""
    return Ensemble("worst", members, lambda r: r.min(0))


def uwo(members: Sequence[Rater], lam: float = 0.5) -> Ensemble:
    """mean_i R_i - lam var_i R_i (uncertainty-weighted), the population variance over members; the paper took 0.5 for best-of-n and 0.1
    for PPO. Raises UserError for lam < 0."""
    if lam < 0:
        raise UserError(f"lam {lam:g} would reward what the members disagree on; give 0 or more")
    return Ensemble("uwo", members, lambda r: r.mean(0) - lam * r.var(0))


class Scaled:
    """A rater moved and stretched: (score - mean) / std."""

    def __init__(self, rater: Rater, mean: float, std: float) -> None:
        self.name, self.rater, self.mean, self.std = rater.name, rater, mean, std

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        return [None if score is None else (score - self.mean) / self.std for score in self.rater.rate(answers)]


def on_one_scale(members: Sequence[Rater], answers: Sequence[Answer]) -> list[Scaled]:
    """The members with mean 0 and deviation 1 on these answers, before they are compared. Reward models that were trained together are so
    already, on their training answers; those of different runs each on their own. Raises UserError where one rates fewer than two."""
    out = []
    for member in members:
        scores = np.array([score for score in member.rate(answers) if score is not None], dtype=float)
        if len(scores) < 2:
            raise UserError(f"{member.name}: rates {len(scores)} of {len(answers)} answers; a scale needs two")
        out.append(Scaled(member, float(scores.mean()), float(scores.std()) or 1.0))
    return out


def members(folder: str | Path, **how: Any) -> list[RewardModel]:
    """The reward models of `temper reward --members`: that in model/ and those in members/. how: see `RewardModel`."""
    place, colon, head = str(folder).rpartition(":")
    if not colon or Path(str(folder)).exists():
        place, colon, head = str(folder), "", ""
    others = sorted((path for path in (Path(place) / "members").glob("*") if path.name.isdigit()), key=lambda path: int(path.name))
    return [RewardModel(f"{path}{colon}{head}", **how) for path in (*others, place)]
