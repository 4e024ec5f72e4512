"""Attention over a packed forest, on unmodified Hugging Face models. Floor 2.

Registered with transformers as the attention implementation "forest". The trunk is called with the keyword `forest=`, which
transformers hands through to the attention of every layer; without it the implementation is plain SDPA, so `generate` works as ever.

Backends, which agree to 1e-5 in float32, in values and gradients:
    flash   CPU. The flash kernel on runs and branches (below), merged by log-sum-exp.
    dense   SDPA under a [T, T] mask: the oracle, and what runs on other devices.
    rows    for models whose attention cannot see the forest: one padded row per leaf, gathered back (`heads.hidden` unrolls).

A run is a segment followed by its first child, that one's first child, and so on. Its tokens are contiguous and each sees all that
come before it in the run, so one causal call serves the whole run; runs of similar length share a call, padded on the right, where
causality keeps the padding unseen. What remains are the subtrees of later children: all their tokens see the run up to where they
branch off, which is one unmasked call per branching, with its result merged into what these tokens have seen elsewhere. A pair costs
two causal pieces and one branching, a chain of process steps a single causal piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from temper.forest import Forest, dense_mask

BACKENDS = ("flash", "dense", "rows")

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_UNSEEN = 1e30  # log-sum-exp of padding: exp(score - 1e30) = 0 whatever the score


def attend(q: Tensor, k: Tensor, v: Tensor, forest: Forest, *, scale: float, backend: str, window: int | None = None) -> Tensor:
    """q [T, H, D], k [T, G, D], v [T, G, E] with G dividing H -> [T, H, E]: attention within each token's own path.

    window: a token sees only the last `window` tokens of its path, itself included; None is all of them.
    """
    if window is not None and window >= forest.longest:
        window = None
    if backend == "flash" and window is None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        if k.shape[1] < q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return _Flash.apply(q, k, v, layout(forest), scale)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mask = _mask(forest, window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] < q.shape[1])
    return out[0].transpose(0, 1)


class Branches(NamedTuple):
    """Unmasked calls whose queries are disjoint, and whose keys are too."""

    query: Tensor  # [P] token at each padded place
    query_pads: Tensor  # places that hold no token
    key: Tensor
    calls: list[tuple[slice, slice, int, Tensor | None]]  # places of the queries and of the keys, how many branchings, mask of the keys
    tokens: Tensor  # [m] the tokens that ask
    take: Tensor  # [m] their places
    keys: Tensor  # [j] the tokens that are seen
    keys_take: Tensor


class Layout(NamedTuple):
    """Index tensors of the flash backend; they depend on the forest only, so all layers and both directions share them."""

    run: Tensor | None  # [P] token at each padded place; None: the places are the tokens
    run_pads: Tensor
    calls: list[tuple[slice, int]]  # places and how many runs
    take: Tensor  # [T] the place of each token
    branches: list[Branches]


def layout(forest: Forest) -> Layout:
    """The forest's layout for the flash backend, computed once and kept with it."""
    if "layout" not in forest.cache:
        forest.cache["layout"] = _lay_out(forest)
    return forest.cache["layout"]


@torch.inference_mode(False)
def _lay_out(forest: Forest) -> Layout:
    parent, start, end, until = (x.numpy() for x in (forest.parent, forest.start, forest.end, forest.until))
    row = np.arange(forest.S)
    continues = parent == row - 1  # the first child of the segment before
    continues[0] = False
    head = np.maximum.accumulate(np.where(continues, 0, row))  # [S] the segment that begins the run
    heads = np.flatnonzero(~continues)
    length = np.diff(start[heads], append=forest.T)
    place, pads, groups = _pad(start[heads], length)
    identical = len(place) == forest.T and bool((place == np.arange(forest.T)).all())
    take = np.empty(forest.T, np.int64)
    valid = np.ones(len(place), bool)
    valid[pads] = False
    take[place[valid]] = np.flatnonzero(valid)

    # A level holds the branchings at one depth of runs that are the k-th of their run: queries and keys are disjoint within it.
    branching = np.unique(parent[heads][parent[heads] >= 0])
    above = np.where(parent[head] >= 0, head[parent[head]], -1)  # [S] head of the run that the own run branches off
    depth = np.zeros(forest.S, np.int64)
    at = above
    while (at >= 0).any():
        depth += at >= 0
        at = np.where(at >= 0, above[at], -1)
    run = head[branching]
    nth = np.arange(len(run)) - np.searchsorted(run, run)  # run is sorted: heads come in order
    branches = []
    for level in sorted(set(zip(depth[branching].tolist(), nth.tolist(), strict=True))):
        s = branching[(depth[branching] == level[0]) & (nth == level[1])]
        first = until[s + 1]  # the first child's subtree belongs to the run or to deeper branchings
        branches.append(_branches(first, until[s] - first, start[head[s]], end[s] - start[head[s]]))
    tensor = torch.from_numpy
    return Layout(None if identical else tensor(place), tensor(pads), [(p, n) for p, n, _ in groups], tensor(take), branches)


def _branches(query: np.ndarray, queries: np.ndarray, key: np.ndarray, keys: np.ndarray) -> Branches:
    """n branchings: the `queries` tokens from `query` on see the `keys` tokens from `key` on."""
    kind = _size(queries) * 1000 + _size(keys)
    parts: list[list[np.ndarray]] = [[], [], [], [], [], []]
    calls: list[tuple[slice, slice, int, Tensor | None]] = []
    asked = seen = 0
    for which in np.unique(kind):
        at = np.flatnonzero(kind == which)
        token, own = _rectangle(query[at], queries[at])
        other, shown = _rectangle(key[at], keys[at])
        mask = None
        if not shown.all():
            mask = torch.zeros(shown.shape).masked_fill_(~torch.from_numpy(shown), -torch.inf)[:, None, None, :]
        calls.append((slice(asked, asked + own.size), slice(seen, seen + shown.size), len(at), mask))
        for part, x in zip(parts, (token, own, other, shown), strict=False):
            part.append(x.ravel())
        asked, seen = asked + own.size, seen + shown.size
    token, own, other, shown = (np.concatenate(part) for part in parts[:4])
    tensor = torch.from_numpy
    take, keys_take = np.flatnonzero(own), np.flatnonzero(shown)
    pads = tensor(np.flatnonzero(~own))
    return Branches(tensor(token), pads, tensor(other), calls, *map(tensor, (token[take], take, other[keys_take], keys_take)))


def _pad(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[slice, int, int]]]:
    """Lay pieces out in groups of similar length: (token at each place, places without a token, (places, pieces, width) per group)."""
    kind = _size(length)
    places, pads, groups, used = [], [], [], 0
    for which in np.unique(kind):
        at = np.flatnonzero(kind == which)
        token, own = _rectangle(start[at], length[at])
        places.append(token.ravel())
        pads.append(np.flatnonzero(~own.ravel()) + used)
        groups.append((slice(used, used + token.size), len(at), token.shape[1]))
        used += token.size
    return np.concatenate(places), np.concatenate(pads), groups


def _rectangle(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n, widest] tokens and which of them are the piece's own; padding repeats the piece's first token."""
    column = np.arange(length.max())
    own = column < length[:, None]
    return start[:, None] + np.where(own, column, 0), own


def _size(length: np.ndarray) -> np.ndarray:
    """Pieces of one size share a call. The kernel works in blocks of 32 queries, so finer than that saves little except for tiny ones."""
    steps = np.ceil(np.log2(np.maximum(length, 256) / 256) * 4)  # above 256 tokens: quarter octaves
    return np.where(length <= 8, 0, np.where(length <= 256, 1 + (length - 1) // 32, 10 + steps)).astype(np.int64)


def _heads(x: Tensor, n: int) -> Tensor:
    """[P, H, D], n pieces of equal width -> [n, H, width, D], a view."""
    return x.view(n, -1, *x.shape[1:]).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[n, H, width, D] or [n, H, width] -> [n * width, H, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x.contiguous() if index is None else x.reshape(x.shape[0], -1).index_select(0, index).view(-1, *x.shape[1:])


class _Flash(torch.autograd.Function):
    """The flash backend: q, k, v [T, H, D] -> [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float) -> Tensor:
        placed = [_pick(x, plan.run) for x in (q, k, v)]
        parts = [_flash(*(_heads(x[at], n) for x in placed), 0.0, True, scale=scale) for at, n in plan.calls]
        take = None if plan.run is None else plan.take
        out = _pick(_cat([_rows(o) for o, _ in parts]), take)
        lse = _pick(_cat([_rows(l) for _, l in parts]), take)
        for branch in plan.branches:
            asking, seen = _pick(q, branch.query), [_pick(x, branch.key) for x in (k, v)]
            parts = [
                _flash(_heads(asking[at], n), *(_heads(x[of], n) for x in seen), 0.0, False, attn_mask=_as(mask, q), scale=scale)
                for at, of, n, mask in branch.calls
            ]
            more = _pick(_cat([_rows(o) for o, _ in parts]), branch.take)
            its = _pick(_cat([_rows(l) for _, l in parts]), branch.take)
            own = lse[branch.tokens]
            both = torch.logaddexp(own, its)
            merged = out[branch.tokens] * (own - both).exp().unsqueeze(-1) + more * (its - both).exp().unsqueeze(-1)
            out[branch.tokens] = merged.to(out.dtype)
            lse[branch.tokens] = both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, grads[0]

        def placed(index: Tensor | None, pads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """grad, q, out and lse at the places; padding asks for nothing."""
            l = _pick(lse, index)
            if len(pads):
                l = l.index_fill_(0, pads, _UNSEEN)
            return _pick(grad, index), _pick(q, index), _pick(out, index), l

        g, asking, o, l = placed(plan.run, plan.run_pads)
        keys, values = (_pick(x, plan.run) for x in (k, v))
        parts = []
        for at, n in plan.calls:
            a, b, c, d, e = (_heads(x[at], n) for x in (g, asking, keys, values, o))
            parts.append(_flash_backward(a, b, c, d, e, _heads(l[at], n), 0.0, True, scale=scale))
        take = None if plan.run is None else plan.take
        dq, dk, dv = (_pick(_cat([_rows(part[i]) for part in parts]), take) for i in range(3))
        for branch in plan.branches:
            g, asking, o, l = placed(branch.query, branch.query_pads)
            keys, values = (_pick(x, branch.key) for x in (k, v))
            parts = []
            for at, of, n, mask in branch.calls:
                a, b, e = (_heads(x[at], n) for x in (g, asking, o))
                c, d = (_heads(x[of], n) for x in (keys, values))
                parts.append(_flash_backward(a, b, c, d, e, _heads(l[at], n), 0.0, False, attn_mask=_as(mask, q), scale=scale))
            dq[branch.tokens] += _pick(_cat([_rows(part[0]) for part in parts]), branch.take)
            dk[branch.keys] += _pick(_cat([_rows(part[1]) for part in parts]), branch.keys_take)
            dv[branch.keys] += _pick(_cat([_rows(part[2]) for part in parts]), branch.keys_take)
        return dq, dk, dv, None, None


def _as(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return mask if mask is None else mask.to(like.dtype)


@torch.inference_mode(False)
def _mask(forest: Forest, window: int | None) -> Tensor:
    """The dense mask, kept with the forest: every layer asks for it."""
    key = ("mask", window)
    if key not in forest.cache:
        mask = dense_mask(forest)
        if window is not None:
            mask &= forest.position[:, None] - forest.position[None, :] < window
        forest.cache[key] = mask
    return forest.cache[key]


_PLAIN = {"softcap", "s_aux", "position_bias", "head_mask"}  # what changes the scores in ways that the kernel here does not


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    forest: Forest | None = None,
    forest_backend: str = "dense",
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    if forest is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window  # the mask holds it; other implementations read it
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    unknown = sorted(name for name in _PLAIN if kwargs.get(name) is not None)
    if unknown or dropout or query.shape[0] != 1 or key.shape[2] != query.shape[2] or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"forest attention: one causal row, no dropout, no cache and no {', '.join(unknown) or 'extras'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # under autocast rotation leaves q and k in float32
    return attend(q, k, v, forest, scale=scale, backend=forest_backend, window=sliding_window).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register("forest", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("forest", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def trunk(model: PreTrainedModel) -> Any:
    """What runs the model without its head: the base model, or where the weights are spread the method that gathers them first."""
    return getattr(model, "trunk", model.base_model)


def trunk_states(model: PreTrainedModel, forest: Forest, backend: str) -> Tensor:
    """[T, d] final states of the trunk under "flash" or "dense". A mask of four dimensions keeps transformers from building its own."""
    none = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=forest.tokens.device)
    out = trunk(model)(
        input_ids=forest.tokens[None],
        position_ids=forest.position[None],
        attention_mask=none,
        use_cache=False,
        forest=forest,
        forest_backend=backend,
    )
    return out.last_hidden_state[0]
