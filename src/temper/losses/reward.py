"""Losses of reward models. Floor 1: torch only."""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, soft: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """Bradley-Terry negative log-likelihood of which of two answers is better (arXiv:2203.02155 eq. 1 with K = 2).

        -p log sigma(D - m) - (1 - p) log sigma(-D - m) + eta (r_w + r_l)^2,   D = r_w - r_l

    Args:
        chosen, rejected: [N] the scores r_w and r_l.
        margin: [N] m, by how much the better answer should win (arXiv:2307.09288); it counts for whichever answer is better. None = 0.
        soft: [N] p, the probability that `chosen` is the better one; a tie is 0.5. None = 1.
        centring: eta, pulls r_w + r_l to 0, which the likelihood leaves free (arXiv:2312.09244; 0.01 there).

    Returns:
        [N]
    """
    gap = chosen - rejected
    m = 0.0 if margin is None else margin
    loss = F.softplus(m - gap)
    if soft is not None:
        loss = soft * loss + (1 - soft) * F.softplus(m + gap)
    return loss + centring * (chosen + rejected).square() if centring else loss
