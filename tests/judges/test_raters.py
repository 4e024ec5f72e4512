"""The simulated annotators as raters of pairs."""

import numpy as np
import pytest

from temper.judges.annotators import Annotators, ceiling
from temper.records import Pair
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


def test_the_ceiling():
    rows = [Pair(prompt=[{"role": "user", "content": "x"}], chosen="a", rejected="b", meta={"probability": p}) for p in (0.9, 0.2, 0.5)]
    assert ceiling(rows) == pytest.approx((0.9 + 0.8 + 0.5) / 3)
