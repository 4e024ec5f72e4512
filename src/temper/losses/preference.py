"""Losses over answers to one prompt, of which one is better. To add one, write a decorated function here. Floor 1: torch only.

A rule takes `Pairs` (or `Rankings`) and keyword-only settings, assumes that `chosen` is the better answer (that the order is right),
and returns one number per pair (per ranking). The decorator registers it under its own name and gives it soft labels;
`settings(rule)` reads its flags from its signature, its docstring is its help, and every test of tests/losses/test_preference.py
runs on it.
"""

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from temper.losses.registry import Setting, settings

__all__ = ["RULES", "Pairs", "Rankings", "Rule", "Setting", "dpo", "rule", "settings"]

_FAR = 40.0  # log-ratios are cut here before they are exponentiated: squared, as in a gradient's norm, e^40 is still a float32


class Pairs(NamedTuple):
    """What a rule may look at. Each field is [N], one entry per pair; log-probabilities are summed over the answer's tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor  # the same answers under the reference; zeros where a rule needs none
    ref_rejected: Tensor
    chosen_len: Tensor  # tokens in the answer, end of turn included
    rejected_len: Tensor
    strength: Tensor | float = 0.0  # by how much the better one is better, where a rater said so; else 0

    @property
    def margin(self) -> Tensor:
        """h: the log-ratio of chosen over rejected, relative to the reference, in nats."""
        return (self.chosen - self.rejected) - (self.ref_chosen - self.ref_rejected)

    def swapped(self) -> "Pairs":
        """The same pairs, the other answer chosen."""
        return Pairs(self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.rejected_len, self.chosen_len, self.strength)


class Rankings(NamedTuple):
    """What a listwise rule may look at: all answers of N rankings, those of one together and the best first. Each field is [A]."""

    logp: Tensor
    ref_logp: Tensor
    length: Tensor
    record: Tensor  # which ranking an answer belongs to, 0 to N - 1

    def swapped(self) -> "Rankings":
        """The same rankings, the worst answer first."""
        return Rankings(*(x.flip(0) for x in self))


class Rule(Protocol):
    """A registered loss. `reference`: whether it reads the reference's log-probabilities. `listwise`: whether it takes Rankings."""

    __name__: str
    __doc__: str | None
    reference: bool
    listwise: bool

    def __call__(self, p: Any, *, soft: Tensor | None = None, **settings: Any) -> Tensor:
        """Pairs or Rankings -> [N], unreduced. `soft` [N]: the probability that the label is right, 0.5 for a tie; None = 1."""


RULES: dict[str, Rule] = {}


def rule(*, reference: bool, listwise: bool = False) -> Callable[[Callable[..., Tensor]], Rule]:
    """Register a loss under its own name, with soft labels: p L(w, l) + (1 - p) L(l, w)."""

    def register(fn: Callable[..., Tensor]) -> Rule:
        @functools.wraps(fn)
        def soften(p: Any, *, soft: Tensor | None = None, **settings: Any) -> Tensor:
            loss = fn(p, **settings)
            return loss if soft is None else soft * loss + (1 - soft) * fn(p.swapped(), **settings)

        made = cast(Rule, soften)
        made.reference, made.listwise = reference, listwise
        RULES[fn.__name__] = made
        return made

    return register


Beta = Annotated[float, "pull to the reference: the larger, the closer the optimum stays to it", {"gt": 0}]
Scale = Annotated[float, "scale of the log-probabilities that are compared", {"gt": 0}]


@rule(reference=True)
def dpo(
    p: Pairs,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[float, "share of labels believed flipped (cDPO)", {"ge": 0, "lt": 0.5}] = 0.0,
    offset: Annotated[float, "weight of a pair's `margin`, by which beta h must exceed 0 (ODPO)", {"ge": 0}] = 0.0,
) -> Tensor:
    """Direct preference optimisation: the logistic loss on the margin, -log sigma(beta h) (arXiv:2305.18290 eq. 7).

    The default for clean pairs whose answers the reference covers. With `label_smoothing` e it is cDPO (Mitchell, 2023),
    -(1 - e) log sigma(beta h) - e log sigma(-beta h), which stops pushing at beta h = logit(1 - e). With `offset` it is ODPO
    (arXiv:2402.10571), -log sigma(beta h - offset m): for data that say by how much (m) an answer is better.
    """
    z, m = beta * p.margin, offset * p.strength
    return (1 - label_smoothing) * F.softplus(m - z) + label_smoothing * F.softplus(m + z)


@rule(reference=True)
def rdpo(
    p: Pairs,
    *,
    beta: Beta = 0.1,
    flip_rate: Annotated[float, "share of labels that are flipped", {"ge": 0, "lt": 0.5}] = 0.1,
) -> Tensor:
    """Robust DPO: DPO's loss on the true labels, estimated without bias from labels of which a share e is flipped (arXiv:2403.00409).

    [-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2e). For noisy labels whose flip rate is known; unlike cDPO it has
    DPO's own optimum. Not bounded below: train it briefly.
    """
    z = beta * p.margin
    return ((1 - flip_rate) * F.softplus(-z) - flip_rate * F.softplus(z)) / (1 - 2 * flip_rate)


@rule(reference=True)
def ipo(
    p: Pairs,
    *,
    tau: Annotated[float, "pull to the reference: h is led to 1 / (2 tau), in nats", {"gt": 0}] = 0.1,
    log_ratios: Annotated[
        Literal["summed", "averaged"],
        "of an answer: summed over its tokens (the paper), or averaged (TRL); tau means another thing in each",
    ] = "summed",
) -> Tensor:
    """Identity preference optimisation: (h - 1 / (2 tau))^2, which leads each margin to a place of its own (arXiv:2310.12036 eq. 17).

    For few or certain labels, on which DPO would push without end: the pull to the reference holds even when a label never varies.
    """
    if log_ratios == "averaged":
        return (_per_token_margin(p) - 1 / (2 * tau)).square()
    return (p.margin - 1 / (2 * tau)).square()


@rule(reference=True)
def hinge(p: Pairs, *, beta: Annotated[float, "a pair is learned until h reaches 1 / beta", {"gt": 0}] = 0.1) -> Tensor:
    """The hinge loss on the margin, max(0, 1 - beta h): SLiC's loss, taken over the reference (arXiv:2305.10425, arXiv:2309.06657).

    For pairs that should be learned up to a margin and then left alone. Deviation: SLiC compares plain log-probabilities and adds
    a likelihood term; the reference takes both places here.
    """
    return F.relu(1 - beta * p.margin)


@rule(reference=True)
def lndpo(p: Pairs, *, beta: Annotated[float, "pull to the reference, on log-ratios per token", {"gt": 0}] = 5.0) -> Tensor:
    """Length-normalised DPO: DPO with each answer's log-ratio averaged over its tokens (arXiv:2411.15124, sec. 5).

    -log sigma(beta (a / T_w - b / T_l)). For pairs whose answers differ much in length, where DPO learns the length.
    """
    return F.softplus(-beta * _per_token_margin(p))


@rule(reference=True)
def rpo(
    p: Pairs,
    *,
    beta: Beta = 0.1,
    nll_weight: Annotated[float, "weight of the chosen answer's negative log-likelihood per token", {"ge": 0}] = 1.0,
) -> Tensor:
    """DPO and the likelihood of the chosen answer: -log sigma(beta h) - w log pi(y_w) / T_w (arXiv:2404.19733 eq. 2).

    For chosen answers that are worth imitating (reasoning, demonstrations): keeps their probability from falling, which DPO allows.
    """
    return F.softplus(-beta * p.margin) - nll_weight * p.chosen / p.chosen_len


@rule(reference=False)
def simpo(
    p: Pairs,
    *,
    beta: Annotated[float, "scale of the log-probability per token", {"gt": 0}] = 2.0,
    gamma: Annotated[float, "the margin that the chosen answer should have; 0.3 to 0.8 of beta is usual", {"ge": 0}] = 1.0,
) -> Tensor:
    """SimPO: -log sigma(beta log pi(y_w) / T_w - beta log pi(y_l) / T_l - gamma), without a reference (arXiv:2405.14734 eq. 6).

    For when no reference is wanted and answers are read by their likelihood per token. Nothing holds it near its start but the
    learning rate: keep that small.
    """
    return F.softplus(gamma - beta * (p.chosen / p.chosen_len - p.rejected / p.rejected_len))


@rule(reference=False)
def orpo(
    p: Pairs,
    *,
    lam: Annotated[float, "weight of the odds ratio beside the likelihood of the chosen answer", {"gt": 0}] = 0.1,
) -> Tensor:
    """ORPO: likelihood of the chosen answer per token, and the odds ratio of the two (arXiv:2403.07691 eqs. 6, 7).

    -log pi(y_w) / T_w - lam log sigma(log odds_w - log odds_l), with odds P / (1 - P) and P = exp(mean log-prob of a token). One stage
    in the place of SFT and preference training: for a base model and chosen answers good enough to imitate.
    """
    chosen, rejected = (_below_one(x) for x in (p.chosen / p.chosen_len, p.rejected / p.rejected_len))
    log_odds_ratio = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return -chosen + lam * F.softplus(-log_odds_ratio)


@rule(reference=False)
def cpo(
    p: Pairs,
    *,
    beta: Scale = 0.1,
    nll_weight: Annotated[float, "weight of the chosen answer's negative log-likelihood", {"ge": 0}] = 1.0,
    nll: Annotated[
        Literal["summed", "averaged"], "that likelihood: summed over the answer's tokens (the paper), or averaged (TRL)"
    ] = "averaged",
) -> Tensor:
    """CPO: -log sigma(beta (log pi(y_w) - log pi(y_l))) and the likelihood of the chosen answer (arXiv:2401.08417 eq. 5).

    DPO with a uniform reference: half the computation, and the likelihood holds the model near the chosen answers. For chosen answers
    that are good demonstrations (translations, in the paper).
    """
    likelihood = p.chosen if nll == "summed" else p.chosen / p.chosen_len
    return F.softplus(-beta * (p.chosen - p.rejected)) - nll_weight * likelihood


@rule(reference=True)
def fdpo(
    p: Pairs,
    *,
    beta: Beta = 0.1,
    divergence: Annotated[
        Literal["forward-kl", "js", "alpha", "chi2"], "what holds the policy near the reference, in the place of the reverse KL"
    ] = "js",
    alpha: Annotated[float, "of the alpha-divergence: near 0 it is the reverse KL, at 1 the forward KL", {"gt": 0, "le": 1}] = 0.5,
) -> Tensor:
    """DPO under another divergence: -log sigma(beta (f'(u_w) - f'(u_l))), u = pi / pi_ref (arXiv:2309.16240 eq. 8).

    f' is -1/u (forward KL), log(2u / (1 + u)) (Jensen-Shannon), (1 - u^-alpha) / alpha, or u + log u (chi-squared and KL,
    chi-PO, arXiv:2407.13399). Forward ones keep the variety of the reference; chi2 punishes going far where data are thin.
    """

    def slope(log_u: Tensor) -> Tensor:
        near = log_u.clamp(-_FAR, _FAR)
        if divergence == "forward-kl":
            return -(-near).exp()
        if divergence == "js":
            return math.log(2) + F.logsigmoid(log_u)
        return log_u + near.exp() if divergence == "chi2" else -(-alpha * near).expm1() / alpha

    return F.softplus(-beta * (slope(p.chosen - p.ref_chosen) - slope(p.rejected - p.ref_rejected)))


@rule(reference=True, listwise=True)
def pldpo(r: Rankings, *, beta: Beta = 0.1) -> Tensor:
    """DPO on whole rankings: their Plackett-Luce likelihood, -sum_k log(e^s_k / sum_(j >= k) e^s_j), s = beta log pi / pi_ref
    (arXiv:2305.18290, app. A.3).

    For rankings of several answers by one judge, of which each place was a choice among the rest. Of two answers it is DPO.
    """
    s, n = beta * (r.logp - r.ref_logp), len(r.record)
    rest = (r.record[:, None] == r.record) & torch.ones(n, n, dtype=torch.bool, device=s.device).triu()
    passed = torch.where(rest, s, -torch.inf).logsumexp(1) - s
    return s.new_zeros(int(r.record.max()) + 1).index_add(0, r.record, passed)


def _per_token_margin(p: Pairs) -> Tensor:
    """The margin of log-ratios that are averaged over each answer's tokens."""
    return (p.chosen - p.ref_chosen) / p.chosen_len - (p.rejected - p.ref_rejected) / p.rejected_len


def _below_one(log_p: Tensor) -> Tensor:
    """A log-probability that is at most the largest below 0, so that the odds are finite."""
    return log_p.clamp(max=-torch.finfo(log_p.dtype).eps)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0; of two forms the one that keeps its digits, changing at -ln 2."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())
