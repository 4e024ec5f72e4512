"""Losses over single answers with a thumb, up or down. To add one, write a decorated function here. Floor 1: torch only.

Both rules compare an answer's log-ratio with a reference point that one answer does not show: `z = beta (r - point)`. The point is
data, without gradient, and one number for the whole optimiser step: `point` says how the method finds it.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from temper.losses.registry import settings

__all__ = ["RULES", "Answers", "Rule", "bco", "kto", "rule", "settings"]

Point = Literal["mismatched", "balance"]


class Answers(NamedTuple):
    """What a rule may look at. Each field is [N], one entry per answer."""

    log_ratio: Tensor  # r: log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens, in nats
    good: Tensor  # bool: thumb up
    point: Tensor | float  # what r is compared with, in nats
    weight: Tensor | float = 1.0  # of the answer's class

    def z(self, beta: float) -> Tensor:
        """How far on its right side an answer is: the scaled distance from the point, negated where the thumb is down."""
        z = beta * (self.log_ratio - self.point)
        return torch.where(self.good, z, -z)


class Rule(Protocol):
    """A registered loss. `point`: "mismatched", the mean log-ratio of answers to other prompts, at least 0; "balance", the middle
    between the mean log-ratios of good and bad answers."""

    __name__: str
    __doc__: str | None
    point: Point

    def __call__(self, a: Answers, **settings: Any) -> Tensor:
        """Answers -> [N], unreduced."""


RULES: dict[str, Rule] = {}


def rule(*, point: Point) -> Callable[[Callable[..., Tensor]], Rule]:
    """Register a loss under its own name."""

    def register(fn: Callable[..., Tensor]) -> Rule:
        made = cast(Rule, fn)
        made.point = point
        RULES[fn.__name__] = made
        return made

    return register


Beta = Annotated[float, "pull to the reference: the larger, the sooner an answer has moved enough", {"gt": 0}]


@rule(point="mismatched")
def kto(a: Answers, *, beta: Beta = 0.1) -> Tensor:
    """Kahneman-Tversky optimisation: the value of an answer against what policy and reference differ by anyway (arXiv:2402.01306 eq. 8).

    lambda_D (1 - sigma(beta (r - z0))) for a thumb up, lambda_U (1 - sigma(beta (z0 - r))) for a thumb down; r is the answer's
    log-ratio, z0 the mean log-ratio over the whole batch of answers to *other* prompts, at least 0, without gradient. For thumbs
    rather than pairs, for very unequal numbers of them, and for noisy labels: far answers stop counting.
    """
    return a.weight * torch.sigmoid(-a.z(beta))


@rule(point="balance")
def bco(a: Answers, *, beta: Beta = 0.1) -> Tensor:
    """Binary classifier optimisation: a classifier of thumbs whose logit is the implicit reward (arXiv:2404.04656).

    -log sigma(beta r - delta) for a thumb up, -log sigma(delta - beta r) for a thumb down; the shift delta is the running middle of
    the mean rewards of both classes, without gradient. For thumbs, of about as many up as down; unlike KTO an answer on the wrong side
    counts the more the further it is.
    """
    return a.weight * F.softplus(-a.z(beta))
