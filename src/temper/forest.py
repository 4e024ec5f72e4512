"""The packed forest: a micro-batch as one row of tokens cut into segments that continue each other. Floor 1, torch only.

A segment continues the tokens of its parent or starts fresh. Token i sees token j when j comes no later and j's segment is i's own
or an ancestor of it, so packed documents, preference pairs, rollout groups and process steps are all the same structure: a prompt
is computed once, whatever number of answers stands under it. Segments lie in depth-first preorder, which makes the descendants of
segment s the contiguous tokens end[s]:until[s].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class Segment:
    """Tokens that continue those of `parent`, an index within the tree; -1 starts a fresh path.

    target: the weight with which each token is learned, 0 = context only; None is 0 for all. columns: more values, one per token.
    labels: one value for the whole segment.
    """

    tokens: Sequence[int]
    target: Sequence[float] | None = None
    parent: int = -1
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)


Tree = list[Segment]


class _cached(cached_property):
    """A cached property whose tensors can be used in a backward pass even when it was first asked for in inference mode."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        super().__init__(torch.inference_mode(False)(compute))


@dataclass(eq=False)
class Forest:
    """One micro-batch of T tokens in S segments; build it with `plant`.

    tokens, position, segment, previous: [T] int64. position counts along a token's own path, prefix included; previous is the
    index of the token that predicts this one, -1 when nothing precedes it. parent [S] int64, -1 for a root. target [T] float32.
    columns: {name: [T] or, for the names in `labels`, [S]} float32. weights: what the loop divides by, counted from the data.
    order [S]: where the k-th given segment (the trees one after the other) ended up. tree [S]: which tree a segment belongs to.
    """

    tokens: Tensor
    position: Tensor
    segment: Tensor
    parent: Tensor
    previous: Tensor
    target: Tensor
    columns: dict[str, Tensor]
    weights: dict[str, float]
    labels: frozenset[str]
    order: Tensor
    tree: Tensor

    @property
    def T(self) -> int:
        """Number of tokens."""
        return self.tokens.shape[0]

    @property
    def S(self) -> int:
        """Number of segments."""
        return self.parent.shape[0]

    @_cached
    def length(self) -> Tensor:
        """[S] own tokens of each segment."""
        return torch.bincount(self.segment, minlength=self.S)

    @_cached
    def end(self) -> Tensor:
        """[S] one past the segment's own last token."""
        return self.length.cumsum(0)

    @_cached
    def start(self) -> Tensor:
        """[S] the segment's first token."""
        return self.end - self.length

    @_cached
    def until(self) -> Tensor:
        """[S] one past the last token of the segment's subtree: its descendants are exactly the tokens end[s]:until[s]."""
        until, parent = self.end.tolist(), self.parent.tolist()
        for s in range(self.S - 1, -1, -1):
            if parent[s] >= 0 and until[s] > until[parent[s]]:
                until[parent[s]] = until[s]
        return torch.tensor(until, device=self.tokens.device)

    @_cached
    def last(self) -> Tensor:
        """[S] the segment's last token: where a score of the path so far is read."""
        return self.end - 1

    @property
    def trees(self) -> int:
        """Number of trees."""
        return int(self.tree[-1]) + 1

    @cached_property
    def longest(self) -> int:
        """Tokens on the longest path."""
        return int(self.position.max()) + 1

    @_cached
    def learned(self) -> Tensor:
        """[n] indices of the tokens whose target is not zero."""
        return self.target.nonzero().squeeze(1)

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What others derive from the structure alone, kept with it (the layout of the attention, for one)."""
        return {}

    def to(self, device: str | torch.device) -> Forest:
        """The same forest on another device; itself when it is there already."""
        if self.tokens.device == torch.device(device):
            return self
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Forest.from_tensors(moved)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as a flat dict of tensors, for a checkpoint; `from_tensors` is the inverse."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        columns = {f"{'label' if name in self.labels else 'column'}.{name}": x for name, x in self.columns.items()}
        weights = {f"weight.{name}": torch.tensor(x, dtype=torch.float64) for name, x in self.weights.items()}
        return plain | columns | weights

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Forest:
        """The forest that `tensors` wrote."""
        parts: dict[str, dict[str, Tensor]] = {"column": {}, "label": {}, "weight": {}}
        for key, x in tensors.items():
            kind, dot, name = key.partition(".")
            if dot:
                parts[kind][name] = x
        weights = {name: float(x) for name, x in parts["weight"].items()}
        plain = {name: tensors[name] for name in _PLAIN}
        return Forest(**plain, columns=parts["column"] | parts["label"], weights=weights, labels=frozenset(parts["label"]))


_PLAIN = ("tokens", "position", "segment", "parent", "previous", "target", "order", "tree")


@torch.inference_mode(False)
def plant(trees: Sequence[Tree], weights: Mapping[str, float] | None = None) -> Forest:
    """Pack trees into one forest. A name of a column or label that a segment lacks is 0 there.

    weights: what the loop divides by, by name; by default {"tokens": the sum of the targets}. Raises ValueError, naming tree and
    segment, for an empty forest or segment, a parent that does not come first, values that do not match the tokens, and a target
    on a token that nothing precedes.
    """
    sizes = [len(tree) for tree in trees]
    segments = list(chain.from_iterable(trees))
    if not segments:
        raise ValueError("a forest needs at least one segment; the list of trees is empty")
    parent = np.fromiter((s.parent for s in segments), np.int64, len(segments))
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)  # of a segment's tree
    row = np.arange(len(segments))
    bad = (parent < -1) | (parent + first >= row) & (parent >= 0)
    if bad.any():
        raise ValueError(f"{_name(sizes, bad.argmax())}: parent {parent[bad.argmax()]}; parents come before their children, -1 is a root")
    parent = np.where(parent < 0, -1, parent + first)
    order, parent = _preorder(parent)
    if order is not None:
        segments = [segments[k] for k in order]

    length = np.fromiter((len(s.tokens) for s in segments), np.int64, len(segments))
    where = row if order is None else order  # forest row -> given segment, for messages
    if not length.all():
        raise ValueError(f"{_name(sizes, where[length.argmin()])}: no tokens; leave an empty segment out")
    total = int(length.sum())
    start = np.cumsum(length) - length
    segment = np.repeat(row, length)
    prefix = _prefix(parent, length)
    offset = np.arange(total) - start[segment]
    previous = np.arange(-1, total - 1)
    previous[start] = np.where(parent < 0, -1, (start + length - 1)[parent])

    names = {name for s in segments if s.columns for name in s.columns}
    labels = {name for s in segments if s.labels for name in s.labels}
    if names & labels:
        raise ValueError(f"{sorted(names & labels)[0]!r} is a column of some segments and a label of others; one name, one meaning")
    target = _tokenwise("target", [s.target for s in segments], length, sizes, where)
    orphan = (target != 0) & (previous < 0)
    if orphan.any():
        raise ValueError(f"{_name(sizes, where[segment[orphan.argmax()]])}: the first token has a target, but nothing precedes it; use 0")
    columns = {name: _tokenwise(name, [s.columns.get(name) for s in segments], length, sizes, where) for name in sorted(names)}
    for name in sorted(labels):
        columns[name] = np.fromiter((s.labels.get(name, 0.0) for s in segments), np.float32, len(segments))
    for name, x in {"target": target, **columns}.items():
        if not np.isfinite(x).all():
            k = (~np.isfinite(x)).argmax()
            raise ValueError(f"{_name(sizes, where[k if name in labels else segment[k]])}: {name} is {x[k]}")

    return Forest(
        tokens=torch.from_numpy(np.fromiter(chain.from_iterable(s.tokens for s in segments), np.int64, total)),
        position=torch.from_numpy(offset + prefix[segment]),
        segment=torch.from_numpy(segment),
        parent=torch.from_numpy(parent),
        previous=torch.from_numpy(previous),
        target=torch.from_numpy(target),
        columns={name: torch.from_numpy(x) for name, x in columns.items()},
        weights=dict(weights) if weights is not None else {"tokens": float(target.sum(dtype=np.float64))},
        labels=frozenset(labels),
        order=torch.from_numpy(row if order is None else np.argsort(order)),
        tree=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
    )


@torch.inference_mode(False)
def divide(forest: Forest, budget: int) -> list[Forest]:
    """The forest in pieces of at most `budget` tokens, cut between its trees; a larger tree is a piece of its own.

    What the loop divides by is counted on the whole: the pieces have no weights. Itself where it fits.
    """
    if budget >= forest.T or forest.trees == 1:
        return [forest]
    segments = torch.bincount(forest.tree).cumsum(0).tolist()  # of each tree one past its last segment
    tokens = forest.end[torch.tensor(segments) - 1].tolist()
    borders = [(0, 0)]
    for before, after in pairwise(zip(segments, tokens, strict=True)):
        if after[1] - borders[-1][1] > budget:
            borders.append(before)
    return [_piece(forest, *a, *b) for a, b in pairwise([*borders, (forest.S, forest.T)])]


def _piece(forest: Forest, segment: int, token: int, segments: int, tokens: int) -> Forest:
    """The whole trees from `segment` and `token` up to `segments` and `tokens`."""
    here, own = slice(token, tokens), slice(segment, segments)
    parent, previous = forest.parent[own], forest.previous[here]
    return Forest(
        tokens=forest.tokens[here],
        position=forest.position[here],
        segment=forest.segment[here] - segment,
        parent=torch.where(parent < 0, parent, parent - segment),
        previous=torch.where(previous < 0, previous, previous - token),
        target=forest.target[here],
        columns={name: x[own if name in forest.labels else here] for name, x in forest.columns.items()},
        weights={},
        labels=forest.labels,
        order=forest.order[own] - segment,
        tree=forest.tree[own] - forest.tree[segment],
    )


@torch.inference_mode(False)
def graft(forest: Forest, k: int) -> Forest:
    """The structure of the forest with k more tokens (id 0) that come first and are seen by all: one root that every root continues.

    Kept with the forest; it has no targets and no columns.
    """
    if ("graft", k) not in forest.cache:
        new = torch.arange(k, device=forest.tokens.device)
        forest.cache["graft", k] = Forest(
            tokens=torch.cat([new * 0, forest.tokens]),
            position=torch.cat([new, forest.position + k]),
            segment=torch.cat([new * 0, forest.segment + 1]),
            parent=torch.cat([new[:1] - 1, forest.parent + 1]),
            previous=torch.cat([new - 1, torch.where(forest.previous < 0, k - 1, forest.previous + k)]),
            target=torch.cat([new * 0.0, forest.target]),
            columns={},
            weights={},
            labels=frozenset(),
            order=torch.cat([new[:1], forest.order + 1]),
            tree=forest.parent.new_zeros(forest.S + 1),
        )
    return forest.cache["graft", k]


def dense_mask(forest: Forest) -> Tensor:
    """[T, T] bool: whether token i (row) sees token j (column). The oracle of every other backend, O(T²)."""
    token = torch.arange(forest.T, device=forest.tokens.device)
    return (token[None, :] <= token[:, None]) & (token[:, None] < forest.until[forest.segment][None, :])


def per_segment(x: Tensor, forest: Forest, at: Tensor | None = None) -> Tensor:
    """Sum token values into their segments: x [T] -> [S]; or x [n] of the tokens `at` [n], say forest.learned. Differentiable."""
    segment = forest.segment if at is None else forest.segment[at]
    if x.shape != segment.shape:
        raise ValueError(f"x {tuple(x.shape)} for {segment.shape[0]} tokens; pass the tokens that it belongs to as `at`")
    return x.new_zeros(forest.S).index_add(0, segment, x)


class Rows(NamedTuple):
    """A forest as right-padded rows, one per leaf: ids, mask, position, source [R, L]; where [T]."""

    ids: Tensor
    mask: Tensor  # bool
    position: Tensor
    source: Tensor  # the token of the forest at each place; -1 is padding
    where: Tensor  # each token's place in the flattened rows, in the first row that has it


@torch.inference_mode(False)
def unroll(forest: Forest, pad: int = 0) -> Rows:
    """One right-padded row per path from a root to a leaf: what a model without shared prefixes computes. Prefixes are repeated."""
    parent, start, end = forest.parent.tolist(), forest.start.tolist(), forest.end.tolist()
    inner = set(parent)
    paths: list[list[int]] = []
    for leaf in range(forest.S):
        if leaf in inner:
            continue
        path = [leaf]
        while parent[path[-1]] >= 0:
            path.append(parent[path[-1]])
        paths.append(list(chain.from_iterable(range(start[s], end[s]) for s in reversed(path))))
    width = max(map(len, paths))
    source = torch.full((len(paths), width), -1, dtype=torch.int64)
    for r, path in enumerate(paths):
        source[r, : len(path)] = torch.tensor(path)
    source = source.to(forest.tokens.device)
    mask = source >= 0
    ids = torch.where(mask, forest.tokens[source.clamp(min=0)], pad)
    position = torch.arange(width, device=source.device).expand_as(source)
    _, first = np.unique(source.flatten().cpu().numpy(), return_index=True)
    where = torch.from_numpy(first[-forest.T :]).to(source.device)  # without the place of -1
    return Rows(ids, mask, position, source, where)


def _preorder(parent: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """(order or None when nothing moves, parent in the new order): depth-first, children in the given order."""
    parents = parent.tolist()
    path: list[int] = []  # the ancestors of the segment before, itself included
    for s, p in enumerate(parents):
        if p < 0:
            path = [s]
            continue
        while path and path[-1] != p:
            path.pop()
        if not path:
            break
        path.append(s)
    else:
        return None, parent
    children: dict[int, list[int]] = {}
    for s, p in enumerate(parents):
        children.setdefault(p, []).append(s)
    order, stack = [], children[-1][::-1]
    while stack:
        order.append(stack.pop())
        stack.extend(children.get(order[-1], [])[::-1])
    moved = np.array(order)
    place = np.argsort(moved)
    return moved, np.where(parent < 0, -1, place[parent])[moved]


def _prefix(parent: np.ndarray, length: np.ndarray) -> np.ndarray:
    """[S] how many tokens precede each segment on its path."""
    prefix = np.zeros_like(length)
    if (parent >= 0).any():
        above, own, out = parent.tolist(), length.tolist(), prefix.tolist()
        for s, p in enumerate(above):
            if p >= 0:
                out[s] = out[p] + own[p]
        prefix = np.array(out)
    return prefix


def _tokenwise(name: str, values: Sequence[Sequence[float] | None], length: np.ndarray, sizes: list[int], where: np.ndarray) -> np.ndarray:
    """[T] float32 from one list per segment; None is zeros."""
    counts = [int(n) if x is None else len(x) for x, n in zip(values, length, strict=True)]
    wrong = np.array(counts) != length
    if wrong.any():
        k = int(wrong.argmax())
        raise ValueError(f"{_name(sizes, where[k])}: {counts[k]} values of {name} for {length[k]} tokens")
    filled: Iterable[Sequence[float]] = ((0.0,) * n if x is None else x for x, n in zip(values, counts, strict=True))
    return np.fromiter(chain.from_iterable(filled), np.float32, int(length.sum()))


def _name(sizes: list[int], k: int | np.integer) -> str:
    """Where the k-th given segment stands, for a message."""
    ends = np.cumsum(sizes)
    tree = int(np.searchsorted(ends, k, side="right"))
    return f"tree {tree}, segment {int(k) - int(ends[tree]) + sizes[tree]}"
