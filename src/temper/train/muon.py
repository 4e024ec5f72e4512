"""Muon: the hidden matrices move along the orthogonalised memory of their gradients, everything else by AdamW. Floor 3.

M_t = μ M_(t-1) + (1 - μ) G_t                                        (the memory)
W_t = (1 - η λ) W_(t-1) - η 0.2 sqrt(max(rows, columns)) O_t         O_t: the nearest semi-orthogonal matrix to (1 - μ) G_t + μ M_t

(Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; arXiv:2502.16982, section 2). Every direction of a
matrix moves by as much, also those that few examples ask for: rare facts are learned sooner (arXiv:2509.26030), and batches may be
larger. With the factor of eq. 4 there an entry moves by about as much as AdamW moves one, so both share a learning rate. O_t comes
from Newton and Schulz's iteration with the authors' quintic, after which the singular values lie in about [.7, 1.2].

torch.optim.Muon computes it matrix by matrix in bfloat16: on a CPU that takes three times as long, and what it rounds away would make
two ranks differ from one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from temper.train import ranks, shard

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


def orthogonal(x: Tensor) -> Tensor:
    """x [n, r, c] -> about U Vᵀ of each matrix's singular value decomposition U S Vᵀ; a matrix of zeros stays one."""
    a, b, c = QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    y = x if wide else x.mT
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=b, alpha=c), y, beta=a)
    return y if wide else y.mT


class Muon(torch.optim.AdamW):
    """AdamW but for the groups marked "muon". Their matrices are shared out among the ranks."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            found = super().step(closure)
        finally:
            self.param_groups = groups
        moved = [(group, p) for group in groups if group["muon"] for p in group["params"] if p.grad is not None]
        for (group, p), update in zip(moved, _updates([self._remembered(p) for group, p in moved]), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard.like(update, p), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)
        return found

    def _remembered(self, p: nn.Parameter) -> Tensor:
        """The gradient, looking ahead along its memory (Nesterov); whole on every rank."""
        grad, state = p.grad, self.state[p]
        assert grad is not None
        if not state:
            state |= {"step": torch.zeros(()), "memory": torch.zeros_like(p)}
        state["step"] += 1
        state["memory"].lerp_(grad, 1 - MOMENTUM)
        return shard.full(grad.lerp(state["memory"], MOMENTUM))


def _updates(gradients: list[Tensor]) -> list[Tensor]:
    """Each of the matrices made orthogonal: those of one shape at once, each on one rank."""
    if not gradients:
        return []
    mine = ranks.share([g.numel() * min(g.shape) for g in gradients])
    flat = torch.zeros(sum(g.numel() for g in gradients)).to(gradients[0])
    out = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    for shape in dict.fromkeys(gradients[i].shape for i in mine):
        alike = [i for i in mine if gradients[i].shape == shape]
        for i, update in zip(alike, orthogonal(torch.stack([gradients[i] for i in alike])), strict=True):
            out[i].copy_(update)
    ranks.sum_tensor(flat)
    return out
