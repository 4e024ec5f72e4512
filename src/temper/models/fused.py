"""The parts of a block that only move memory, with less of it: RMS norms, gated linear units, rotary positions. Floor 2.

Transformers' modules stay what they are, with the same parameters; those that compute one of the formulas below, found by trying their
class on small random numbers, compute it in fewer passes and keep less for the backward pass: a norm its input and one number per
token, a gated unit its two inputs. In half precision, under autocast and while compiling they run as transformers wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 256  # at a time, so that what lies between two products stays in the cache


def fuse(model: nn.Module) -> None:
    """Let the model's norms and gated units compute so, where their formulas are these."""
    for module in model.modules():
        for kind in KINDS:
            usual: Any = type(module)
            activation: Any = type(getattr(module, "act_fn", None))
            if kind.looks(module) and _same(usual, kind, activation):
                module.__class__ = _fused(usual, kind)


def unfuse(model: nn.Module) -> None:
    """The modules as transformers wrote them."""
    for module in model.modules():
        if isinstance(module, KINDS):
            module.__class__ = type(module).__mro__[2]


@cache
def _fused(usual: type, kind: type) -> type:
    own = {"forward": kind.of(usual)} if kind is Rotary else {}
    return type(usual.__name__, (kind, usual), {"__module__": usual.__module__, **own})


@cache
def _same(usual: Any, kind: Any, activation: Any) -> bool:
    """Whether modules of this class compute the formula, on small random numbers."""
    if issubclass(usual, kind):
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            theirs, ours = kind.tried(usual, activation)
        except Exception:  # what a stranger's class may raise is not known; it stays as it is
            return False
        return all(torch.allclose(x, y, atol=1e-6) for x, y in zip(theirs, ours, strict=True))


def _usual(x: Tensor) -> bool:
    """Whether a module runs as transformers wrote it."""
    return x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()


def _empty(usual: Any) -> Any:
    """An object of the class without what its own constructor would make."""
    module = usual.__new__(usual)
    nn.Module.__init__(module)
    return module


class Norm:
    """y = w x / sqrt(mean(x^2) + eps) (arXiv:1910.07467, eq. 4)."""

    @staticmethod
    def looks(module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return hasattr(module, "variance_epsilon") and isinstance(weight, nn.Parameter) and weight.dim() == 1

    @staticmethod
    def tried(usual: Any, activation: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(theirs, ours) on the same numbers."""
        module, x = _empty(usual), torch.randn(3, 4)
        module.weight, module.variance_epsilon = nn.Parameter(torch.randn(4)), 1e-6
        return [usual.forward(module, x)], [Norm.compute(module, x)]

    @staticmethod
    def compute(module: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return cast(Tensor, _Norm.apply(x, module.weight, module.variance_epsilon))
        return (x * _scale(x, module.variance_epsilon)).mul_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _usual(x) else self.compute(self, x)  # type: ignore[misc]


def _scale(x: Tensor, eps: float) -> Tensor:
    """[..., 1] 1 / sqrt(mean(x^2) + eps), without a tensor of squares."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        g, x, scale = grads[0].reshape(-1, len(weight)), x.reshape(-1, len(weight)), scale.reshape(-1, 1)
        along = scale**3 / -len(weight)
        dx, dw = torch.empty_like(g, memory_format=torch.contiguous_format), torch.zeros_like(weight)
        for gi, xi, si, ai, out in zip(*(t.split(ROWS) for t in (g, x, scale, along, dx)), strict=True):
            gx = gi * xi
            dw.addmv_(gx.t(), si[:, 0])
            torch.mul(gi, weight, out=out).mul_(si).addcmul_(xi, (gx @ weight).unsqueeze(-1) * ai)
        return dx.view_as(grads[0]), dw, None


class Gated:
    """y = W (silu(gate x) * (up x)) (arXiv:2002.05202, eq. 6)."""

    @staticmethod
    def looks(module: Any) -> bool:
        return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))

    @staticmethod
    def tried(usual: Any, activation: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(theirs, ours) on the same numbers."""
        module, x = _empty(usual), torch.randn(3, 4)
        module.gate_proj, module.up_proj, module.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        module.act_fn = activation()
        return [usual.forward(module, x)], [Gated.compute(module, x)]

    @staticmethod
    def compute(module: Any, x: Tensor) -> Tensor:
        gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
        if not torch.is_grad_enabled():
            return cast(Tensor, down(F.silu(gate).mul_(up)))
        if type(down) is nn.Linear and down.bias is None:
            return cast(Tensor, _GatedDown.apply(gate, up, down.weight))
        return cast(Tensor, down(_Gate.apply(gate, up)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _usual(x) else self.compute(self, x)  # type: ignore[misc]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _backward(gate, up, grads[0].clone(memory_format=torch.contiguous_format), None)


class _GatedDown(torch.autograd.Function):
    """With the product that follows, whose input is computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, down)
        return F.linear(F.silu(gate).mul_(up), down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, down = ctx.saved_tensors
        inner = torch.empty_like(gate) if ctx.needs_input_grad[2] else None
        dgate, dup = _backward(gate, up, grads[0] @ down, inner)
        return dgate, dup, None if inner is None else grads[0].flatten(0, -2).t() @ inner.flatten(0, -2)


def _backward(gate: Tensor, up: Tensor, grad: Tensor, inner: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, the latter in the place of `grad`; inner: where silu(gate) * up is written."""
    dgate, dup = torch.empty_like(gate, memory_format=torch.contiguous_format), grad
    every = (gate, up, dgate, dup) + (() if inner is None else (inner,))
    for g, u, dg, du, *h in zip(*(t.flatten(0, -2).split(ROWS) for t in every), strict=True):
        silu = F.silu(g)
        if h:
            torch.mul(silu, u, out=h[0])
        torch.mul(du, u, out=dg)
        torch.ops.aten.silu_backward.grad_input(dg, g, grad_input=dg)
        du.mul_(silu)
    return dgate, dup


class Rotary:
    """q and k turned by their positions (arXiv:2104.09864, eq. 34): transformers' own attention, but for the function that turns them."""

    @staticmethod
    def looks(module: Any) -> bool:
        return "apply_rotary_pos_emb" in getattr(getattr(type(module).forward, "__code__", None), "co_names", ())

    @staticmethod
    def tried(usual: Any, activation: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(theirs, ours) on the same numbers."""
        turn = usual.forward.__globals__["apply_rotary_pos_emb"]
        q, k, angles = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8)  # halves that differ, too
        return turn(q, k, angles.cos(), angles.sin()), Rotary.turning(turn)(q, k, angles.cos(), angles.sin())

    @staticmethod
    def of(usual: Any) -> Any:
        f = usual.forward
        names = {**f.__globals__, "apply_rotary_pos_emb": Rotary.turning(f.__globals__["apply_rotary_pos_emb"])}
        out = FunctionType(f.__code__, names, f.__name__, f.__defaults__, f.__closure__)
        out.__kwdefaults__ = f.__kwdefaults__
        return out

    @staticmethod
    def turning(usual: Any) -> Any:
        def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
            if _usual(q) or cos.shape[-1] != q.shape[-1]:
                return cast(tuple[Tensor, Tensor], usual(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim))
            cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            if not torch.is_grad_enabled():
                return _turned(q, cos, sin, 1.0), _turned(k, cos, sin, 1.0)
            return cast(Tensor, _Turn.apply(q, cos, sin)), cast(Tensor, _Turn.apply(k, cos, sin))

        return turn


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin.roll(sin.shape[-1] // 2, -1), -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x cos + sign (-b, a) sin, where x = (a, b)."""
    half, out = x.shape[-1] // 2, torch.empty_like(x)
    a, b = slice(half), slice(half, None)
    torch.mul(x[..., a], cos[..., a], out=out[..., a]).addcmul_(x[..., b], sin[..., a], value=-sign)
    torch.mul(x[..., b], cos[..., b], out=out[..., b]).addcmul_(x[..., a], sin[..., b], value=sign)
    return out


KINDS = (Norm, Gated, Rotary)
