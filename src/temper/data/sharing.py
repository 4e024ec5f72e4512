"""Trees that begin alike, joined: what they share stands once, and the sums over their tokens stay what they were. Floor 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from temper.data.template import common
from temper.forest import Segment, Tree

LEAST = 32  # tokens that it pays to share: each border between segments costs the attention a call


def size(tree: Tree) -> int:
    """Tokens of a tree."""
    return sum(len(s.tokens) for s in tree)


def unshared(tree: Tree) -> int:
    """Tokens of a tree's paths one by one, each from the root to a leaf."""
    path: list[int] = []
    for s in tree:
        path.append(len(s.tokens) + (path[s.parent] if s.parent >= 0 else 0))
    inner = {s.parent for s in tree}
    return sum(n for k, n in enumerate(path) if k not in inner)


def shared(trees: Sequence[Tree], most: int, least: int = LEAST) -> list[Tree]:
    """The trees with those that begin with the same tokens, `least` or more, as one tree each, of about `most` tokens at most.

    A token that several trees learn stands once with the sum of their weights, so sums over tokens, and their gradients, are the same.
    Joined are first segments: a conversation, or the prompt of a comparison with its answers under it, which stay together in their order.
    """
    order = sorted((i for i, tree in enumerate(trees) if _one_root(tree)), key=lambda i: list(trees[i][0].tokens))
    out = {i: tree for i, tree in enumerate(trees) if not _one_root(tree)}
    for run in _runs([trees[i] for i in order], 0, least, most):
        members = [order[k] for k in run]
        out[min(members)] = _join([trees[i] for i in members], least)
    return [out[i] for i in sorted(out)]


def _one_root(tree: Tree) -> bool:
    return all(s.parent >= 0 for s in tree[1:]) and not tree[0].columns


def _runs(trees: Sequence[Tree], begin: int, least: int, most: int | None = None) -> Iterator[range]:
    """Stretches of trees in order of their tokens whose neighbours share `least` tokens after the first `begin`."""
    first, held = 0, 0
    for k, tree in enumerate(trees):
        n = common(trees[k - 1][0].tokens, tree[0].tokens) if k > first else 0
        if k > first and (n < begin + least or (most is not None and held + size(tree) - n > most)):
            yield range(first, k)
            first, held, n = k, 0, 0
        held += size(tree) - n
    if trees:
        yield range(first, len(trees))


def _join(trees: Sequence[Tree], least: int) -> Tree:
    """One tree of trees that are in order of their first segments' tokens, which begin alike."""
    if len(trees) == 1:
        return trees[0]
    out: Tree = []

    def put(trees: Sequence[Tree], begin: int, parent: int) -> None:
        n = common(trees[0][0].tokens, trees[-1][0].tokens)
        root = trees[0][0]
        targets = [t[0].target[begin:n] for t in trees if t[0].target is not None]
        target = [sum(column) for column in zip(*targets, strict=True)] if targets else None
        at = len(out)
        out.append(replace(root, tokens=root.tokens[begin:n], target=target, parent=parent))
        ended = [tree for tree in trees if len(tree[0].tokens) == n]
        for tree in ended:
            offset = len(out) - 1
            out.extend(replace(s, parent=at if s.parent == 0 else s.parent + offset) for s in tree[1:])
        for run in _runs(rest := trees[len(ended) :], n, least):
            put([rest[k] for k in run], n, at)

    put(trees, 0, -1)
    return out


def branches(paths: Sequence[tuple[Sequence[int], Sequence[float]]]) -> Tree:
    """Sequences (ids, target) as one tree: whatever they begin with alike stands once."""
    trees = [[Segment(list(ids), list(target))] for ids, target in sorted(paths, key=lambda path: list(path[0]))]
    out: Tree = []
    for run in _runs(trees, 0, 1):
        offset = len(out)
        out.extend(replace(s, parent=s.parent + offset if s.parent >= 0 else -1) for s in _join([trees[k] for k in run], 1))
    return out
