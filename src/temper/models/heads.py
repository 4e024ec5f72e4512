"""What losses read off a model: hidden states, log-probs of tokens, their entropy and divergence, scores. Floor 2.

No [T, vocabulary] tensor ever exists: the language-model head runs in chunks, only on the states that predict a wanted token, and the
backward pass computes each chunk again. Where the weights are known beforehand (pretraining, SFT), `weighted_nll` takes the gradient
in the forward pass and saves that second product. Log-probs are aligned as everywhere: logp of token t, read off hidden[previous[t]].
Logits, their sums and the gradients of the head's weights are float32 whatever the model's precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from temper.config import UserError
from temper.forest import Forest, unroll
from temper.models import adapters, attention

CHUNK = 1 << 20  # logits at once: 4 MB in float32, about what stays in a core's cache
ROWS = {"cpu": 256}  # states at once at the least: with fewer, adding to the gradient of the weights takes longer than computing it
MANY = 2048  # the same on devices that compute so much faster than they read


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
            return attention.trunk_states(model, forest, backend).to(precision(model))
        if "rows" not in forest.cache:
            forest.cache["rows"] = unroll(forest)
        rows = forest.cache["rows"]
        states = attention.row_states(model, rows.ids, rows.mask)
        return states.flatten(0, 1)[rows.where].to(precision(model))


@contextmanager
def computing(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's products are taken in its precision (`load_policy`), with its own adapter at work; its weights stay what
    they are."""
    half = precision(model) == torch.bfloat16
    with adapters.acting(model), torch.autocast(model.device.type, torch.bfloat16) if half else nullcontext():
        yield


def slack(model: PreTrainedModel, exact: float, rounded: float) -> float:
    """What log-probs of the same tokens under the same weights may differ by: `exact` nats in float32, `rounded` in less."""
    return exact if precision(model) in (torch.float32, torch.float64) else rounded


def precision(model: PreTrainedModel) -> torch.dtype:
    """What the model's products are taken in, and so its states."""
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
    head = _head(model, hidden(model, forest)[sources], temperature)
    logp, entropy = _LogProbs.apply(head.final, forest.tokens[indices], True, head.bias, *head.factors)
    return logp, entropy


@torch.no_grad()
def token_top(
    model: PreTrainedModel, forest: Forest, k: int, *, temperature: float = 1.0, indices: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probs, tokens), each [n, k]: the k likeliest tokens at the places of `indices`, likeliest first; without gradient."""
    indices, sources = _wanted(forest, indices)
    head = _head(model, hidden(model, forest)[sources], temperature)
    logp = torch.empty(len(sources), k, dtype=torch.float32, device=sources.device)
    tokens = torch.empty_like(logp, dtype=torch.int64)
    for at, z in _logits(head):
        top = z.topk(k)
        tokens[at] = top.indices
        logp[at] = top.values - z.logsumexp(-1, keepdim=True)
    return logp, tokens


def token_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    forest: Forest,
    *,
    forward: bool = False,
    temperature: float = 1.0,
    indices: Tensor | None = None,
) -> Tensor:
    """[n] float32 KL(policy || reference) in nats of the whole distributions at the places of `indices`; with `forward`,
    KL(reference || policy). Differentiable in the policy; the reference gets no gradient.

    Raises UserError when their vocabularies differ in size.
    """
    indices, sources = _wanted(forest, indices)
    with torch.no_grad():
        theirs = _head(reference, hidden(reference, forest)[sources], temperature)
    ours = _head(policy, hidden(policy, forest)[sources], temperature)
    if ours.vocabulary != theirs.vocabulary:
        raise UserError(
            f"a policy with {ours.vocabulary} tokens against a reference with {theirs.vocabulary}: "
            "their distributions cannot be compared; take a reference with the policy's tokenizer"
        )
    return _Divergence.apply(ours.final, theirs, forward, ours.bias, *ours.factors)


def log_probs(model: PreTrainedModel, states: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """[n] float32 log-prob of tokens [n], each predicted by one of the states [n, d]; differentiable."""
    head = _head(model, states, temperature)
    return _LogProbs.apply(head.final, tokens, False, head.bias, *head.factors)[0]


@torch.no_grad()
def logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """[n, V] float32 logits of the states [n, d], as the model itself computes them; without gradient."""
    head = _head(model, states, 1.0)
    out = states.new_empty(len(states), head.vocabulary, dtype=torch.float32)
    for at, z in _logits(head):
        out[at] = z
    return out


def weighted_nll(
    model: PreTrainedModel, forest: Forest, weight: Tensor | None = None, *, smoothing: float = 0.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(Σ -weight · logp over forest.learned, logp [n] without gradient) for weights [n] known beforehand, by default the
    targets.

    The same gradient as through `token_logp`, with three products of the head instead of four. smoothing: this share of each
    target is spread evenly over the vocabulary (label smoothing, arXiv:1512.00567, sec. 7); the logp returned is without it.
    """
    indices, sources = _wanted(forest, None)
    if weight is None:
        weight = forest.target[indices]
    if weight.shape != indices.shape:
        raise ValueError(f"{tuple(weight.shape)} weights for {len(indices)} learned tokens")
    head = _head(model, hidden(model, forest)[sources], temperature)
    tokens, learn = forest.tokens[indices], torch.is_grad_enabled()
    return _WeightedNll.apply(head.final, tokens, weight.float(), smoothing, learn, head.bias, *head.factors)


def scalar(model: PreTrainedModel, forest: Forest, at: Tensor) -> Tensor:
    """[len(at)] float32 scores of a sequence-classification model, read at the tokens `at`, say forest.last of answers; with several
    labels [len(at), labels]."""
    return score_of(model, hidden(model, forest)[at])


def score_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """[n] or [n, labels] float32 scores of final states [n, d]."""
    states = states.float()
    with adapters.acting(model):
        score, added = adapters.linear(model.score)
    if added:
        raise UserError("an adapter on the layer `score`, which is small and trained as a whole; leave it out of --lora-targets")
    return F.linear(states, score.weight.float(), None if score.bias is None else score.bias.float()).squeeze(-1)


class Final(NamedTuple):
    """What a model does with the product of state and head: softcap · tanh(scale · x / softcap), if it has a softcap, / temperature."""

    scale: float
    softcap: float | None
    temperature: float


class Head(NamedTuple):
    """Logits before `final`: Σ x_i w_iᵀ + bias, over states and head weight, and over what each adapter adds."""

    final: Final
    bias: Tensor | None
    factors: tuple[Tensor, ...]  # x_0 [n, d], w_0 [V, d], x_1 [n, r], w_1 [V, r], ...

    @property
    def vocabulary(self) -> int:
        return len(self.factors[1])

    def multiplied(self) -> list[Tensor]:
        """The factors with weights in the precision of their states, where that is another one (float32 masters, say)."""
        return [x if i % 2 == 0 else x.to(self.factors[i - 1].dtype) for i, x in enumerate(self.factors)]


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


def _head(model: PreTrainedModel, states: Tensor, temperature: float) -> Head:
    layer: Any = model.get_output_embeddings()
    if layer is None:
        raise TypeError(f"{type(model).__name__} has no language-model head")
    with adapters.acting(model):
        plain, low_rank = adapters.linear(layer)
    factors = [states, plain.weight]
    for down, up, scale in low_rank:
        factors += [down(states) * scale, up]
    return Head(_final(model, temperature), plain.bias, tuple(factors))


def _chunks(n: int, vocabulary: int, device: str) -> list[slice]:
    rows = max(ROWS.get(device, MANY), CHUNK // vocabulary)
    return [slice(at, min(at + rows, n)) for at in range(0, n, rows)]


def _logits(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """(which states, their logits [c, V] float32), chunk by chunk. A chunk overwrites the one before, and may be written on."""
    x, w, *more = head.multiplied()
    room = None
    for at in _chunks(len(x), len(w), x.device.type):
        if x.dtype == torch.float32:
            if room is None:
                room = x.new_empty(at.stop - at.start, len(w))
            z = torch.mm(x[at], w.t(), out=room[: at.stop - at.start])
        else:
            z = _product(x[at], w.t())
        for low, up in zip(more[::2], more[1::2], strict=True):
            z += _product(low[at], up.t())
        if head.bias is not None:
            z += head.bias
        scale, softcap, temperature = head.final
        if softcap is not None:
            z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
        elif scale != temperature:
            z.mul_(scale / temperature)
        yield at, z


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in float32; where the device can, it is not rounded in between."""
    if x.dtype != torch.float32 and x.is_cuda:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x, y).float()


def _normalise(z: Tensor) -> Tensor:
    """Logits [c, V] become log-probs, in place."""
    return z.sub_(z.logsumexp(-1, keepdim=True))


class _Grads:
    """Collects the gradients of a head's factors and bias over chunks; those nobody needs stay None."""

    def __init__(self, head: Head, needed: Sequence[bool]) -> None:
        self.head, self.multiplied = head, head.multiplied()
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if head.bias is not None and needed[0] else None
        self.factors = [  # those of the weights are sums over chunks
            None if not wanted else torch.empty_like(x) if i % 2 == 0 else torch.zeros_like(x, dtype=torch.float32)
            for i, (x, wanted) in enumerate(zip(head.factors, needed[1:], strict=True))
        ]

    def add(self, at: slice, dz: Tensor, z: Tensor) -> None:
        """dz [c, V]: the gradient of the chunk's logits. z: the logits, needed under a softcap only. Both are written on."""
        scale, softcap, temperature = self.head.final
        if softcap is not None:
            dz.mul_(z.mul_(temperature / softcap).square_().neg_().add_(1).mul_(scale / temperature))
        elif scale != temperature:
            dz.mul_(scale / temperature)
        if self.bias is not None:
            self.bias += dz.sum(0)
        for i in range(0, len(self.factors), 2):
            (x, w), (dx, dw) = self.multiplied[i : i + 2], self.factors[i : i + 2]
            if dx is not None:
                torch.mm(dz.to(w.dtype), w, out=dx[at])
            if dw is not None and x.dtype == torch.float32:
                dw.addmm_(dz.t(), x[at])
            elif dw is not None:
                dw += _product(dz.to(x.dtype).t(), x[at])

    @property
    def kinds(self) -> list[torch.dtype | None]:
        """The precision of what each gradient belongs to."""
        return [None if x is None else x.dtype for x in (self.head.bias, *self.head.factors)]

    def given(self) -> list[Tensor | None]:
        """Those of bias and factors, in that precision."""
        return [None if g is None else g.to(kind) for g, kind in zip((self.bias, *self.factors), self.kinds, strict=True)]


class _LogProbs(torch.autograd.Function):
    """(final, tokens [n], whether entropy is wanted, bias, *factors) -> logp [n], entropy [n] or [0]; backward computes logits again."""

    @staticmethod
    def forward(ctx: Any, final: Final, tokens: Tensor, entropy: bool, bias: Tensor | None, *factors: Tensor) -> tuple[Tensor, Tensor]:
        head = Head(final, bias, factors)
        logp = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
        lse, spread = torch.empty_like(logp), torch.empty_like(logp if entropy else logp[:0])
        for at, z in _logits(head):
            most = z.amax(-1, keepdim=True)
            z.sub_(most)
            picked = z.gather(-1, tokens[at, None])
            p = z.exp() if entropy else z.exp_()
            total = p.sum(-1, keepdim=True)
            logp[at] = (picked - total.log()).squeeze(-1)
            lse[at] = (most + total.log()).squeeze(-1)
            if entropy:
                spread[at] = (total.log() - p.mul_(z).sum(-1, keepdim=True) / total).squeeze(-1)  # neither is negative: nothing cancels
        ctx.save_for_backward(tokens, lse, bias, *factors)
        ctx.final = final
        ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tokens, lse, bias, *factors = ctx.saved_tensors
        head, grad = Head(ctx.final, bias, tuple(factors)), grads[0].float()
        out = _Grads(head, ctx.needs_input_grad[3:])
        for at, z in _logits(head):
            dz = z.sub(lse[at, None]) if head.final.softcap else z.sub_(lse[at, None])
            dz.exp_().mul_(-grad[at, None]).scatter_add_(1, tokens[at, None], grad[at, None])
            out.add(at, dz, z)
        return None, None, None, *out.given()


class _WeightedNll(torch.autograd.Function):
    """(final, tokens [n], weight [n], smoothing, whether a gradient is wanted, bias, *factors) -> Σ -weight · logp, and logp [n]; the
    gradient is taken on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, final: Final, tokens: Tensor, weight: Tensor, smoothing: float, learn: bool, bias: Tensor | None, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        head = Head(final, bias, factors)
        out = _Grads(head, [learn and needed for needed in ctx.needs_input_grad[5:]])
        logp = torch.empty(len(tokens), dtype=torch.float32, device=tokens.device)
        even = torch.zeros_like(logp)  # mean log-prob over the vocabulary
        share = smoothing / head.vocabulary
        for at, z in _logits(head):
            kept = z.clone() if final.softcap and learn else z
            most = z.amax(-1, keepdim=True)
            z.sub_(most)
            picked = z.gather(-1, tokens[at, None])
            mean = z.mean(-1, keepdim=True) if smoothing else None
            total = z.exp_().sum(-1, keepdim=True)
            logp[at] = (picked - total.log()).squeeze(-1)
            if mean is not None:
                even[at] = (mean - total.log()).squeeze(-1)
            if learn:
                w = weight[at, None]
                dz = z.mul_(w / total)
                if smoothing:
                    dz.sub_(w * share)
                out.add(at, dz.scatter_add_(1, tokens[at, None], w * (smoothing - 1)), kept)
        ctx.save_for_backward(out.bias, *out.factors)
        ctx.kinds = out.kinds
        ctx.mark_non_differentiable(logp)
        return -(weight * ((1 - smoothing) * logp + smoothing * even if smoothing else logp)).sum(), logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        scaled = (None if g is None else (g * grads[0]).to(kind) for g, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True))
        return None, None, None, None, None, *scaled


class _Divergence(torch.autograd.Function):
    """(final, the reference's head, forward, bias, *factors) -> KL [n]; backward computes the logits of both again.

    With p the policy and q the reference, d KL(p || q) / dz = p (log p - log q - KL), and d KL(q || p) / dz = p - q.
    """

    @staticmethod
    def forward(ctx: Any, final: Final, reference: Head, forward: bool, bias: Tensor | None, *factors: Tensor) -> Tensor:
        head = Head(final, bias, factors)
        kl = torch.empty(len(factors[0]), dtype=torch.float32, device=factors[0].device)
        for (at, p), (_, q) in zip(_logits(head), _logits(reference), strict=True):
            p, q = _normalise(p), _normalise(q)
            kl[at] = (q.exp() * q.sub_(p)).sum(-1) if forward else (p.exp() * p.sub_(q)).sum(-1)
        ctx.save_for_backward(kl, bias, *factors)
        ctx.final, ctx.reference, ctx.forward = final, reference, forward
        return kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        kl, bias, *factors = ctx.saved_tensors
        head = Head(ctx.final, bias, tuple(factors))
        out = _Grads(head, ctx.needs_input_grad[3:])
        for (at, p), (_, q) in zip(_logits(head), _logits(ctx.reference), strict=True):
            z = p.clone() if head.final.softcap else p
            p, q = _normalise(p), _normalise(q)
            if ctx.forward:
                dz = p.exp_().sub_(q.exp_())
            else:
                dz = p.exp().mul_(p.sub_(q).sub_(kl[at, None]))
            out.add(at, dz.mul_(grads[0][at, None]), z)
        return None, None, None, *out.given()
