"""The clipped losses of policy and value in PPO. Per token, unreduced; any shape -> the same shape. Floor 1: torch only."""

from math import inf

import torch
from torch import Tensor

_FAR = 60.0  # log-ratios beyond this are cut: exp overflows float32 at 88, and 0 * inf in the backward pass is NaN


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """pi(y_t) / pi_old(y_t). At the first minibatch after a rollout it is exactly 1."""
    return (logp - old_logp).clamp(max=_FAR).exp()


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> Tensor:
    """PPO's pessimistic bound (arXiv:1707.06347 eq. 7): max(-A rho, -A clip(rho, 1 - low, 1 + high)), rho = pi / pi_old.

    Clipping removes the incentive to go further; it does not bound the change.

    Args:
        logp: under the policy now; the only argument with a gradient.
        old_logp: under the policy that sampled, at the same temperature.
        advantage: data.
        low, high: the clip; high > low is DAPO's clip-higher (arXiv:2503.14476).
        dual: c > 1 bounds the loss of a token with A < 0 by c |A| (dual clip, arXiv:1912.09729); 3 is usual.
    """
    rho = ratio(logp, old_logp)
    loss = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - low, 1 + high))
    if dual is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)


def sequence_logp(logp: Tensor, old_logp: Tensor, sequence: Tensor) -> Tensor:
    """Log-probs whose ratio to old_logp is that of their sequence, s_i = exp(mean_t log rho_t), with each token's own gradient times s_i
    (GSPO-token, arXiv:2507.18071 eq. 14; with one advantage per sequence it is GSPO, eq. 5).

    Args:
        logp, old_logp: [n], as of `ratio`.
        sequence: [n] int64 from 0 on, which sequence a token belongs to.

    Returns:
        [n] to be given to `clipped_surrogate` in the place of logp.
    """
    gap = (logp - old_logp).detach()
    count = gap.new_zeros(int(sequence.max()) + 1 if len(sequence) else 0)
    mean = count.index_add(0, sequence, gap) / count.index_add(0, sequence, torch.ones_like(gap)).clamp(min=1)
    return old_logp + mean[sequence] + (logp - logp.detach())


def clipped(logp: Tensor, old_logp: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> Tensor:
    """Where the clip takes the gradient away: A > 0 and rho > 1 + high, or A < 0 and rho < 1 - low or > dual -> bool."""
    rho = ratio(logp, old_logp)
    return ((advantage > 0) & (rho > 1 + high)) | ((advantage < 0) & ((rho < 1 - low) | (rho > (dual or inf))))


def clipped_value(value: Tensor, old_value: Tensor, returns: Tensor, *, clip: float = 0.2) -> Tensor:
    """0.5 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2)  (arXiv:2403.17031).

    Args:
        value: predicted now; the only argument with a gradient.
        old_value: predicted when the answer was sampled.
        returns: advantage + old value, before whitening.
        clip: how far a value may move with effect, in units of reward; `inf` leaves the plain squared error.
    """
    near = torch.clamp(value, old_value - clip, old_value + clip)
    return torch.maximum((value - returns).square(), (near - returns).square()) / 2
