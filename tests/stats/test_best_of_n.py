"""Best of n: the reference vectors, all subsets by brute force, and the exact policy."""

import json
import math
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from temper.stats.best_of_n import expected, kl_bound, kl_estimate, kl_exact, pass_at_k, policy, weights
from temper.world import oracles

VECTORS = json.loads((Path(__file__).parents[1] / "losses" / "vectors.json").read_text())
PROXY, GOLD = (0.1, 0.9, 0.4, 0.7, 0.2), (1, 3, 2, 5, 0)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_vectors():
    for n, want in VECTORS["bon_kl"].items():
        close(kl_bound(int(n)), want)
    for name, want in VECTORS["bon_estimator"].items():
        close(expected(PROXY, GOLD, int(name[1:])), want)
    close(pass_at_k(10, 3, 1), VECTORS["passk"]["n10_c3_k1"])
    close(pass_at_k(10, 3, 5), VECTORS["passk"]["n10_c3_k5"])
    for n in 2, 4, 16:
        want = VECTORS[f"bon_exact_uniform4_n{n}"]
        close(policy([0.25] * 4, range(4), n), want["policy"])
        close(kl_exact([0.25] * 4, range(4), n), want["kl"])
    close(kl_exact(np.full(10_000, 1e-4), np.arange(10_000), 16), VECTORS["bon_exact_uniform10000_n16"]["kl"])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_estimator_is_the_mean_over_all_subsets_whatever_the_order_of_ties(n):
    score, value = [0.0, 2.0, 2.0, 1.0, 2.0, 0.0], [1.0, 7.0, 3.0, -2.0, 5.0, 4.0]

    def best(subset):
        top = max(score[i] for i in subset)
        return np.mean([value[i] for i in subset if score[i] == top])

    want = np.mean([best(s) for s in combinations(range(6), n)])
    close(expected(score, value, n), want)
    order = [3, 4, 0, 5, 1, 2]
    close(expected([score[i] for i in order], [value[i] for i in order], n), want)
    close(weights(score, n).sum(), 1.0)


def test_pass_at_k_is_best_of_k_by_the_check_itself():
    correct = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    for k in range(1, 11):
        close(expected(correct, correct, k), pass_at_k(10, 3, k))
    assert pass_at_k(5, 5, 1) == 1
    assert pass_at_k(5, 0, 5) == 0


def test_the_estimator_is_unbiased():
    """E over all samples of 4 from three answers = the exact best of 2."""
    p, score, value = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.0]), np.array([3.0, -1.0, 10.0])
    total = sum(p[list(s)].prod() * expected(score[list(s)], value[list(s)], 2) for s in product(range(3), repeat=4))
    close(total, policy(p, score, 2) @ value)


def test_the_exact_policy_agrees_with_the_worlds_oracle():
    rng = np.random.default_rng(0)
    p, score = rng.dirichlet(np.ones(12)), rng.integers(0, 5, 12).astype(float)
    for n in 1, 2, 7, 64:
        close(policy(p, score, n), np.exp(oracles.best_of_n(np.log(p), score, n)))
        q = policy(p, score, n)
        close(kl_exact(p, score, n), (q[q > 0] * np.log(q[q > 0] / p[q > 0])).sum())
        assert kl_exact(p, score, n) <= kl_bound(n) + 1e-12


def test_the_kl_of_samples_without_ties_is_the_bound_and_of_one_answer_zero():
    rng = np.random.default_rng(1)
    for n in 1, 2, 8, 16:
        close(kl_estimate(rng.normal(size=16), n), kl_bound(n))
        close(kl_estimate(rng.normal(size=16), n, np.full(16, 1e-12), range(16)), kl_bound(n))
        assert kl_estimate([0.0] * 16, n) == pytest.approx(0, abs=1e-9)
        assert kl_estimate([0.0] * 16, n, [1.0] * 16, ["a"] * 16) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("known", [True, False])
def test_the_kl_from_samples_is_close_to_the_exact_one(known):
    """Half the mass on three answers, half spread thin: neither the bound nor the exact KL of the samples' own histogram."""
    rng = np.random.default_rng(2)
    p = np.concatenate([[0.25, 0.15, 0.1], np.full(500, 0.001)])
    score = rng.normal(size=len(p))
    score[:3] = 0.5, 2.2, -1.0
    drawn = [rng.choice(len(p), size=64, p=p) for _ in range(300)]
    for n in 2, 4, 16, 64:
        want = kl_exact(p, score, n)
        got = [kl_estimate(score[d], n, p[d] if known else None, d if known else None) for d in drawn]
        assert abs(np.mean(got) - want) < (0.05 if known else 0.12), (n, np.mean(got), want)
    assert kl_bound(16) - kl_exact(p, score, 16) > 0.15


def test_refuses_what_has_no_answer():
    for n in 0, 4:
        with pytest.raises(ValueError, match=f"best of {n} from 3 samples"):
            weights([1.0, 2.0, 3.0], n)
    with pytest.raises(ValueError, match="no number"):
        weights([1.0, math.nan], 1)
    with pytest.raises(ValueError, match="probabilities that sum to"):
        policy([0.25, 0.25], [0, 1], 2)
    with pytest.raises(ValueError, match="pass@4 from 3"):
        pass_at_k(3, 1, 4)
