import json
from pathlib import Path

import pytest

from temper.stats.process import AGGREGATES, aggregate, first_error, located, monte_carlo_error

PRM = json.loads((Path(__file__).parents[1] / "losses" / "vectors.json").read_text())["prm"]
A, B = (0.95, 0.9, 0.85, 0.6, 0.98), (0.9,) * 9


@pytest.mark.parametrize(("p", "want"), [(A, PRM["A"]), (B, PRM["B"])])
def test_aggregates(p, want):
    names = {"product": "prod", "minimum": "min", "last": "last", "mean": "mean"}
    assert names.keys() == AGGREGATES.keys()
    for how, name in names.items():
        assert aggregate(p, how) == pytest.approx(want[name], abs=1e-12)


def test_product_and_minimum_disagree_and_nothing_has_no_score():
    assert aggregate(A, "product") > aggregate(B, "product")
    assert aggregate(A, "minimum") < aggregate(B, "minimum")
    with pytest.raises(ValueError, match="without steps"):
        aggregate([], "minimum")


def test_errors_of_hard_labels():
    found = monte_carlo_error(8, right=0.15, wrong=0.1)
    assert found.false_negative == pytest.approx(PRM["hard_false_neg_p015_N8"], abs=1e-12)
    assert found.false_positive == pytest.approx(PRM["hard_false_pos_q01_N8"], abs=1e-12)


def test_first_errors():
    assert first_error([0.9, None, 0.4, 0.1]) == 2
    assert first_error([0.9, 0.5]) == -1
    found = located([2, 0, -1, -1, 1], [2, 1, -1, -1, -1])
    assert found.wrong.mean == 0.5
    assert found.right.mean == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert located([1], [1]).f1 is None
