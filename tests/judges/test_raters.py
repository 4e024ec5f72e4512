"""The simulated annotators as raters of pairs and rankings."""

from itertools import combinations

import numpy as np
import pytest

from temper.judges.annotators import Annotators, ceiling, extremes
from temper.records import Ranked
from temper.world import Ask, dataset, features, gold
from temper.world.annotators import matrix, panel
from temper.world.oracles import enumerate_answers


@pytest.fixture(scope="module")
def case():
    prompt = dataset("enumerable", n=1, seed=1)[0]
    answers = enumerate_answers(Ask.of(prompt), limit=400)
    return prompt, answers[0], answers[-1]


def test_labels_follow_the_panel(case):
    """Over many labels each answer is chosen as often as the panel's exact probability says; meta names that of the chosen."""
    prompt, a, b = case
    raters = Annotators("town", seed=0)
    ask = Ask.of(prompt)
    p = float(panel("town").probabilities(matrix([features(ask, a)]), matrix([features(ask, b)]))[0])
    n = 600
    labels = [raters.label(prompt, a, b, index=i) for i in range(n)]
    # a tie counts half for each, as it does in the panel's probability
    won = np.mean([0.5 if x.soft == 0.5 else float(x.chosen == a) for x in labels])
    assert abs(won - p) < 4 * np.sqrt(p * (1 - p) / n)
    for x in labels[:50]:
        first = x.chosen == a
        assert {x.chosen, x.rejected} == {a, b}
        assert x.meta["probability"] == pytest.approx(p if first else 1 - p)
        gap = gold(ask, a).total - gold(ask, b).total
        assert x.meta["gold_gap"] == pytest.approx(gap if first else -gap)
        assert x.meta["ask"] == prompt.meta["ask"]
    assert len({x.meta["annotator"] for x in labels}) > 1


def test_a_label_depends_on_seed_and_index_only(case):
    prompt, a, b = case
    many = [Annotators("town", seed=s).label(prompt, a, b, index=i) for s in (0, 1) for i in range(40)]
    again = [Annotators("town", seed=s).label(prompt, a, b, index=i) for s in (0, 1) for i in range(40)]
    assert many == again
    assert many[:40] != many[40:]


def some(answers, n):
    """n of them, from the best to the worst."""
    return [answers[round(k * (len(answers) - 1) / (n - 1))] for k in range(n)]


@pytest.fixture(scope="module")
def several(case):
    prompt, *_ = case
    ask = Ask.of(prompt)
    return some(sorted(enumerate_answers(ask, limit=400), key=lambda answer: -gold(ask, answer).total), 5)


def test_rankings_follow_the_panel(case, several):
    """Over many rankings each answer is above each other one about as often as the panel's exact probability says; meta names these."""
    prompt, raters, ask, n = case[0], Annotators("town", seed=0), Ask.of(case[0]), 800
    x = matrix([features(ask, answer) for answer in several])
    exact = {(a, b): float(panel("town").probabilities(x[[i]], x[[j]])[0]) for i, a in enumerate(several) for j, b in enumerate(several)}
    rankings = [raters.rank(prompt, several, index=i) for i in range(n)]
    for a, b in combinations(several, 2):
        above = np.mean([r.answers.index(a) < r.answers.index(b) for r in rankings])
        assert abs(above - exact[a, b]) < 4 * 0.5 / np.sqrt(n) + 0.02, (a, b)  # .02: position counts a little less among five
    for r in rankings[:50]:
        assert sorted(r.answers) == sorted(several)
        assert r.meta["probabilities"] == pytest.approx([exact[pair] for pair in combinations(r.answers, 2)])
        assert r.meta["gold"] == [gold(ask, answer).total for answer in r.answers]
        assert r.meta["ask"] == prompt.meta["ask"]
        assert r.prompt == prompt.messages
    assert {r.meta["annotator"] for r in rankings} == {member.name for member, _ in panel("town").members}
    assert len({tuple(r.answers) for r in rankings}) > 5


def test_the_oracle_ranks_by_gold(case, several):
    turned = [*several[2:], *several[:2]]
    ranking = Annotators("oracle", seed=0).rank(case[0], turned, index=0)
    assert ranking.meta["gold"] == sorted(ranking.meta["gold"], reverse=True)
    assert len(set(ranking.meta["gold"])) > 3
    assert set(ranking.meta["probabilities"]) <= {1.0, 0.5}


def test_a_ranking_depends_on_seed_and_index_only(case, several):
    many = [Annotators("town", seed=s).rank(case[0], several, index=i) for s in (0, 1) for i in range(40)]
    again = [Annotators("town", seed=s).rank(case[0], several, index=i) for s in (0, 1) for i in range(40)]
    assert many == again
    assert many[:40] != many[40:]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_extremes_of_a_ranking(case, several, n):
    prompt, ask = case[0], Ask.of(case[0])
    ranking = Annotators("town", seed=3).rank(prompt, several[:n], index=7)
    pair = extremes(ranking)
    assert (pair.chosen, pair.rejected, pair.soft, pair.margin) == (ranking.answers[0], ranking.answers[-1], 1.0, None)
    one, other = (matrix([features(ask, answer)]) for answer in (pair.chosen, pair.rejected))
    assert pair.meta["probability"] == pytest.approx(float(panel("town").probabilities(one, other)[0]))
    assert pair.meta["gold_gap"] == pytest.approx(gold(ask, pair.chosen).total - gold(ask, pair.rejected).total)
    assert pair.meta["annotator"] == ranking.meta["annotator"]
    assert pair.prompt == prompt.messages
    assert not pair.meta.keys() & {"gold", "probabilities"}
    assert "probabilities" in ranking.meta  # the ranking itself is left as it was


def test_the_ceiling():
    """Over all comparisons: a ranking of three counts three times."""
    ask = [{"role": "user", "content": "x"}]
    rankings = [
        Ranked(prompt=ask, answers=list("abc"), meta={"probabilities": [0.9, 0.2, 0.5]}),
        Ranked(prompt=ask, answers=list("ab"), meta={"probabilities": [0.6]}),
    ]
    assert ceiling(rankings) == pytest.approx((0.9 + 0.8 + 0.5 + 0.6) / 4)
