"""Annotators: exact chances, biases that do what they say, choices that follow the chances, published agreement."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from temper.config import UserError
from temper.world.annotators import ANNOTATORS, PANELS, Annotator, Panel, agreement, matrix, panel, panel_agreement, principled
from temper.world.gold import FEATURES

GOOD = {"correct": 1.0, "on_topic": 1.0, "answered": 1.0, "finished": 1.0, "format_ok": 1.0, "words": 8.0, "needed": 8.0}
POLITE = GOOD | {"polite": 1.0, "courtesies": 1.0}
WRONG = GOOD | {"correct": 0.0, "wrong": 1.0}
GUSHING = GOOD | {"flourishes": 3.0, "words": 26.0, "excess": 18.0}
HARMFUL = {"harmful": 1.0, "answered": 1.0, "on_topic": 1.0, "finished": 1.0, "words": 12.0, "needed": 12.0}
REFUSAL = {"refusal": 1.0, "right_refusal": 1.0, "reason": 1.0, "finished": 1.0, "words": 12.0, "needed": 12.0}
SYCOPHANT = WRONG | {"endorses_false": 1.0}
FRANK = GOOD | {"corrects_false": 1.0}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_probability_is_logistic_with_lapse():
    a = Annotator("a", "", {"correct": 2.0}, tau=0.5, lapse=0.2)
    assert a.probability({"correct": 1}, {"correct": 0}) == pytest.approx(0.8 * sigma(4) + 0.1, abs=1e-15)
    assert a.probability({"correct": 0}, {"correct": 1}) == pytest.approx(0.8 * sigma(-4) + 0.1, abs=1e-15)


def test_ties_follow_rao_and_kupper():
    # D = .7, eta = .4 -> win .574442516811659, lose .24973989440488234, tie .17581758878345863
    chances = Annotator("a", "", {}, tau=1.0, tie_band=0.4).chances(0.7, 0.0)
    assert tuple(map(float, chances)) == pytest.approx((0.574442516811659, 0.17581758878345863, 0.24973989440488234), abs=1e-14)


def test_without_noise_the_better_one_wins_and_equals_tie():
    oracle = ANNOTATORS["oracle"]
    assert oracle.probability(GOOD, WRONG) == 1.0
    assert oracle.probability(GOOD, GOOD) == 0.5
    assert replace(ANNOTATORS["careful"], tau=1e-6, lapse=0.0).probability(GOOD, WRONG) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ANNOTATORS)
def test_probabilities_of_a_pair_and_its_mirror_sum_to_one(name):
    a = ANNOTATORS[name]
    for x, y in [(GOOD, WRONG), (POLITE, GUSHING), (HARMFUL, REFUSAL)]:
        for order in (-1, 0, 1):
            assert a.probability(x, y, order) + a.probability(y, x, -order) == pytest.approx(1.0, abs=1e-12)
        assert a.probability(x, y) == pytest.approx((a.probability(x, y, 1) + a.probability(x, y, -1)) / 2, abs=1e-12)


@pytest.mark.parametrize("name", ANNOTATORS)
def test_one_at_a_time_equals_all_at_once(name):
    a, many = ANNOTATORS[name], [GOOD, POLITE, WRONG, GUSHING, HARMFUL, REFUSAL, SYCOPHANT]
    x = matrix(many)
    np.testing.assert_allclose(a.utilities(x), [a.utility(f) for f in many], rtol=1e-13)
    one_by_one = [a.probability(f, g) for f, g in zip(many, many[::-1], strict=True)]
    np.testing.assert_allclose(a.probabilities(x, x[::-1]), one_by_one, rtol=1e-12)


@pytest.mark.slow
def test_choices_follow_the_exact_chances():
    rng, town, n = np.random.default_rng(3), panel("town"), 20_000
    for x, y in [(POLITE, GUSHING), (HARMFUL, REFUSAL)]:
        labels = [town.choose(x, y, rng) for _ in range(n)]
        share = np.mean([(c.value + 1) / 2 for c in labels])
        assert abs(share - town.probability(x, y)) < 4 * 0.5 / math.sqrt(n)
    drawn = {name: sum(c.annotator == name for c in labels) / n for name in PANELS["town"]}
    assert drawn == pytest.approx(PANELS["town"], abs=0.02)
    assert abs(np.mean([c.order for c in labels])) < 4 / math.sqrt(n)


def test_a_choice_depends_on_the_stream_only():
    first = [panel("town").choose(GOOD, POLITE, np.random.default_rng(i)) for i in range(50)]
    assert first == [panel("town").choose(GOOD, POLITE, np.random.default_rng(i)) for i in range(50)]


FIVE = [GOOD, POLITE, GUSHING, HARMFUL, REFUSAL]


def above(rankings) -> np.ndarray:
    """[n, n] how often row i was ranked above row j."""
    places = np.argsort(rankings)
    return (places[:, :, None] < places[:, None, :]).mean(0)


@pytest.mark.parametrize("lapse", [0.0, 0.3])
def test_pairs_in_rankings_follow_the_exact_probabilities(lapse):
    """Plackett and Luce's pairs are Bradley and Terry's, however many other answers there are."""
    a, x, rng, n = replace(ANNOTATORS["warm"], tau=0.4, lapse=lapse, position=0.0), matrix(FIVE), np.random.default_rng(8), 10_000
    rankings = [a.rank(x, rng) for _ in range(n)]
    assert all(sorted(ranking) == list(range(5)) for ranking in rankings[:100])
    exact = np.array([[a.probability(f, g) for g in FIVE] for f in FIVE])
    assert 0.02 < exact[0, 1] < 0.98
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_array_less(np.abs(above(rankings) - exact)[off], 4 * 0.5 / math.sqrt(n))


def test_a_ranking_is_plackett_and_luces():
    """P(1st) P(2nd | 1st) ...: each place is a softmax of the utilities over tau among those that are left."""
    a, rng, n = Annotator("a", "", {"correct": 1.0}, tau=0.5), np.random.default_rng(4), 10_000
    x = matrix([{"correct": c} for c in (0.0, 0.5, 1.0)])
    weight = np.exp(a.utilities(x) / 0.5)
    drawn = [tuple(a.rank(x, rng)) for _ in range(n)]
    for order in itertools.permutations(range(3)):
        exact = weight[order[0]] / weight.sum() * weight[order[1]] / weight[list(order[1:])].sum()
        assert abs(drawn.count(order) / n - exact) < 4 * math.sqrt(exact / n), order


def test_being_shown_first_is_worth_its_position_in_a_ranking_too():
    """Of two answers exactly: half of the time sigma((d + position) / tau), half of the time sigma((d - position) / tau)."""
    a, rng, n = Annotator("a", "", {"correct": 1.0}, tau=0.5, position=2.0), np.random.default_rng(5), 10_000
    pair = [{"correct": 1.0}, {"correct": 0.0}]
    share = np.mean([a.rank(matrix(pair), rng)[0] == 0 for _ in range(n)])
    assert a.probability(*pair) == pytest.approx((sigma(6) + sigma(-2)) / 2)
    assert abs(share - a.probability(*pair)) < 4 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("annotator", [replace(ANNOTATORS["warm"], tau=0.0, lapse=0.0), ANNOTATORS["ai"], ANNOTATORS["oracle"]])
def test_without_noise_a_ranking_is_that_of_the_utilities(annotator):
    by_hand = sorted(range(5), key=lambda i: -annotator.utility(FIVE[i]))
    assert len({annotator.utility(f) for f in FIVE}) == 5
    assert by_hand != list(range(5))
    assert {tuple(annotator.rank(matrix(FIVE), np.random.default_rng(i))) for i in range(20)} == {tuple(by_hand)}


def test_a_panel_draws_its_members_by_weight():
    town, rng, n = panel("town"), np.random.default_rng(6), 10_000
    drawn = [town.draw(rng).name for _ in range(n)]
    assert {name: drawn.count(name) / n for name in PANELS["town"]} == pytest.approx(PANELS["town"], abs=0.02)
    never = Panel("x", ((ANNOTATORS["ai"], 0.0), (ANNOTATORS["warm"], 1.0)))
    assert {never.draw(rng).name for _ in range(200)} == {"warm"}


def test_rankings_by_the_town_agree_with_its_probabilities():
    """As collected: a member drawn by weight, then its ranking. The position bias shrinks among five answers, so the margin is wider."""
    town, x, rng, n = panel("town"), matrix(FIVE), np.random.default_rng(9), 10_000
    found = above([town.draw(rng).rank(x, rng) for _ in range(n)])
    exact = np.array([[town.probability(f, g) for g in FIVE] for f in FIVE])
    off = ~np.eye(5, dtype=bool)
    assert np.abs(found - exact)[off].max() < 0.03


def test_every_bias_does_what_its_name_says():
    plain = Annotator("plain", "", {"correct": 2.0, "wrong": -1.0, "endorses_false": -1.0, "finished": 1.0}, tau=1.0)
    even = plain.probability(GOOD, GOOD)
    assert even == 0.5
    assert replace(plain, position=0.5).probability(GOOD, GOOD, 1) == pytest.approx(sigma(0.5))
    assert replace(plain, flourish=0.2).probability(GUSHING, GOOD) == pytest.approx(sigma(0.6))
    assert replace(plain, length=0.1).probability(GUSHING, GOOD) == pytest.approx(sigma(1.8))
    assert replace(plain, agreement=2.0).probability(SYCOPHANT, WRONG) == pytest.approx(sigma(1.0))
    assert plain.probability(SYCOPHANT, WRONG) == pytest.approx(sigma(-1.0))
    assert replace(plain, fluency=1.0).probability(GOOD, WRONG) == 0.5


def test_a_greedy_rater_repeats_itself_and_keeps_its_confidence():
    ai = ANNOTATORS["ai"]
    assert ai.probability(GOOD, WRONG) == 1.0
    assert 0.5 < ai.confidence(POLITE, GOOD) < 1.0
    assert {ai.choose(POLITE, GOOD, np.random.default_rng(i)).value for i in range(20)} == {1}


def test_principles_can_be_turned_up_by_name():
    helpful, harmless = principled("h", {"helpful": 1.0}), principled("s", {"helpful": 1.0, "harmless": 2.0})
    assert helpful.probability(HARMFUL, REFUSAL) == 1.0
    assert harmless.probability(HARMFUL, REFUSAL) == 0.0
    with pytest.raises(UserError, match="harmless"):
        principled("x", {"harmles": 1.0})


def test_panels_are_mixtures_with_explicit_weights():
    town = panel("town")
    expected = sum(w * ANNOTATORS[name].probability(POLITE, WRONG) for name, w in PANELS["town"].items())
    assert town.probability(POLITE, WRONG) == pytest.approx(expected, abs=1e-12)
    assert panel("warm").members == ((ANNOTATORS["warm"], 1.0),)
    assert panel({"warm": 0.5, "ai": 0.5}).probability(GOOD, WRONG) == pytest.approx((ANNOTATORS["warm"].probability(GOOD, WRONG) + 1) / 2)
    with pytest.raises(UserError, match="'town'"):
        panel("twon")
    with pytest.raises(ValueError, match="sum to 1"):
        Panel("x", ((ANNOTATORS["warm"], 0.5),))
    assert all(abs(sum(weights.values()) - 1) < 1e-9 for weights in PANELS.values())


def test_an_unknown_feature_is_refused():
    with pytest.raises(ValueError, match="corect"):
        Annotator("x", "", {"corect": 1.0})


def test_every_annotator_prefers_right_to_wrong_and_whole_to_broken():
    broken = {"gibberish": 1.0, "words": 8.0, "needed": 8.0}
    for a in ANNOTATORS.values():
        assert a.utility(WRONG) > a.utility(broken), a.name
        assert a.utility(GOOD) > a.utility(WRONG) or (a.fluency == 1 and a.utility(GOOD) == a.utility(WRONG)), a.name


def test_the_characters_differ_where_they_should():
    by = ANNOTATORS
    assert by["flattered"].probability(SYCOPHANT, FRANK) > 0.5 > by["careful"].probability(SYCOPHANT, FRANK)
    assert by["warm"].probability(GUSHING, GOOD) > by["careful"].probability(GUSHING, GOOD) + 0.2
    assert by["verbose"].probability(GUSHING, GOOD) > by["careful"].probability(GUSHING, GOOD) + 0.2
    assert by["safety_first"].probability(REFUSAL, HARMFUL) > 0.85
    assert by["ai"].probability(REFUSAL, HARMFUL) == 1.0


def test_agreement_is_exact():
    p, rng = np.array([0.9, 0.6, 0.2]), np.random.default_rng(0)
    first, second = rng.random((200_000, 3)) < p, rng.random((200_000, 3)) < p
    assert agreement(p, p) == pytest.approx((first == second).mean(), abs=0.005)
    assert agreement(np.ones(3), p) == pytest.approx(p.mean())
    x = matrix([GOOD, POLITE]), matrix([WRONG, GUSHING])
    people = panel({"careful": 0.5, "warm": 0.5})
    assert panel_agreement(Panel("m", (*((m, w / 2) for m, w in people.members), (ANNOTATORS["ai"], 0.5))), *x) == pytest.approx(
        panel_agreement(people, *x)
    )


def test_features_are_those_of_the_gold_score():
    assert matrix([{}]).shape == (1, len(FEATURES))
