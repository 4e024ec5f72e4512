"""Attention over a packed forest, on unmodified Hugging Face models. Floor 2.

Registered with transformers as the attention implementation "forest". The trunk is called with the keyword `forest=`, which
transformers hands through to the attention of every layer; without it the implementation is plain SDPA, so `generate` works as ever.

Backends, which agree to 1e-5 in float32, in values and gradients:
    flash   CPU. The flash kernel on runs and branchings (below), merged by log-sum-exp.
    flex    CUDA. FlexAttention with a block mask made from the segments' intervals; where every segment is a root and the precision
            is half, varlen flash. On the CPU it has no backward pass and serves to test the mask.
    dense   SDPA under a [T, T] mask: the oracle, and what runs on other devices and where flash cannot (a sliding window that is
            shorter than a path).
    rows    for models whose attention cannot see the forest: one padded row per leaf, gathered back (`heads.hidden` unrolls).

A run is a segment followed by its first child, that one's first child, and so on. Its tokens are contiguous and each sees all that
come before it in the run, so one causal call serves the whole run. What remains are the subtrees of later children: all their tokens
see the run up to where they branch off, which is one unmasked call per branching, with its result merged into what these tokens have
seen elsewhere. A pair costs two causal pieces and one branching, a chain of process steps a single causal piece. Long pieces are
views of the tokens, short ones of similar length are copied to share a call, padded on the right, where causality keeps the padding
unseen.

A soft prompt or prefix (an adapter's) is one more root, computed once, that every tree continues.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from temper.forest import Forest, dense_mask, graft
from temper.models import adapters

BACKENDS = ("flash", "flex", "dense", "rows")

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SHORT = 64  # tokens: a call of the kernel costs about as much as copying so many there and back
BLOCK = 128  # tokens: FlexAttention's usual block
_UNSEEN = 1e30  # log-sum-exp of padding: exp(score - 1e30) = 0 whatever the score


def backends(device: torch.device) -> list[str]:
    """The backends for models on this device whose attention sees the forest, best first."""
    return {"cpu": ["flash"], "cuda": ["flex", "dense"]}.get(device.type, ["dense"])


def attend(q: Tensor, k: Tensor, v: Tensor, forest: Forest, *, scale: float, backend: str, window: int | None = None) -> Tensor:
    """q [T, H, D], k [T, G, D], v [T, G, E] with G dividing H -> [T, H, E]: attention within each token's own path.

    window: a token sees only the last `window` tokens of its path, itself included; None is all of them.
    """
    if window is not None and window >= forest.longest:
        window = None
    same = q.shape[-1] == v.shape[-1]
    if backend == "flex" and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and same and _all_roots(forest):
        return _varlen(q, k, v, forest, scale, window)
    if backend == "flash" and q.device.type == "cpu" and same and window is None:
        if k.shape[1] < q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return _Flash.apply(q, k, v, layout(forest), scale)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    gqa = k.shape[1] < q.shape[1]
    if backend == "flex":
        kernel = _flex(q.device.type)
        return kernel(q, k, v, block_mask=block_mask(forest, window), scale=scale, enable_gqa=gqa).squeeze(0).transpose(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(forest, window), scale=scale, enable_gqa=gqa)
    return out.squeeze(0).transpose(0, 1)


# ---------------------------------------------------------------- CPU: flash on runs and branchings


class Pieces(NamedTuple):
    """n pieces of tokens that one call of the kernel takes, as [n, heads, width, size]."""

    n: int
    at: slice | None  # the pieces lie side by side and are equally long: a view of the tokens, and no indices
    read: Tensor  # else [n * width] the token at each place; padding repeats the piece's first
    write: Tensor  # and the same with padding at T, a row more than there are tokens


class Branching(NamedTuple):
    """What `query` sees of the runs it branches off; queries of one call are disjoint, and keys too."""

    query: Pieces
    key: Pieces
    mask: Tensor | None  # [n, 1, 1, width] where keys are padded


class Layout(NamedTuple):
    """The calls of the flash backend; they depend on the forest only, so all layers and both directions share them."""

    runs: list[Pieces]
    branchings: list[Branching]  # in this order: a token's log-sum-exps merge from its own run upwards


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
    runs = [_pieces(start[heads][at], length[at], forest.T)[0] for at in _calls(length)]

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
    branchings = []
    for level in sorted(set(zip(depth[branching].tolist(), nth.tolist(), strict=True))):
        s = branching[(depth[branching] == level[0]) & (nth == level[1])]
        query = until[s + 1]  # the first child's subtree belongs to the run or to deeper branchings
        queries, key, keys = until[s] - query, start[head[s]], end[s] - start[head[s]]
        for at in _calls(queries, keys):
            asking, _ = _pieces(query[at], queries[at], forest.T)
            seen, own = _pieces(key[at], keys[at], forest.T)
            mask = None
            if not own.all():
                mask = torch.zeros(own.shape).masked_fill_(~torch.from_numpy(own), -torch.inf)[:, None, None, :]
            branchings.append(Branching(asking, seen, mask))
    return Layout(runs, branchings)


def _calls(*lengths: np.ndarray) -> list[np.ndarray]:
    """Which pieces share a call: short ones of similar length, and neighbours of equal length. A long one is a call of its own, for
    that costs less than to copy its tokens."""
    total = sum(lengths)
    short = total <= SHORT * len(lengths)
    kind = sum(np.where(length <= 8, 0, 1 + (length - 1) // 32) * 1000**i for i, length in enumerate(lengths))
    calls = [np.flatnonzero(short & (kind == which)) for which in np.unique(kind[short])]
    long = np.flatnonzero(~short)
    if len(lengths) == 1 and len(long):
        new = (np.diff(long) != 1) | (np.diff(lengths[0][long]) != 0)
        return calls + np.split(long, np.flatnonzero(new) + 1)
    return calls + [long[i : i + 1] for i in range(len(long))]


def _pieces(start: np.ndarray, length: np.ndarray, total: int) -> tuple[Pieces, np.ndarray]:
    """(the pieces, [n, width] which places hold a token)."""
    column = np.arange(length.max())
    own = column < length[:, None]
    if own.all() and (start[1:] == start[:-1] + length[:-1]).all():
        none = torch.empty(0, dtype=torch.int64)
        return Pieces(len(start), slice(int(start[0]), int(start[-1] + length[-1])), none, none), own
    read = start[:, None] + np.where(own, column, 0)
    write = np.where(own, read, total)
    return Pieces(len(start), None, *(torch.from_numpy(x.ravel()) for x in (read, write))), own


def _read(x: Tensor, p: Pieces) -> Tensor:
    """[H, T, D] -> [n, H, width, D], a view where the pieces lie side by side."""
    if p.at is not None:
        x = x[:, p.at]
    elif x.stride(0) < x.stride(1):  # tokens are outermost in memory: whole rows are copied
        x = x.transpose(0, 1).index_select(0, p.read).transpose(0, 1)
    else:
        x = x.index_select(1, p.read)
    return x.unflatten(1, (p.n, -1)).transpose(0, 1)


def _at(x: Tensor, p: Pieces) -> Tensor:
    """[T + 1, H, ...] -> [n * width, H, ...]; padding reads the last row."""
    return x[p.at] if p.at is not None else x.index_select(0, p.write)


def _rows(x: Tensor) -> Tensor:
    """[n, H, width, ...] -> [n * width, H, ...]: a view of what the kernel gives."""
    return x.transpose(1, 2).flatten(0, 1)


def _apart(x: Tensor, p: Pieces) -> Tensor:
    """The inverse of `_rows`."""
    return x.unflatten(0, (p.n, -1)).transpose(1, 2)


def _put(out: Tensor, p: Pieces, rows: Tensor) -> None:
    """Write [n * width, H, ...] into [T + 1, H, ...]; padding goes to the last row."""
    if p.at is not None:
        out[p.at] = rows
    else:
        out.index_copy_(0, p.write, rows)


def _add(out: Tensor, p: Pieces, rows: Tensor) -> None:
    """The same, added."""
    if p.at is not None:
        out[p.at] += rows
    else:
        out.index_add_(0, p.write, rows)


def _together(runs: list[Pieces], parts: Sequence[Tensor], tokens: int) -> Tensor:
    """The kernel's [n, H, width, ...] of every run as [T + 1, H, ...]; of a single run, that is all there is, as [T, H, ...]."""
    if len(runs) == 1 and runs[0].at is not None:
        return _rows(parts[0])
    first = parts[0]
    out = first.new_empty(tokens + 1, first.shape[1], *first.shape[3:])  # the runs hold every token
    out[tokens:] = 0.0
    for run, part in zip(runs, parts, strict=True):
        _put(out, run, _rows(part))
    return out


class _Flash(torch.autograd.Function):
    """The flash backend: q, k, v [T, H, D] -> [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float) -> Tensor:
        T = len(q)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        parts = [_flash(*(_read(x, run) for x in (q, k, v)), 0.0, True, scale=scale) for run in plan.runs]
        out, lse = (_together(plan.runs, [part[i] for part in parts], T) for i in range(2))
        lse[T:] = _UNSEEN
        for asking, seen, mask in plan.branchings:
            o, l = _flash(_read(q, asking), _read(k, seen), _read(v, seen), 0.0, False, attn_mask=_as(mask, q), scale=scale)
            own, its = _at(lse, asking), _rows(l)
            share = torch.sigmoid(its - own).unsqueeze(-1)
            merged = torch.lerp(_at(out, asking).to(share.dtype), _rows(o).to(share.dtype), share)
            _put(out, asking, merged.to(out.dtype))
            _put(lse, asking, torch.logaddexp(own, its))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out[:T]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, T = ctx.plan, ctx.scale, q.shape[1]
        grad, out = grads[0].transpose(0, 1), out[:T].transpose(0, 1)

        def kernel(asking: Pieces, seen: Pieces, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            g, a, o, b, c = (_read(x, p) for x, p in ((grad, asking), (q, asking), (out, asking), (k, seen), (v, seen)))
            return _flash_backward(g, a, b, c, o, _apart(_at(lse, asking), asking), 0.0, causal, attn_mask=_as(mask, q), scale=scale)

        parts = [kernel(run, run, True, None) for run in plan.runs]
        dq, dk, dv = (_together(plan.runs, [part[i] for part in parts], T) for i in range(3))
        for asking, seen, mask in plan.branchings:
            a, b, c = kernel(asking, seen, False, mask)
            for into, p, more in ((dq, asking, a), (dk, seen, b), (dv, seen, c)):
                _add(into, p, _rows(more))
        return dq[:T], dk[:T], dv[:T], None, None


def _as(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return mask if mask is None else mask.to(like.dtype)


# ---------------------------------------------------------------- CUDA: FlexAttention, varlen flash


@cache
def _flex(device: str) -> Any:
    """Compiled where it is to be fast; lengths differ from batch to batch, so they are dynamic."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


@torch.inference_mode(False)
def block_mask(forest: Forest, window: int | None = None) -> BlockMask:
    """The forest for FlexAttention, kept with it; no [T, T] tensor is made.

    Token i sees j when j <= i < until[segment j]. So a block of queries that comes after a block of keys sees some of it if it begins
    before the largest `until` there, and all of it if it ends before the smallest.
    """
    key = ("blocks", window)
    if key not in forest.cache:
        until, position = forest.until[forest.segment], forest.position

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = (j <= i) & (i < until[j])
            return seen if window is None else seen & (position[i] - position[j] < window)

        n = -(-forest.T // BLOCK)
        begin = torch.arange(n, device=until.device) * BLOCK
        low, high = _extremes(until, n)
        after = begin[:, None] > begin[None, :]
        some = after & (begin[:, None] < high)
        whole = after & (begin[:, None] + BLOCK <= low)
        if window is not None:
            near, far = _extremes(position, n)
            some &= near[:, None] - far[None, :] < window
            whole &= far[:, None] - near[None, :] < window
        some |= torch.eye(n, dtype=torch.bool, device=until.device)
        forest.cache[key] = BlockMask.from_kv_blocks(
            *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(forest.T, forest.T)
        )
    return forest.cache[key]


def _extremes(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """([n] least, [n] largest) of x [T] in each block; the last one is filled up with its last value."""
    blocks = torch.cat([x, x[-1:].expand(n * BLOCK - len(x))]).view(n, BLOCK)
    return blocks.amin(1), blocks.amax(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[n, n] bool -> ([1, 1, n] how many blocks of keys each block of queries sees, [1, 1, n, n] which, first of all)."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


def _all_roots(forest: Forest) -> bool:
    if "roots" not in forest.cache:
        forest.cache["roots"] = bool((forest.parent < 0).all())
    return forest.cache["roots"]


def _varlen(q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float, window: int | None) -> Tensor:
    """Packed documents: one causal call over all of them."""
    if "bounds" not in forest.cache:
        forest.cache["bounds"] = F.pad(forest.end, (1, 0)).to(torch.int32)
    bounds, longest, back = forest.cache["bounds"], forest.longest, -1 if window is None else window - 1
    how: dict[str, Any] = {"scale": scale, "window_size": (back, 0), "enable_gqa": k.shape[1] < q.shape[1]}
    return cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest, **how))


# ---------------------------------------------------------------- the dense oracle


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


# ---------------------------------------------------------------- transformers


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
    decode: Callable[..., Tensor] | None = None,
    prefix: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    decode: what attends instead, to keys and values of its own keeping (the rollout engine's): q, k, v, scale, window -> [T, H, E].
    prefix: [layers, 2, p, G, D], keys and values that stand before the forest's other tokens, which are the ones asked about.
    """
    if forest is None and decode is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window  # the mask holds it; other implementations read it
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    unknown = sorted(name for name in _PLAIN if kwargs.get(name) is not None)
    if unknown or dropout or query.shape[0] != 1 or key.shape[2] != query.shape[2] or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"forest attention: one causal row, no dropout, no cache and no {', '.join(unknown) or 'extras'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The gradient of x[0] would be a copy; under autocast rotation leaves q and k in float32.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    before = 0
    if prefix is not None:
        more = prefix[int(cast(Any, module.layer_idx))].to(value.dtype)
        before = more.shape[1]
        k, v = (torch.cat([x, own]) for x, own in zip(more, (k, v), strict=True))
        q = torch.cat([q.new_zeros(before, *q.shape[1:]), q])
    if decode is not None:
        return decode(q, k, v, scale=scale, window=sliding_window)[before:].unsqueeze(0), None
    assert forest is not None
    return attend(q, k, v, forest, scale=scale, backend=forest_backend, window=sliding_window)[before:].unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register("forest", _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("forest", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def trunk(model: PreTrainedModel) -> Any:
    """What runs the model without its head: the base model, or where the weights are spread the method that gathers them first."""
    return getattr(model, "trunk", None) or adapters.beneath(model).base_model


def trunk_states(model: PreTrainedModel, forest: Forest, backend: str) -> Tensor:
    """[T, d] final states of the trunk under a backend other than "rows"."""
    given, laid = laid_out(model, forest)
    return trunk(model)(**given, forest=laid, forest_backend=backend).last_hidden_state[0, -forest.T :]


def laid_out(model: PreTrainedModel, forest: Forest) -> tuple[dict[str, Any], Forest]:
    """(what the trunk is given, the forest that its attention sees): with an adapter before the tokens, one that is grafted on it."""
    # A mask of four dimensions keeps transformers from building its own.
    given: dict[str, Any] = {
        "attention_mask": torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=forest.tokens.device),
        "use_cache": False,
    }
    soft = adapters.soft(model)
    laid = forest if soft is None else graft(forest, soft.many)
    if soft is None or soft.embeds is None:
        given |= {"input_ids": forest.tokens[None], "position_ids": laid.position[None, -forest.T :]}
    else:
        words = cast(Any, model.get_input_embeddings())(forest.tokens)
        given |= {"inputs_embeds": torch.cat([soft.embeds.to(words.dtype), words])[None], "position_ids": laid.position[None]}
    return given | ({} if soft is None or soft.prefix is None else {"prefix": soft.prefix}), laid


def row_states(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[R, L, d] final states of right-padded rows by the trunk's own attention, soft prompts laid as PEFT lays them."""
    soft, rows = adapters.soft(model), len(ids)
    given: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in inspect.signature(adapters.beneath(model).base_model.forward).parameters:
        given["use_cache"] = False
    if mask is not None:
        given["attention_mask"] = mask.long()
    if soft is not None:
        if mask is not None:
            given["attention_mask"] = torch.cat([given["attention_mask"].new_ones(rows, soft.many), given["attention_mask"]], 1)
        if soft.embeds is None:
            given["past_key_values"] = cast(Any, model).get_prompt(rows)
        else:
            words = cast(Any, model.get_input_embeddings())(given.pop("input_ids"))
            given["inputs_embeds"] = torch.cat([soft.embeds.to(words.dtype).expand(rows, -1, -1), words], 1)
    return trunk(model)(**given).last_hidden_state[:, -ids.shape[1] :]
