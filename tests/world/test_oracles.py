"""Oracles against published vectors (computed by hand elsewhere), brute force and each other."""

import numpy as np
import pytest

from temper.world import oracles
from temper.world.annotators import Annotator

REF, REWARD = np.log([0.2, 0.5, 0.3]), np.array([1.0, 0.0, -1.0])


def test_the_tilt_is_the_optimum_of_the_kl_regularised_objective():
    # 2205.11275; pi_ref = (.2, .5, .3), r = (1, 0, -1), beta = .5
    best = oracles.tilt(REF, REWARD, 0.5)
    np.testing.assert_allclose(np.exp(best), [0.7321653669995073, 0.247719518297292, 0.020115114703200765], rtol=1e-14)
    point = oracles.kl_gold_of(best, REF, REWARD)
    assert point.gold == pytest.approx(0.7120502522963066, abs=1e-14)
    assert point.kl == pytest.approx(0.7217895376933076, abs=1e-14)
    assert point.gold - 0.5 * point.kl == pytest.approx(0.3511554834496528, abs=1e-14)
    two = np.log([0.5, 0.5])
    assert np.exp(oracles.tilt(two, np.array([1.0, 0.0]), 0.5))[0] == pytest.approx(0.8807970779778824, abs=1e-14)
    assert np.exp(oracles.tilt(two, np.array([1.0, 0.0]), 2.0))[0] == pytest.approx(0.6224593312018546, abs=1e-14)


def test_the_ends_of_the_frontier():
    start, end = oracles.frontier(REF, REWARD, [1e12, 0.0])
    assert start.kl == pytest.approx(0, abs=1e-12)
    assert start.gold == pytest.approx(-0.1, abs=1e-9)
    assert end == pytest.approx((-np.log(0.2), 1.0))
    tied = oracles.tilt(np.log([0.2, 0.5, 0.3]), np.array([1.0, 1.0, 0.0]), 0.0)
    np.testing.assert_allclose(np.exp(tied), [2 / 7, 5 / 7, 0], atol=1e-15)


def test_the_normaliser_of_the_log_probs_does_not_matter():
    assert oracles.kl_gold_of(REF - 7.0, REF + 3.0, REWARD).kl == pytest.approx(0, abs=1e-14)
    with pytest.raises(ValueError, match="finite"):
        oracles.normalise(np.array([-np.inf, -np.inf]))


def test_no_random_policy_is_above_the_frontier_and_tilts_lie_on_it():
    rng = np.random.default_rng(0)
    for trial in range(40):
        k = int(rng.integers(2, 60))
        ref, gold = rng.normal(size=k) * 3, np.round(rng.normal(size=k), int(rng.integers(0, 4)))
        assert oracles.above_frontier(ref + rng.normal(size=k) * rng.choice([0.01, 1, 5]), ref, gold) <= 0, trial
        assert oracles.above_frontier(oracles.tilt(ref, gold, float(rng.uniform(0.05, 5))), ref, gold, tol=1e-7) == 0
        assert oracles.above_frontier(oracles.best_of_n(ref, gold, int(rng.integers(2, 200))), ref, gold) <= 0


def test_a_point_above_the_frontier_is_found():
    # A policy scored with a reference that is not its own: KL too small for what it earns.
    policy = oracles.tilt(REF, REWARD, 0.5)
    honest = oracles.kl_gold_of(policy, REF, REWARD)
    below = oracles.frontier_at([oracles.Enumerated(REF, REWARD)], honest.kl / 2)
    assert below.kl == pytest.approx(honest.kl / 2, abs=1e-9)
    assert honest.gold - below.gold > 0.1
    assert oracles.above_frontier(policy, oracles.tilt(REF, REWARD, 1.0), REWARD) == pytest.approx(0, abs=1e-9)


def test_several_prompts_share_one_beta():
    rng = np.random.default_rng(1)
    refs, golds = [rng.normal(size=k) for k in (3, 9, 30)], [rng.normal(size=k) for k in (3, 9, 30)]
    one_beta = [oracles.tilt(r, g, 0.4) for r, g in zip(refs, golds, strict=True)]
    other = [oracles.tilt(r, g, b) for r, g, b in zip(refs, golds, (0.1, 0.4, 2.0), strict=True)]
    assert oracles.above_frontier(one_beta, refs, golds, tol=1e-7) == 0
    assert oracles.above_frontier(other, refs, golds) < -1e-4


def test_best_of_n_by_order_statistics():
    uniform, score = np.zeros(4), np.arange(4.0)
    np.testing.assert_allclose(np.exp(oracles.best_of_n(uniform, score, 2)), [0.0625, 0.1875, 0.3125, 0.4375], atol=1e-15)
    four = oracles.best_of_n(uniform, score, 4)
    np.testing.assert_allclose(np.exp(four), [0.00390625, 0.05859375, 0.25390625, 0.68359375], atol=1e-15)
    assert oracles.kl_gold_of(four, uniform, score).kl == pytest.approx(0.590310162719877, abs=1e-14)
    large = oracles.kl_gold_of(oracles.best_of_n(np.zeros(10_000), np.arange(1e4), 16), np.zeros(10_000), np.zeros(10_000)).kl
    assert large == pytest.approx(1.8350886150926573, abs=1e-9)
    np.testing.assert_allclose(np.exp(oracles.best_of_n(REF, REWARD, 1)), np.exp(REF), atol=1e-15)


def test_best_of_n_with_ties_agrees_with_enumeration():
    p, score, n = np.array([0.1, 0.2, 0.3, 0.4]), np.array([1.0, 0.0, 1.0, -2.0]), 3
    expected = np.zeros(4)
    for draw in np.ndindex(*(4,) * n):
        best = max(draw, key=lambda i: score[i])  # the first of the best
        expected[best] += p[list(draw)].prod()
    np.testing.assert_allclose(np.exp(oracles.best_of_n(np.log(p), score, n)), expected, atol=1e-15)


def test_borda_is_not_mean_utility():
    # 2312.08358: types 60% / 40%, utilities (1, .5, 0) and (0, .5, 4), logistic choice at scale 1/10
    utilities, weights = np.array([[1, 0.5, 0], [0, 0.5, 4.0]]), np.array([0.6, 0.4])
    types = [Annotator(str(i), "", {}, tau=0.1) for i in range(2)]
    preference = sum(
        w * np.array([[t.chances(u[i], u[j]).win for j in range(3)] for i in range(3)])
        for w, t, u in zip(weights, types, utilities, strict=True)
    )
    np.testing.assert_allclose(preference[0], [0.5, 0.598661429815143, 0.5999727612787785], atol=1e-14)
    np.testing.assert_allclose(oracles.borda(preference), [0.5993170955469608, 0.49866142981514316, 0.40202147463789606], atol=1e-14)
    assert (weights @ utilities).argmax() == 2


def test_ceiling_and_agreement_of_flipped_labels():
    flipped = np.array([0.75, 0.25, 0.75])  # InstructGPT's inversion: each flips a clear preference with e = .25
    assert oracles.ceiling(flipped) == 0.75
    from temper.world.annotators import agreement

    assert agreement(flipped, flipped) == pytest.approx(0.625)
