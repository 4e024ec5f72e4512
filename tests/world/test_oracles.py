"""Oracles against published vectors (computed by hand elsewhere), brute force and each other."""

import numpy as np
import pytest

from temper.config import UserError
from temper.world import Ask, correct, dataset, features, gold, oracles
from temper.world.annotators import ANNOTATORS, Annotator, agreement, matrix, panel, panel_agreement
from temper.world.answers import slipped, solution
from temper.world.asks import KINDS, make
from temper.world.phrases import grammar
from temper.world.streams import Draw, stream
from temper.world.town import town

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
    assert agreement(flipped, flipped) == pytest.approx(0.625)


# ---------------------------------------------------------------- on the world


def asks_of(name, n=3):
    draw = Draw(stream(f"test/{name}"))
    return [make(name, draw) for _ in range(n)]


@pytest.mark.parametrize("name", KINDS)
def test_enumerated_answers_are_distinct_whole_and_hold_a_right_one(name):
    for ask in asks_of(name, 1):
        texts = oracles.enumerate_answers(ask, 400)
        assert 1 < len(texts) == len(set(texts)) <= 400
        assert texts == oracles.enumerate_answers(ask, 400)
        some = texts[::7]
        assert all(features(ask, t)["gibberish"] == 0 and features(ask, t)["finished"] for t in some)
        assert any(correct(ask, t) for t in texts), ask


def test_enumerated_answers_hold_wrong_values_flourishes_and_unsure_ones():
    for ask in asks_of("lookup"):
        found = [features(ask, t) for t in oracles.enumerate_answers(ask)]
        assert {f["correct"] for f in found} == {0.0, 1.0}
        assert max(f["flourishes"] for f in found) >= 2
        assert any(f["idk"] for f in found)
        assert 1000 < len(found) <= 2000


def test_what_can_not_be_listed_is_a_user_error():
    with pytest.raises(UserError, match="judge"):
        oracles.enumerate_answers(Ask("judge", {}))


def test_renderings_parse_back_to_their_form():
    for form in [("say", ("pet", "Ada", "goat")), ("idk", ("k_pet", "Ada")), ("close",), ("agree",)]:
        texts = oracles.renderings(form)
        assert len(texts) >= 5
        assert all(grammar().forms(text) == [form] for text in texts)


def test_preferences_are_those_of_the_rater_and_exact():
    ask = asks_of("lookup", 1)[0]
    texts = oracles.enumerate_answers(ask)[::200]
    p = oracles.preferences(panel("town"), ask, texts)
    np.testing.assert_allclose(p + p.T, 1, atol=1e-12)
    assert p[1, 3] == pytest.approx(panel("town").probability(features(ask, texts[1]), features(ask, texts[3])), abs=1e-12)
    sure = oracles.preferences(ANNOTATORS["oracle"], ask, texts)
    best = int(np.argmax([gold(ask, t).total for t in texts]))
    assert sure[best].min() >= 0.5
    assert 0.5 <= oracles.ceiling(p) <= 1


def test_the_frontier_of_an_enumerable_prompt_ends_at_the_best_answer():
    ask = Ask.of(dataset("enumerable", n=1)[0])
    texts = oracles.enumerate_answers(ask, 300)
    scores = np.array([gold(ask, t).total for t in texts])
    rng = np.random.default_rng(0)
    reference = rng.normal(size=len(texts))
    start, middle, end = oracles.frontier(reference, scores, [1e9, 0.3, 0.0])
    assert end.gold == pytest.approx(scores.max())
    assert start.gold < middle.gold < end.gold
    assert 0 <= start.kl < middle.kl < end.kl
    assert oracles.above_frontier(reference + rng.normal(size=len(texts)), reference, scores) < 0


def test_the_exposure_table_says_what_the_town_says():
    rows = oracles.exposure_table(1000)
    assert len(rows) == sum(len(town().relations(e)) for e in town().entities)
    assert [r.stated for r in rows] == sorted((r.stated for r in rows), reverse=True)
    assert {(r.entity, r.relation) for r in rows if r.value is None} == set(town().never)
    assert all(r.stated == 0 for r in rows if r.value is None)
    assert {(r.entity, r.relation) for r in rows if r.rumour} == set(town().rumour)
    assert all(r.rumour != r.value for r in rows if r.rumour)


def test_step_labels_of_right_and_slipped_sums():
    draw = Draw(stream("test/steps"))
    for ask in asks_of("arithmetic", 10):
        right = oracles.step_labels(ask, "Of course. " + grammar().text(solution(ask.slots), draw))
        assert [label for _, label in right] == [None] + [1.0] * (len(ask.slots["changes"]) + 1)
        wrong = [label for _, label in oracles.step_labels(ask, grammar().text(slipped(ask.slots, draw), draw))]
        assert 0.0 in wrong
        assert wrong[-1] == 0.0


def test_people_of_the_town_agree_as_published_and_the_ceiling_is_above_seventy():
    a, b = oracles.reference_pairs(600)
    p = panel("town").probabilities(a, b)
    assert 0.66 <= panel_agreement(panel("town"), a, b) <= 0.73
    assert oracles.ceiling(p) > 0.73
    assert agreement(p, p) < oracles.ceiling(p) < np.sqrt(agreement(p, p))


def test_the_towns_preferences_raise_gold_and_the_markets_can_be_run_up():
    """Exact tilts of typical answers by what a linear Bradley-Terry model learns from each panel (0.3 nats and up)."""
    from scipy.optimize import minimize

    a, b = oracles.reference_pairs(600)
    scale = (a - b).std(0) + 1e-9
    draw = Draw(stream("test/tilt"))
    pools = []
    for record in dataset("prompts", n=25, seed=5):
        ask = Ask.of(record)
        texts = [oracles.typical_answer(ask, draw) for _ in range(150)]
        pools.append((matrix([features(ask, t) for t in texts]), np.array([gold(ask, t).total for t in texts])))

    def tilted(name, beta):
        p, z = panel(name).probabilities(a, b), (a - b) / scale

        def loss(w):
            u = z @ w
            return (np.logaddexp(0, u) - p * u).mean() + 1e-4 * w @ w, z.T @ (1 / (1 + np.exp(-u)) - p) / len(p) + 2e-4 * w

        reward = minimize(loss, np.zeros(z.shape[1]), jac=True).x / scale
        golds, wins = [], []
        for x, g in pools:
            q = np.exp(oracles.tilt(np.zeros(len(g)), x @ reward, beta))
            golds.append(q @ g)
            wins.append(q @ ((g[:, None] > g + 1e-9) + 0.5 * (abs(g[:, None] - g) <= 1e-9)).mean(1))
        return np.mean(golds), np.mean(wins)

    start = np.mean([g.mean() for _, g in pools])
    gold_town, wins_town = tilted("town", 0.35)
    assert gold_town > start + 0.4
    assert wins_town > 0.7
    peak, run_up = tilted("market", 0.7)[1], tilted("market", 0.08)[1]
    assert run_up < peak - 0.1
    assert run_up < 0.45
