"""Losses over pairs of answers to one prompt. To add one, write a decorated function here. Floor 1: torch only.

A rule takes `Pairs` and keyword-only settings, assumes that `chosen` is the better answer, and returns one number per pair. The
decorator registers it under its own name and gives it soft labels; `settings(rule)` reads its flags from its signature, its
docstring is its help, and every test of tests/losses/test_preference.py runs on it.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol, cast

import torch.nn.functional as F
from torch import Tensor

from temper.losses.registry import Setting, settings

__all__ = ["RULES", "Pairs", "Rule", "Setting", "dpo", "rule", "settings"]


class Pairs(NamedTuple):
    """What a rule may look at. Each field is [N], one entry per pair; log-probabilities are summed over the answer's tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor  # the same answers under the reference; zeros where a rule needs none
    ref_rejected: Tensor
    chosen_len: Tensor  # tokens in the answer, end of turn included
    rejected_len: Tensor

    @property
    def margin(self) -> Tensor:
        """h: the log-ratio of chosen over rejected, relative to the reference, in nats."""
        return (self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)

    def swapped(self) -> "Pairs":
        """The same pairs, the other answer chosen."""
        return Pairs(self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.rejected_len, self.chosen_len)


class Rule(Protocol):
    """A registered loss. `reference` says whether it reads ref_chosen and ref_rejected."""

    __name__: str
    __doc__: str | None
    reference: bool

    def __call__(self, p: Pairs, *, soft: Tensor | None = None, **settings: Any) -> Tensor:
        """Pairs -> [N], unreduced. `soft` [N]: the probability that `chosen` is the better answer; None = 1."""


RULES: dict[str, Rule] = {}


def rule(*, reference: bool) -> Callable[[Callable[..., Tensor]], Rule]:
    """Register a loss under its own name, with soft labels: p L(w, l) + (1 - p) L(l, w)."""

    def register(fn: Callable[..., Tensor]) -> Rule:
        @functools.wraps(fn)
        def soften(p: Pairs, *, soft: Tensor | None = None, **settings: Any) -> Tensor:
            loss = fn(p, **settings)
            return loss if soft is None else soft * loss + (1 - soft) * fn(p.swapped(), **settings)

        made = cast(Rule, soften)
        made.reference = reference
        RULES[fn.__name__] = made
        return made

    return register


@rule(reference=True)
def dpo(
    p: Pairs,
    *,
    beta: Annotated[float, "pull to the reference: the larger, the closer the optimum stays to it", {"gt": 0}] = 0.1,
    label_smoothing: Annotated[float, "share of labels believed flipped (cDPO)", {"ge": 0, "lt": 0.5}] = 0.0,
) -> Tensor:
    """Direct preference optimisation: the logistic loss on the margin, -log sigma(beta h) (arXiv:2305.18290 eq. 7).

    The default for clean pairs whose answers the reference covers. With `label_smoothing` e it is cDPO (Mitchell, 2023),
    -(1 - e) log sigma(beta h) - e log sigma(-beta h), which stops pushing at beta h = logit(1 - e).
    """
    z = beta * p.margin
    return (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
