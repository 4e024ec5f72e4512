"""What losses read off a model: hidden states, log-probs of tokens, scores. Floor 2.

No [T, vocabulary] tensor ever exists: the language-model head runs in chunks, only on the states that predict a wanted token, and the
backward pass computes each chunk again. Where the weights are known beforehand (pretraining, SFT), `weighted_nll` takes the gradient
in the forward pass and saves that second product. Log-probs are aligned as everywhere: logp of token t, read off hidden[previous[t]].
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from temper.forest import Forest, unroll
from temper.models import attention

CHUNK = 1 << 19  # logits at once: 2 MB in float32, which stays in a core's cache


def hidden(model: PreTrainedModel, forest: Forest) -> Tensor:
    """[T, d] final hidden states of the model's trunk, by the backend that was chosen when it was loaded."""
    backend = getattr(model, "forest_backend", None)
    if backend is None:
        raise RuntimeError("the model has no forest backend; load it with temper.models.load or call check_forest(model)")
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and forest.longest > window:
        raise ValueError(f"a path of {forest.longest} tokens for a model of {window}; shorten it")
    return hidden_by(model, forest, backend)


def hidden_by(model: PreTrainedModel, forest: Forest, backend: str) -> Tensor:
    """[T, d] under a named backend: flash, dense or rows (see `temper.models.attention`)."""
    with computing(model):
        if backend != "rows":
            return attention.trunk_states(model, forest, backend).to(_precision(model))
        if "rows" not in forest.cache:
            forest.cache["rows"] = unroll(forest)
        rows = forest.cache["rows"]
        extra = {"use_cache": False} if "use_cache" in inspect.signature(model.base_model.forward).parameters else {}
        states = attention.trunk(model)(input_ids=rows.ids, attention_mask=rows.mask.long(), **extra).last_hidden_state  # from position 0
        return states.flatten(0, 1)[rows.where].to(_precision(model))


def computing(model: PreTrainedModel) -> AbstractContextManager:
    """Within it the model's products are taken in its precision (`load_policy`); its weights stay what they are."""
    half = _precision(model) == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16) if half else nullcontext()


def slack(model: PreTrainedModel, exact: float, rounded: float) -> float:
    """What log-probs of the same tokens under the same weights may differ by: `exact` nats in float32, `rounded` in less."""
    return exact if _precision(model) in (torch.float32, torch.float64) else rounded


def _precision(model: PreTrainedModel) -> torch.dtype:
    return getattr(model, "precision", model.dtype)


def token_logp(model: PreTrainedModel, forest: Forest, *, temperature: float = 1.0, indices: Tensor | None = None) -> Tensor:
    """[n] float32 log-prob of the tokens `indices` [n], by default forest.learned; differentiable.

    Raises ValueError for a token that nothing precedes.
    """
    indices, sources = _wanted(forest, indices)
    return log_probs(model, hidden(model, forest)[sources], forest.tokens[indices], temperature=temperature)


def token_logp_entropy(
    model: PreTrainedModel, forest: Forest, *, temperature: float = 1.0, indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`token_logp`, and from the same pass the entropy [n] in nats of the distribution each token was drawn from, without gradient."""
    indices, sources = _wanted(forest, indices)
    states, head = hidden(model, forest)[sources], _head(model)
    logp, entropy = _LogProbs.apply(states, head.weight, head.bias, forest.tokens[indices], _final(model, temperature), True)
    return logp, entropy


def log_probs(model: PreTrainedModel, states: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """[n] float32 log-prob of tokens [n], each predicted by one of the states [n, d]; differentiable."""
    head = _head(model)
    return _LogProbs.apply(states, head.weight, head.bias, tokens, _final(model, temperature), False)[0]


def weighted_nll(model: PreTrainedModel, forest: Forest, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Σ -weight · logp over forest.learned, logp [n] without gradient) for weights [n] known beforehand, by default the
    targets.

    The same gradient as through `token_logp`, with three products of the head instead of four.
    """
    indices, sources = _wanted(forest, None)
    if weight is None:
        weight = forest.target[indices]
    if weight.shape != indices.shape:
        raise ValueError(f"{tuple(weight.shape)} weights for {len(indices)} learned tokens")
    states, head = hidden(model, forest)[sources], _head(model)
    return _WeightedNll.apply(
        states, head.weight, head.bias, forest.tokens[indices], weight.float(), _final(model, 1.0), torch.is_grad_enabled()
    )


def scalar(model: PreTrainedModel, forest: Forest, at: Tensor) -> Tensor:
    """[len(at)] float32 scores of a sequence-classification model with one label, read at the tokens `at`, say forest.last of answers."""
    states, score = hidden(model, forest)[at].float(), cast(Any, model.score)
    return F.linear(states, score.weight.float(), None if score.bias is None else score.bias.float()).squeeze(-1)


class Final(NamedTuple):
    """What a model does with the product of state and head: softcap · tanh(scale · x / softcap), if it has a softcap, / temperature."""

    scale: float
    softcap: float | None
    temperature: float


def _final(model: PreTrainedModel, temperature: float) -> Final:
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}; it must be positive")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Final(scale, getattr(config, "final_logit_softcapping", None), temperature)


def _wanted(forest: Forest, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the tokens, which states predict them)."""
    if indices is None:
        return forest.learned, forest.previous[forest.learned]
    sources = forest.previous[indices]
    if (sources < 0).any():
        raise ValueError(f"token {int(indices[sources < 0][0])} begins its path: nothing predicts it")
    return indices, sources


class Head(NamedTuple):
    """The language-model head, in the precision of the states that it is given."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]


def _head(model: PreTrainedModel) -> Head:
    head, kind = model.get_output_embeddings(), _precision(model)
    if head is None:
        raise TypeError(f"{type(model).__name__} has no language-model head")
    return Head(head.weight.to(kind), None if head.bias is None else head.bias.to(kind))


def _logits(x: Tensor, w: Tensor, b: Tensor | None, final: Final) -> Tensor:
    """[c, V] float32."""
    z = F.linear(x, w, b).float()
    if final.softcap is None:
        factor = final.scale / final.temperature
        return z if factor == 1.0 else z.mul_(factor)
    return z.mul_(final.scale / final.softcap).tanh_().mul_(final.softcap / final.temperature)


def _through(dz: Tensor, z: Tensor | None, final: Final) -> Tensor:
    """dz [c, V], the gradient of the logits z, taken back to the product of state and head; in place."""
    if z is None:  # no softcap
        factor = final.scale / final.temperature
        return dz if factor == 1.0 else dz.mul_(factor)
    squashed = z * (final.temperature / final.softcap)  # type: ignore[operator]
    return dz.mul_((1 - squashed.square_()).mul_(final.scale / final.temperature))


def _chunks(n: int, vocabulary: int) -> list[slice]:
    rows = max(32, CHUNK // vocabulary)
    return [slice(at, min(at + rows, n)) for at in range(0, n, rows)]


class _Grads:
    """Collects the gradients of states, head and bias over chunks; those nobody needs stay None."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, needed: tuple[bool, ...]) -> None:
        self.x, self.w = x, w
        self.dx = torch.empty_like(x) if needed[0] else None
        self.dw = torch.zeros_like(w, dtype=torch.float32) if needed[1] else None
        self.db = torch.zeros_like(b, dtype=torch.float32) if b is not None and needed[2] else None

    def add(self, at: slice, dz: Tensor) -> None:
        """dz [c, V] float32: the gradient of the chunk's product of state and head."""
        if self.db is not None:
            self.db += dz.sum(0)
        dz = dz.to(self.x.dtype)
        if self.dx is not None:
            torch.mm(dz, self.w, out=self.dx[at])
        if self.dw is not None:
            if self.x.dtype == torch.float32:
                self.dw.addmm_(dz.t(), self.x[at])
            else:
                self.dw += dz.t() @ self.x[at]


class _LogProbs(torch.autograd.Function):
    """(x [n, d], head weight [V, d], bias [V] or None, tokens [n]) -> logp [n], entropy [n] or empty; logits computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, tokens: Tensor, final: Final, entropy: bool) -> tuple[Tensor, Tensor]:
        logp = x.new_empty(len(x), dtype=torch.float32)
        lse, spread = torch.empty_like(logp), torch.empty_like(logp if entropy else logp[:0])
        for at in _chunks(len(x), len(w)):
            z = _logits(x[at], w, b, final)
            lse[at] = z.logsumexp(-1)
            logp[at] = z.gather(-1, tokens[at, None]).squeeze(-1) - lse[at]
            if entropy:
                z.sub_(lse[at, None])  # log-probs: lse - Σ p·z would cancel where logits are large
                spread[at] = -(z.exp() * z).sum(-1)
        ctx.save_for_backward(x, w, b, tokens, lse)
        ctx.final = final
        ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, tokens, lse = ctx.saved_tensors
        grad, final = grads[0].float(), ctx.final
        out = _Grads(x, w, b, ctx.needs_input_grad)
        for at in _chunks(len(x), len(w)):
            z = _logits(x[at], w, b, final)
            dz = z.sub(lse[at, None]).exp_().mul_(-grad[at, None]) if final.softcap else z.sub_(lse[at, None]).exp_().mul_(-grad[at, None])
            dz.scatter_add_(1, tokens[at, None], grad[at, None])
            out.add(at, _through(dz, z if final.softcap else None, final))
        dw = None if out.dw is None else out.dw.to(w.dtype)
        db = None if out.db is None or b is None else out.db.to(b.dtype)
        return out.dx, dw, db, None, None, None


class _WeightedNll(torch.autograd.Function):
    """(x [n, d], w [V, d], b, tokens [n], weight [n]) -> Σ -weight · logp, and logp [n]; the gradient is taken on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, tokens: Tensor, weight: Tensor, final: Final, learn: bool
    ) -> tuple[Tensor, Tensor]:
        needed = tuple(learn and n for n in ctx.needs_input_grad)
        out = _Grads(x, w, b, needed)
        logp = x.new_empty(len(x), dtype=torch.float32)
        for at in _chunks(len(x), len(w)):
            z = _logits(x[at], w, b, final)
            p = torch.log_softmax(z, -1)
            logp[at] = p.gather(-1, tokens[at, None]).squeeze(-1)
            if learn:
                dz = p.exp_().mul_(weight[at, None])
                dz.scatter_add_(1, tokens[at, None], -weight[at, None])
                out.add(at, _through(dz, z if final.softcap else None, final))
        ctx.save_for_backward(out.dx, out.dw, out.db)
        ctx.types = w.dtype, None if b is None else b.dtype
        ctx.mark_non_differentiable(logp)
        return -(weight * logp).sum(), logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        grad = grads[0]
        return (
            None if dx is None else dx * grad.to(dx.dtype),
            None if dw is None else (dw * grad).to(ctx.types[0]),
            None if db is None else (db * grad).to(ctx.types[1]),
            None,
            None,
            None,
            None,
        )
