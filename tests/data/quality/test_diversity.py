"""Farthest point first."""

from itertools import combinations

import numpy as np
import pytest
from data.quality.conftest import chat, text

from temper.config import UserError
from temper.data.quality.diversity import k_center, vector


def test_it_is_the_greedy_algorithm_and_within_twice_the_best_radius():
    x = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
    d = np.linalg.norm(x[:, None] - x[None], axis=2)
    taken, nearest, distance = k_center(x, 4)
    expected = [taken[0]]
    for _ in range(3):
        expected.append(int(np.argmax(d[:, expected].min(1))))
    assert taken == expected
    assert taken[0] == np.argmin(np.linalg.norm(x - x.mean(0), axis=1))
    assert distance == pytest.approx(d[:, taken].min(1), abs=1e-3)
    assert (nearest == np.array(taken)[d[:, taken].argmin(1)]).all()
    best = min(d[:, list(c)].min(1).max() for c in combinations(range(12), 4))
    assert distance.max() <= 2 * best + 1e-3


def test_rows_that_repeat_what_is_there_go_first(look):
    rows = [chat(f"{text(20, k % 5)}", "A") for k in range(40)]
    found, report = look("diversity", rows, keep=5)
    assert sorted(k % 5 for k in range(40) if k not in found) == [0, 1, 2, 3, 4]
    assert report.numbers["radius"] == pytest.approx(0, abs=1e-3)
    assert len(look("diversity", rows, keep=7)[0]) == 33  # equal rows are still rows
    with pytest.raises(UserError, match="keep 41 of 40"):
        look("diversity", rows, keep=41)


def test_vectors_have_length_one_and_like_texts_are_near():
    a, b, c = vector(text(50, 1)), vector(text(50, 1) + " more"), vector(text(50, 2))
    assert np.linalg.norm(a) == pytest.approx(1)
    assert a @ b > 0.9 > 0.3 > a @ c
    assert not vector("...").any()
