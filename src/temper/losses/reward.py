"""Losses of reward models. To add one over pairs, write a decorated function here. Floor 1: torch only.

A rule says how likely each outcome of a comparison is, given the gap D = r_w - r_l of the two scores. The decorator makes the loss of it,
with the switches that suit every rule: margins, soft labels, a known rate of flipped labels, centring.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Outcomes(NamedTuple):
    """Log-probabilities of what a comparison can give, each [N]. tie: None where the rule knows none."""

    win: Tensor
    lose: Tensor
    tie: Tensor | None = None


class Rule(Protocol):
    """A registered loss over pairs. `outcomes(gap, **own)` are its probabilities, `ties` says whether a tie is one of them."""

    __name__: str
    __doc__: str | None
    ties: bool
    outcomes: Callable[..., Outcomes]

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        *,
        margin: Tensor | None = None,
        soft: Tensor | None = None,
        flip: float = 0.0,
        centring: float = 0.0,
        **own: Any,
    ) -> Tensor:
        """The negative log-likelihood of the label, plus eta (r_w + r_l)^2 -> [N], unreduced.

        Args:
            chosen, rejected: [N] the scores r_w and r_l.
            margin: [N] m, by how much the better answer should win: D - m counts for a win, D + m for a loss (arXiv:2307.09288). None = 0.
            soft: [N] p, the probability that `chosen` is the better one. None = 1. To a rule with ties p = 0.5 is a tie, and what lies
                between is a tie with probability 1 - |2 p - 1|; to others 0.5 is half a win and half a loss.
            flip: e, the known share of labels that name the wrong answer: (1 - e) P + e P(the other) (forward correction; arXiv:2403.00409
                has the setting). Ties stay ties.
            centring: eta, pulls r_w + r_l to 0, which the likelihood leaves free (arXiv:2312.09244; 0.01 there).
        """


RULES: dict[str, Rule] = {}


def rule(*, ties: bool) -> Callable[[Callable[..., Outcomes]], Rule]:
    """Register a loss under its own name."""

    def register(fn: Callable[..., Outcomes]) -> Rule:
        @functools.wraps(fn)
        def loss(chosen, rejected, *, margin=None, soft=None, flip=0.0, centring=0.0, **own):
            gap = chosen - rejected
            win, lose, tie = fn(gap, **own)
            if margin is not None:
                win, lose = fn(gap - margin, **own).win, fn(gap + margin, **own).lose
            if flip:
                keep, turn = math.log1p(-flip), math.log(flip)
                win, lose = torch.logaddexp(keep + win, turn + lose), torch.logaddexp(keep + lose, turn + win)
            if soft is None:
                items = -win
            elif tie is None:
                items = -(soft * win + (1 - soft) * lose)
            else:
                clear = 2 * soft - 1
                items = -(clear.clamp(min=0) * win + (-clear).clamp(min=0) * lose + (1 - clear.abs()) * tie)
            return items + centring * (chosen + rejected).square() if centring else items

        made = cast(Rule, loss)
        made.ties, made.outcomes = ties, fn
        RULES[fn.__name__] = made
        return made

    return register


@rule(ties=False)
def bradley_terry(gap: Tensor) -> Outcomes:
    """Bradley-Terry: P(win) = sigma(D) (arXiv:2203.02155 eq. 1 with K = 2)."""
    return Outcomes(F.logsigmoid(gap), F.logsigmoid(-gap))


@rule(ties=True)
def rao_kupper(gap: Tensor, *, tie: Annotated[float, "eta: gaps below it are mostly ties", {"gt": 0}] = 0.5) -> Outcomes:
    """Rao-Kupper (1967): P(win) = sigma(D - eta), P(lose) = sigma(-D - eta), a tie the rest; between equals tanh(eta / 2)."""
    win, lose = F.logsigmoid(gap - tie), F.logsigmoid(-gap - tie)
    return Outcomes(win, lose, math.log(math.expm1(2 * tie)) + win + lose)


@rule(ties=True)
def davidson(gap: Tensor, *, tie: Annotated[float, "nu: odds of a tie between equals, 2 P(tie) / P(no tie)", {"gt": 0}] = 0.5) -> Outcomes:
    """Davidson (1970): e^(D/2) : e^(-D/2) : nu for win, loss and tie; between equals a tie has nu / (2 + nu)."""
    odds = torch.stack([gap / 2, -gap / 2, torch.full_like(gap, math.log(tie))]).log_softmax(0)
    return Outcomes(*odds)


def plackett_luce(scores: Tensor, there: Tensor) -> Tensor:
    """Plackett-Luce negative log-likelihood of whole rankings: -sum_k log(e^{s_k} / sum_{j >= k} e^{s_j}) (arXiv:2305.18290, app. A.3).

    Args:
        scores: [R, K] of each ranking's answers, the best first; what stands behind the last answer is not read.
        there: [R, K] bool: which answers there are.

    Returns:
        [R]; of a ranking of two it is Bradley-Terry's loss.
    """
    later = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=scores.device).triu()
    gaps = scores[:, None, :] - scores[:, :, None]  # s_j - s_k
    stages = gaps.masked_fill(~later | ~(there[:, None, :] | torch.eye(len(later), dtype=torch.bool, device=scores.device)), -math.inf)
    return stages.logsumexp(-1).masked_fill(~there, 0.0).sum(-1)


def step_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of a step's label, soft or hard (arXiv:2305.20050, arXiv:2312.08935 eq. 2).

    Args:
        logits: [n] of P(right); or [n, 3] of wrong, neutral and right.
        label: [n] in [0, 1]: 1 right, 0 wrong. Over three classes 0.5 is neutral, and what lies between is shared by its neighbours.

    Returns:
        [n]
    """
    if logits.ndim == 1:
        return F.softplus(logits) - label * logits
    wrong, right = (1 - 2 * label).clamp(min=0), (2 * label - 1).clamp(min=0)
    classes = torch.stack([wrong, 1 - wrong - right, right], -1)
    return -(classes * logits.log_softmax(-1)).sum(-1)
