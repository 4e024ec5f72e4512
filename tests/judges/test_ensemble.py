import json
from pathlib import Path

import pytest

from temper.config import UserError
from temper.judges.ensemble import mean, members, on_one_scale, uwo, worst
from temper.judges.rating import Answer
from temper.records import Message, Prompt

WANT = json.loads((Path(__file__).parents[1] / "losses" / "vectors.json").read_text())["ensemble"]
ONE = Answer(Prompt(messages=[Message(role="user", content="?")]), [1], [2], "yes", True)


class Says:
    def __init__(self, *scores):
        self.name, self.scores = "says", list(scores)

    def rate(self, answers):
        return self.scores[: len(answers)]


FIVE = [Says(x) for x in (1, 2, 3, 0.5, 1.5)]


def test_vectors():
    assert mean(FIVE).rate([ONE]) == [pytest.approx(WANT["mean"])]
    assert worst(FIVE).rate([ONE]) == [pytest.approx(WANT["wco"])]
    assert uwo(FIVE, lam=0.5).rate([ONE]) == [pytest.approx(WANT["uwo_lambda0p5"])]
    assert uwo(FIVE, lam=0).rate([ONE]) == [pytest.approx(WANT["mean"])]


def test_what_a_member_cannot_rate_has_no_score():
    assert mean([Says(1, None, 3), Says(2, 2, 2)]).rate([ONE] * 3) == [1.5, None, 2.5]
    assert worst([Says(None), Says(2)]).rate([ONE]) == [None]


def test_bad_ensembles():
    with pytest.raises(UserError, match="no members"):
        mean([])
    with pytest.raises(UserError, match="lam -1 would reward"):
        uwo(FIVE, lam=-1)


def test_members_on_one_scale():
    """Another constant and another unit of a member's scores make no difference after it."""
    a, b = Says(1.0, 2.0, 3.0, None), Says(-10.0, 0.0, 10.0, 5.0)
    one, other = (member.rate([ONE] * 4) for member in on_one_scale([a, b], [ONE] * 3))
    assert one[:3] == pytest.approx(other[:3])
    assert one[3] is None
    assert sum(one[:3]) == pytest.approx(0)
    with pytest.raises(UserError, match="rates 1 of 1 answers"):
        on_one_scale([a], [ONE])


def test_a_folder_of_one_is_an_ensemble_of_one(toy):
    assert [member.name for member in members(toy.reward)] == [toy.reward]
