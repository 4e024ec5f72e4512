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


# ---------------------------------------------------------------- without a value model: answers to one prompt compared with each other


@torch.no_grad()
def baseline(reward: Tensor, group: Tensor, how: str = "group", weight: Tensor | None = None) -> Tensor:
    """What is subtracted from an answer's reward.

    Args:
        reward: [n] one number per answer.
        group: [n] int64 from 0 on: answers to one prompt have one number.
        how: "group" the mean of the group (arXiv:2402.03300); "leave-one-out" the mean of the others in it (arXiv:2402.14740), so that
            r - b = n / (n - 1) (r - mean), and an answer alone in its group is its own baseline; "none" 0.
        weight: [n] how often each answer was drawn, or its probability; None: once.

    Returns:
        [n]
    """
    if how == "none":
        return torch.zeros_like(reward)
    w = torch.ones_like(reward) if weight is None else weight
    total, mass = _sums(w * reward, group), _sums(w, group)
    if how == "group":
        return total / mass
    others = mass - w
    return torch.where(others > 0, (total - w * reward) / torch.where(others > 0, others, 1), reward)


@torch.no_grad()
def group_std(reward: Tensor, group: Tensor, *, unbiased: bool = False, weight: Tensor | None = None) -> Tensor:
    """[n] the standard deviation of the rewards of each answer's group: over n, or over n - 1 if `unbiased` (0 for one answer alone).

    The publications do not say which; of [1, 0, 0, 0] the standardised first is 1.732 or 1.5. Arguments as of `baseline`.
    """
    w = torch.ones_like(reward) if weight is None else weight
    mass = _sums(w, group)
    squares = _sums(w * (reward - _sums(w * reward, group) / mass).square(), group)
    return (squares / ((mass - 1).clamp(min=1) if unbiased else mass)).sqrt()


def standardised(x: Tensor, std: Tensor, floor: float) -> Tensor:
    """x / std, and 0 where std < floor: a group whose rewards differ by rounding says nothing, and 1 / std would make it say the most."""
    return torch.where(std < floor, 0.0, x / std.clamp(min=floor))


def to_go(x: Tensor) -> Tensor:
    """[T] -> [T]: the sum from each token on."""
    return x.flip(0).cumsum(0).flip(0)


def _sums(x: Tensor, group: Tensor) -> Tensor:
    """[n] -> [n]: for each, the sum over its group."""
    return x.new_zeros(int(group.max()) + 1).index_add(0, group, x)[group]
