"""Estimators of KL(policy || reference) from samples of the policy, and the controller of its coefficient. Floor 1: torch only.

With l = log pi - log pi_ref of a sampled token or sequence (Schulman, "Approximating KL divergence", 2020):

    k1 = l              unbiased, of either sign      as a loss: gradient 0 on average, no force at all
    k2 = l^2 / 2        biased, >= 0                  as a loss: exactly the gradient of KL(pi || pi_ref)
    k3 = e^-l - 1 + l   unbiased, >= 0                as a loss: the gradient of KL(pi_ref || pi), the forward KL

As a loss means differentiated through `logp` at samples that are data (arXiv:2501.03262, app. B.1). In a reward use k1. The KL of a
sequence is the sum of k1 over its tokens: report its mean over answers with an interval, neither clamped nor divided by length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_SWING = 0.2  # the largest relative error the controller answers to (arXiv:1909.08593, sec. 2.2)


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """l: unbiased, noisy, of either sign. Any shape -> the same shape."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """l^2 / 2: biased and never negative. Any shape -> the same shape."""
    return (logp - ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """e^-l - 1 + l: unbiased and never negative; heavy-tailed where the policy is far away. Any shape -> the same shape."""
    log_ratio = ref_logp - logp
    return log_ratio.expm1() - log_ratio  # expm1: near l = 0, exp(-l) - 1 in float32 would be rounding noise


def slope(estimator: Callable[[Tensor, Tensor], Tensor], logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d estimator / d logp, as data: what the estimator in a loss pushes each token with. Any shape -> the same shape."""
    with torch.enable_grad():
        at = logp.detach().requires_grad_()
        return torch.autograd.grad(estimator(at, ref_logp.detach()).sum(), at)[0]


def adaptive_beta(beta: float, kl: float, target: float, rate: float = 0.1) -> float:
    """The next coefficient: beta (1 + rate clip(kl / target - 1, -0.2, 0.2))  (arXiv:1909.08593, sec. 2.2).

    Args:
        beta: the coefficient now.
        kl: measured KL of whole answers in nats (the sum over tokens, not their mean), mean over the rollout.
        target: the KL to hold, in the same unit.
        rate: the controller's gain per update. `horizon_rate` gives the other common form.
    """
    error = min(max(kl / target - 1, -_SWING), _SWING)
    return beta * (1 + rate * error)


def horizon_rate(n: int, horizon: int) -> float:
    """The gain per update of a controller set by its horizon: n answers per update over `horizon` answers."""
    return n / horizon
