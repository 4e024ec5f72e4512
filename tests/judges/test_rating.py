"""The grammar of --reward, mixtures and functions of raters, and what they tell of their parts."""

import pytest

from temper.config import UserError
from temper.judges import rating
from temper.judges.rating import FUNCTIONS, RATERS, Answer, Checked, Failure, Missing, ask, function, least_and_most, parse, rater, reads
from temper.records import Message, Prompt


class Fixed(Checked):
    """Scores as they are given; what is text is missing."""

    def __init__(self, argument, context, *, add=0.0, flip=False, n=1):
        self.values = [Missing(v) if v.isalpha() else float(v) for v in argument.split("/")]
        self.add, self.flip = add, flip

    def score(self, answers):
        return [v if isinstance(v, Missing) else (v + self.add) * (-1 if self.flip else 1) for v in self.values]


class Plain:
    """A rater that only rates."""

    def __init__(self, members, lam=1.0):
        self.name, self.members, self.lam = "least", members, lam

    def rate(self, answers):
        columns = zip(*(m.rate(answers) for m in self.members), strict=True)
        return [None if None in column else self.lam * min(column) for column in columns]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(RATERS, "fixed", Fixed)
    monkeypatch.setitem(FUNCTIONS, "least", Plain)


ANSWERS = [Answer(Prompt(messages=[Message(role="user", content="?")]), (), (), text, True) for text in "abc"]


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("fixed:1/2/3", [1, 2, 3]),
        ("0.5*fixed:1/2/3", [0.5, 1, 1.5]),
        ("0.7*fixed:1/2/3 + 0.3*fixed:3/2/1", [1.6, 2, 2.4]),
        ("fixed:1/2/3 - 2*fixed:1/1/1", [-1, 0, 1]),
        ("-2 * fixed:1/2/3 + .5*fixed:2/2/2", [-1, -3, -5]),
        ("1e1*fixed:1/2/3", [10, 20, 30]),
        ("fixed:1/2/3?add=1&flip=yes", [-2, -3, -4]),
        ("least(fixed:1/2/3, fixed:3/2/1)", [1, 2, 1]),
        ("least(fixed:1/2/3, fixed:3/2/1; lam=2)", [2, 4, 2]),
        ("2*least(0.5*fixed:1/2/3 + fixed:0/0/9, least(fixed:3/2/1)) + fixed:0/0/1", [1, 2, 3]),
        ("fixed:'1/2/3'", [1, 2, 3]),
    ],
)
def test_what_a_spec_means(spec, want):
    assert rater(spec).rate(ANSWERS) == pytest.approx(want)
    assert rater(spec).name == spec


def test_none_stays_none():
    """In the sum where its part has a weight, in a function of raters; never 0; told by part, with the first reason."""
    spec = "fixed:1/x/3 + 0.5*fixed:2/2/y + 0*fixed:z/z/z"
    found = rater(spec).ratings(ANSWERS)
    assert found.scores == [2, None, None]
    assert found.missing == 2
    assert found.parts == {"fixed:1/x/3": [1, None, 3], "fixed:2/2/y": [2, 2, None], "fixed:z/z/z": [None] * 3}
    assert found.failures == {"fixed:1/x/3": Failure(1, "x"), "fixed:2/2/y": Failure(1, "y"), "fixed:z/z/z": Failure(3, "z")}
    assert found.means() == {"fixed:1/x/3": 2, "fixed:2/2/y": 2}
    inside = rater("least(fixed:1/x/3, fixed:2/2/2) + fixed:1/1/1").ratings(ANSWERS)
    assert inside.scores == [2, None, 3]
    assert inside.parts == {
        "least(fixed:1/x/3, fixed:2/2/2)": [1, None, 2],
        **{"fixed:1/x/3": [1, None, 3], "fixed:2/2/2": [2, 2, 2], "fixed:1/1/1": [1, 1, 1]},
    }
    assert inside.failures == {"fixed:1/x/3": Failure(1, "x")}


def test_any_rater_is_checked():
    class Odd:
        name = "odd"

        def __init__(self, scores):
            self.scores = scores

        def rate(self, answers):
            return self.scores

    assert ask(Odd([1.0, float("nan"), None]), ANSWERS) == ([1, None, None], {}, {"odd": Failure(2, "gave nan")})
    assert ask(Odd([1.0]), ANSWERS) == ([None] * 3, {}, {"odd": Failure(3, "gave 1 scores for 3 answers")})
    assert ask(Odd([1, 2, float("inf")]), ANSWERS).scores == [1, 2, None]


def test_a_function_can_be_added_by_a_decorator(monkeypatch):
    monkeypatch.setattr(rating, "FUNCTIONS", dict(FUNCTIONS))

    @function
    def second(members):
        return members[1]

    assert rater("second(fixed:1/2/3, fixed:4/5/6)").rate(ANSWERS) == [4, 5, 6]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("mahts", "no rater 'mahts' and no such folder; did you mean 'maths'?"),
        ("zzz", "no rater 'zzz' and no such folder; there are gold, maths, format, code, python, text, fixed, the functions mean(...), "),
        ("leest(gold)", "no function 'leest'; did you mean 'least'?"),
        ("gold + gold", "gold stands there twice; write it once, with the sum of its weights"),
        ("least(gold, gold + gold)", "gold stands there twice"),
        ("", "a rater is missing; write for example 0.7*runs/reward + 0.3*maths"),
        ("gold + ", "a rater is missing"),
        ("0.5*", "a rater is missing"),
        ("least()", "a rater is missing"),
        ("least(gold", ") is missing; put quotes around"),
        ("least(gold; lam)", "lam is ''; give a number, as in lam=1.0"),
        ("least(gold; lam=nan)", "lam is 'nan'; give a number"),
        ("least(gold; lem=1)", "no option 'lem'; there are lam"),
        ("fixed:1?flip=true", "flip is 'true'; give yes or no"),
        ("fixed:1?n=1.5", "n is '1.5'; give a number, as in n=1"),
        ("maths?sec=3", "no option 'sec'; there are seconds"),
        ("'gold", "' is missing"),
    ],
)
def test_what_cannot_be_read(spec, why):
    with pytest.raises(UserError) as caught:
        parse(spec)
    assert str(caught.value).startswith(f"--reward {spec!r}: {why}")


def test_what_it_depends_on(tmp_path):
    spec = f"0.5*{tmp_path} + least(org/model, text:runs/b; lam=2) + python:my.py:f?seconds=3 + format:schema=s.json + gold"
    assert reads(spec) == [str(tmp_path), "org/model", "runs/b", "my.py", "s.json"]
    assert reads("maths + format:^a+$") == []


def test_the_least_and_the_most():
    assert least_and_most([3, None, 1, 2, 5, 4], 2) == ([2, 3], [4, 5])
    assert least_and_most([3, None, 1], 5) == ([2], [0])
    assert least_and_most([3], 2) == ([0], [])
    assert least_and_most([None], 2) == ([], [])
