import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from temper.data.packing import Order, batch_indices, epoch_order, pack


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 60))
def test_pack_holds_every_index_once_within_the_budget(sizes, budget):
    groups = pack(sizes, budget)
    assert sorted(i for g in groups for i in g) == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[i] for i in group) <= budget or len(group) == 1
    assert groups == pack(sizes, budget)
    # best-fit decreasing needs at most 11/9 of the optimum + 1; the optimum is at least the total over the budget
    if sizes and max(sizes) <= budget / 2:
        assert len(groups) <= 1.5 * sum(sizes) / budget + 1


def test_pack_by_hand():
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([], 10) == []
    assert pack([30, 1], 10) == [[0], [1]]
    with pytest.raises(ValueError, match="budget 0"):
        pack([1], 0)
    with pytest.raises(ValueError, match="below 1"):
        pack([0], 5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**63), st.integers(1, 5))
def test_epochs_have_no_repeats_and_leave_out_nothing(n, batch, seed, epochs):
    steps = -(-n * epochs // batch)
    rows = [i for step in range(steps) for i in batch_indices(n, batch, seed, step)]
    for e in range(epochs):
        assert sorted(rows[e * n : (e + 1) * n]) == list(range(n))


def test_orders_differ_by_seed_and_epoch_and_are_golden():
    assert epoch_order(8, 0, 0).tolist() == np.argsort(np.random.Philox(key=[0, 0]).random_raw(8)).tolist()
    assert batch_indices(1000, 50, 3, 7) == batch_indices(1000, 50, 3, 7)
    assert batch_indices(1000, 50, 3, 7) != batch_indices(1000, 50, 4, 7)
    assert epoch_order(1000, 0, 0).tolist() != epoch_order(1000, 0, 1).tolist()
    with pytest.raises(ValueError, match="at least one row"):
        batch_indices(0, 4, 0, 0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), st.integers(1, 20), st.integers(0, 99))
def test_mixtures_keep_their_shares_and_repeat_nothing_early(parts, batch, seed):
    have = [max(a, b) for a, b in parts]
    take = [min(a, b) for a, b in parts]
    order, n = Order(have, take, seed), sum(take)
    first = np.cumsum([0, *have])
    steps = -(-4 * n // batch)
    rows = np.array([row for step in range(steps) for row in order.rows(batch, step)])
    source = np.searchsorted(first, rows, side="right") - 1
    for s, (total, share) in enumerate(zip(have, take, strict=True)):
        seen = (source == s).cumsum()
        assert np.abs(seen[: 4 * n] - share / n * np.arange(1, 4 * n + 1)).max() < len(have)
        own = rows[source == s] - first[s]
        for start in range(0, len(own) - total + 1, total):
            assert sorted(own[start : start + total]) == list(range(total))
    assert order.rows(batch, 1) == Order(have, take, seed).rows(batch, 1)


def test_one_data_set_is_a_mixture_of_one():
    assert [Order([17], seed=3).rows(5, k) for k in range(9)] == [batch_indices(17, 5, 3, k) for k in range(9)]


def test_records_that_belong_together_follow_each_other():
    groups = np.array([k % 5 for k in range(20)])
    order = Order([20], seed=1, together=[groups])
    rows = order.rows(20, 0)
    assert sorted(rows) == list(range(20))
    assert [groups[row] for row in rows[::4]] == [groups[row] for row in rows[3::4]]
    assert [groups[row] for row in order.rows(20, 1)] != [groups[row] for row in rows]
