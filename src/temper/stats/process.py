"""Figures of step labels: a solution's score from its steps, the first error, what Monte-Carlo labels get wrong. Floor 1: numpy only."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from temper.stats.intervals import Interval, share_interval

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "product": math.prod,  # arXiv:2305.20050; falls with every step
    "minimum": min,  # arXiv:2312.08935
    "last": lambda p: p[-1],
    "mean": lambda p: sum(p) / len(p),
}


def aggregate(p: Sequence[float], how: str) -> float:
    """A solution's score from its steps' P(right) [k >= 1]; how: a name of AGGREGATES. Raises ValueError without steps."""
    if not len(p):
        raise ValueError("a solution without steps has no score")
    return float(AGGREGATES[how](list(p)))


def first_error(p: Sequence[float | None], threshold: float = 0.5) -> int:
    """Index of the first step below the threshold, -1 where there is none; steps that are None are passed over."""
    return next((k for k, x in enumerate(p) if x is not None and x < threshold), -1)


class Located(NamedTuple):
    """How well first errors are found (arXiv:2412.06559): shares over solutions with an error, whose step must be hit exactly, and over
    those without, where none may be named; f1 is their harmonic mean. None where there are no such solutions."""

    wrong: Interval | None
    right: Interval | None
    f1: float | None


def located(found: Sequence[int], true: Sequence[int]) -> Located:
    """found, true: of each solution its first error as `first_error` gives it."""
    hit = np.array([a == b for a, b in zip(found, true, strict=True)], dtype=float)
    faulty = np.array(true) >= 0
    wrong, right = (share_interval(hit[which]) if which.any() else None for which in (faulty, ~faulty))
    if wrong is None or right is None:
        return Located(wrong, right, None)
    total = wrong.mean + right.mean
    return Located(wrong, right, 2 * wrong.mean * right.mean / total if total else 0.0)


class LabelError(NamedTuple):
    """Chances that a hard Monte-Carlo label is wrong."""

    false_negative: float  # a right step of which no rollout reaches the answer
    false_positive: float  # a wrong step of which one does


def monte_carlo_error(n: int, right: float, wrong: float) -> LabelError:
    """Hard labels from n rollouts, of which each reaches the answer with probability `right` after a right step and `wrong` after a wrong
    one: (1 - right)^n and 1 - (1 - wrong)^n."""
    return LabelError((1 - right) ** n, 1 - (1 - wrong) ** n)
