"""The forest against its definition, walked naively."""

import random

import pytest
import torch

from temper.forest import Forest, Segment, dense_mask, divide, per_segment, plant, unroll


def grow(seed: int, *, sizes=(1, 1, 2, 5, 9), trees: int = 5, segments: int = 7, vocabulary: int = 50) -> list[list[Segment]]:
    """Random trees, some with several roots, parents anywhere before their children."""
    rng = random.Random(seed)
    out = []
    for _ in range(rng.randint(1, trees)):
        tree = []
        for s in range(rng.randint(1, segments)):
            parent = rng.randrange(-1, s) if s else -1
            n = rng.choice(sizes)
            tokens = [rng.randrange(vocabulary) for _ in range(n)]
            target = [float(rng.random() < 0.7 and (parent >= 0 or t > 0)) for t in range(n)]
            tree.append(Segment(tokens, target, parent, {"x": [rng.random() for _ in range(n)]}, {"score": rng.random()}))
        out.append(tree)
    return out


def paths(trees) -> list[tuple[int, int, list[int]]]:
    """(tree, segment, segments from the root to it), by definition."""
    out = []
    for t, tree in enumerate(trees):
        for s in range(len(tree)):
            path = [s]
            while tree[path[0]].parent >= 0:
                path.insert(0, tree[path[0]].parent)
            out.append((t, s, path))
    return out


@pytest.mark.parametrize("seed", range(12))
def test_every_segment_is_where_its_path_says(seed):
    trees = grow(seed)
    forest = plant(trees)
    rows = unroll(forest)
    mask = dense_mask(forest)
    first = [sum(map(len, trees[:t])) for t in range(len(trees))]
    leaves = 0
    for k, (t, s, path) in enumerate(paths(trees)):
        segment = trees[t][s]
        row = int(forest.order[k])
        own = slice(int(forest.start[row]), int(forest.end[row]))
        before = [int(forest.order[first[t] + p]) for p in path[:-1]]
        seen = [i for p in before for i in range(int(forest.start[p]), int(forest.end[p]))]
        assert forest.tokens[own].tolist() == list(segment.tokens)
        assert forest.target[own].tolist() == segment.target
        assert torch.equal(forest.columns["x"][own], torch.tensor(segment.columns["x"]))
        assert float(forest.columns["score"][row]) == pytest.approx(segment.labels["score"])
        assert int(forest.parent[row]) == (before[-1] if before else -1)
        for i in range(own.start, own.stop):
            assert mask[i].nonzero()[:, 0].tolist() == sorted([*seen, *range(own.start, i + 1)])
            assert int(forest.position[i]) == len(seen) + i - own.start
            assert int(forest.previous[i]) == (i - 1 if i > own.start else seen[-1] if seen else -1)
            assert rows.source.flatten().tolist().index(i) == int(rows.where[i])  # in the first row that has it
        below = [int(forest.order[j]) for j, (u, _, p) in enumerate(paths(trees)) if u == t and s in p[:-1]]
        inside = sorted(i for d in below for i in range(int(forest.start[d]), int(forest.end[d])))
        assert inside == list(range(int(forest.end[row]), int(forest.until[row])))
        if not below:
            leaves += 1
            expected = [token for p in path for token in trees[t][p].tokens]
            assert any(ids[own_row].tolist() == expected for ids, own_row in zip(rows.ids, rows.mask, strict=True))
    assert len(rows.ids) == leaves
    assert forest.weights == {"tokens": float(forest.target.sum())}
    assert torch.equal(forest.learned, forest.target.nonzero()[:, 0])


def test_children_out_of_order_are_moved_and_remembered():
    tree = [Segment([1]), Segment([2], parent=0), Segment([3], parent=0), Segment([4], parent=1)]
    forest = plant([tree])
    assert forest.tokens.tolist() == [1, 2, 4, 3]
    assert forest.order.tolist() == [0, 1, 3, 2]


def test_tensors_round_trip():
    forest = plant(grow(3), weights={"pairs": 2.5, "tokens": 7.0})
    forest.columns["added"] = torch.arange(float(forest.T))
    again = Forest.from_tensors(forest.tensors())
    assert again.weights == forest.weights
    assert again.labels == forest.labels == {"score"}
    for name, x in forest.tensors().items():
        assert torch.equal(x, again.tensors()[name]), name


def test_per_segment_sums_and_differentiates():
    forest = plant([[Segment([1, 2], [0.0, 1.0]), Segment([3], [1.0], 0)], [Segment([4, 5, 6], [0.0, 1.0, 1.0])]])
    x = torch.tensor([1.0, 2, 3, 4, 5, 6], requires_grad=True)
    sums = per_segment(x, forest)
    assert sums.tolist() == [3, 3, 15]
    (sums * torch.tensor([1.0, 10, 100])).sum().backward()
    assert x.grad.tolist() == [1, 1, 10, 100, 100, 100]
    assert per_segment(x[forest.learned], forest, forest.learned).tolist() == [2, 3, 11]
    with pytest.raises(ValueError, match="`at`"):
        per_segment(x[forest.learned], forest)


def test_missing_columns_and_targets_are_zero():
    forest = plant([[Segment([1, 2]), Segment([3], [1.0], 0, {"a": [5.0]}, {"b": 7.0})]])
    assert forest.target.tolist() == [0, 0, 1]
    assert forest.columns["a"].tolist() == [0, 0, 5]
    assert forest.columns["b"].tolist() == [0, 7]
    assert {x.dtype for x in [forest.target, *forest.columns.values()]} == {torch.float32}


def test_what_is_computed_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        forest = plant(grow(1))
        index, _ = forest.learned, forest.until
    weight = torch.ones(forest.T, requires_grad=True)
    (weight * weight)[index][forest.previous[index]].sum().backward() if len(index) == forest.T else (weight * weight)[
        index
    ].sum().backward()
    assert weight.grad[index].tolist() == [2.0] * len(index)


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([], "at least one segment"),
        ([[]], "at least one segment"),
        ([[Segment([1])], [Segment([1]), Segment([], [], 0)]], "tree 1, segment 1: no tokens"),
        ([[Segment([1], parent=0)]], "tree 0, segment 0: parent 0"),
        ([[Segment([1], parent=1), Segment([2])]], "tree 0, segment 0: parent 1"),
        ([[Segment([1], parent=-2)]], "parent -2"),
        ([[Segment([1], [1.0])]], "tree 0, segment 0: the first token has a target"),
        ([[Segment([1, 2], [0.0])]], "1 values of target for 2 tokens"),
        ([[Segment([1, 2], columns={"a": [1.0]})]], "1 values of a for 2 tokens"),
        ([[Segment([1], labels={"a": float("nan")})]], "tree 0, segment 0: a is nan"),
        ([[Segment([1], columns={"a": [1.0]}), Segment([2], parent=0, labels={"a": 1.0})]], "'a' is a column"),
    ],
)
def test_mistakes_are_named(trees, message):
    with pytest.raises(ValueError, match=message) as error:
        plant(trees)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(12))
def test_divided_is_planted_apart(seed):
    """The pieces are what `plant` makes of their trees, hold each tree once, and as many of them as fit."""
    trees = grow(seed, trees=9)
    sizes = [sum(len(s.tokens) for s in tree) for tree in trees]
    forest = plant(trees)
    for budget in (1, 7, 20, 60, forest.T - 1, forest.T):
        pieces, at = divide(forest, budget), 0
        for piece in pieces:
            own = slice(at, at + piece.trees)
            expected = plant(trees[own]).tensors()
            found = piece.tensors() | ({} if piece is forest else {"weight.tokens": expected["weight.tokens"]})
            zeros = {name: x for name, x in found.items() if name not in expected}  # columns that only other trees have
            assert not any(x.any() for x in zeros.values())
            assert all(torch.equal(found[name], x) for name, x in expected.items())
            assert piece is forest or not piece.weights
            assert budget >= piece.T or piece.trees == 1
            at += piece.trees
            if at < len(trees):
                assert piece.T + sizes[at] > budget
        assert at == len(trees)
    assert divide(forest, forest.T)[0] is forest
