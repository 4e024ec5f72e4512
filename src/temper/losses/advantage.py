"""Rewards per token, advantages, whitening: what a rollout turns into before it is a batch. Floor 1: torch only.

All of it is data to the loss: nothing here is differentiated.
"""

import torch
from torch import Tensor

from temper.losses.kl import k1


@torch.no_grad()
def kl_shaped_reward(score: Tensor | float, logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """r_t = -beta k1_t, and the answer's score on top at its last token (arXiv:1909.08593 eq. 2, spread over the tokens).

    Args:
        score: one number for the answer.
        logp, ref_logp: [T] of its tokens, end of turn included, under the policy that sampled them and under the reference.

    Returns:
        [T]
    """
    reward = -beta * k1(logp, ref_logp)
    reward[-1] += score
    return reward


@torch.no_grad()
def gae(reward: Tensor, value: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimate of one answer that has ended (arXiv:1506.02438 eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   V_{T+1} = A_{T+1} = 0

    Args:
        reward: [T]
        value: [T], V_t read *before* token t: at the position that predicts it.

    Returns:
        [T]. The returns are advantage + value, taken before any whitening.

    Raises:
        ValueError: the two have different lengths.
    """
    if reward.shape != value.shape or reward.dim() != 1:
        raise ValueError(f"gae: reward {list(reward.shape)} and value {list(value.shape)} must both be [T] of one answer")
    # Python floats: an answer of 40 tokens takes 16 us; indexing tensors takes 900 us.
    rewards, values, running, after = reward.tolist(), value.tolist(), 0.0, 0.0
    advantage = [0.0] * len(values)
    for t in range(len(values) - 1, -1, -1):
        running = rewards[t] + gamma * after - values[t] + gamma * lam * running
        advantage[t], after = running, values[t]
    return torch.tensor(advantage, dtype=value.dtype, device=value.device)


def whiten(x: Tensor, *, keep_mean: bool = False, unbiased: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all of x: give it the valid tokens only.

    Args:
        x: [n]
        keep_mean: add the mean back; for rewards, whose sign carries meaning (arXiv:2403.17031).
        unbiased: variance over n - 1 (TRL) instead of n (AlpacaFarm). One number alone then counts as having no variance.

    Returns:
        [n]
    """
    mean = x.mean()
    variance = (x - mean).square().sum() / max(x.numel() - int(unbiased), 1)
    white = (x - mean) * (variance + 1e-8).rsqrt()
    return white + mean if keep_mean else white
