"""Online DPO: which pairs come of a rollout, what is counted, that the rating rises."""

import pytest
import torch
from toy import train, values_of

from temper.config import UserError, build
from temper.data.packing import Order
from temper.forest import plant
from temper.judges.rating import Answer
from temper.losses.preference import RULES
from temper.methods import online
from temper.methods.base import Asked
from temper.methods.preference import make_loss
from temper.models.load import load_policy
from temper.rollout import Rollout
from temper.runs import Run
from temper.train import TrainingError


class Wishes:
    """A rater of the tests: a function of an answer."""

    name = "wishes"

    def __init__(self, wish):
        self.wish = wish

    def rate(self, answers):
        return [self.wish(a) for a in answers]


@pytest.fixture
def rated_by(monkeypatch):
    return lambda wish: monkeypatch.setattr(online, "rater", lambda *given, **how: Wishes(wish))


def says(tokens, logp=-1.0, finish="stop"):
    return Rollout(tokens, [logp] * len(tokens), finish)


def test_the_best_and_the_worst_of_a_prompt_become_a_pair():
    group = online.Group([1, 2], [says([3]), says([4, 4]), says([5]), says([6])], [0.5, None, 2.0, -1.0])
    tree = group.tree()
    tree[3].labels = {**tree[3].labels, "ref_logp": -7.0}
    prompt, best, worst = group.pair(tree)
    assert [list(s.tokens) for s in (prompt, best, worst)] == [[1, 2], [5], [6]]
    assert [s.labels["rank"] for s in (prompt, best, worst)] == [-1, 0, 1]
    assert best.labels["margin"] == 3.0  # by how much, for rules with an offset
    assert best.labels["ref_logp"] == -7.0


@pytest.mark.parametrize("ratings", [[None, None], [None, 1.0], [1.0, 1.0]])
def test_no_pair_where_no_two_ratings_differ(ratings):
    group = online.Group([1], [says([3]), says([4])], ratings)
    assert group.pair(group.tree()) is None


@pytest.mark.parametrize("rule", RULES)
def test_a_rollout_without_a_pair_moves_nothing(toy, rule):
    """Not by a rounding error either, of which Adam would make a step."""
    model, tokenizer = load_policy(toy.sft)
    ids = tokenizer.encode("It is red.", add_special_tokens=False)
    tree = online.Group(ids, [says(ids), says(ids[::-1])], [1.0, 1.0]).tree()
    tree[1].labels = {**tree[1].labels, "ref_logp": -9.0}
    loss = make_loss(RULES[rule], {})(model, plant([online._alone(tree)], {"records": 1.0})).terms["preference"].total
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_what_is_counted():
    groups = [
        online.Group([1], [says([3, 3]), says([4], finish="length")], [1.0, 3.0]),
        online.Group([2], [says([3], -2.0), says([4, 4])], [None, 2.0]),
    ]
    trees = [group.tree() for group in groups]
    for tree in trees:
        for segment in tree[1:]:
            segment.labels = {**segment.labels, "ref_logp": segment.labels["sampler_logp"] - 0.5}
    found = online._summary(groups, trees, 1)
    assert found == pytest.approx(
        {
            "unrated": 0.25,
            "alike": 0.5,
            "entropy": 7 / 6,
            "length": 1.5,
            "truncated": 0.25,
            "reward": 2.0,
            "gap": 1.0,
            "kl": 0.5,
            "kl_error": 0.0,
        }
    )


@pytest.mark.slow
def test_the_rating_rises(toy, tmp_path, rated_by):
    """Short answers are wished for; half of the raters' answers are missing, and none counts as 0."""
    rated_by(lambda a: None if len(a.tokens) % 4 == 3 else -float(len(a.tokens)))  # at last all alike, which stops nothing
    values = values_of("online-dpo", toy) | {
        "rollouts": 25,
        "prompts_per_step": 18,
        "lr": 1e-2,
        "samples_per_prompt": 3,
        "missing_eos": None,
    }
    train("online-dpo", tmp_path / "out", **values)
    rows = [row for row in Run(tmp_path / "out").rows("metrics") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert max(row["sampler_gap"] for row in rows) < 1e-4
    assert any(0 < row["unrated"] < 1 for row in rows)
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1


def test_unfinished_answers_are_rated_no_higher_than_said(toy, rated_by):
    s = build(online.settings("online-dpo"), values_of("online-dpo", toy))
    source = online.Pairs(s, None, None, None, Asked([], [], Order([1]), {}, None, []), None)
    answer = Answer(None, [1], [2], "", False)
    assert source._capped(answer, 5.0) == -1.0
    assert source._capped(answer, -5.0) == -5.0
    assert source._capped(answer, None) is None
    assert source._capped(answer._replace(ended=True), 5.0) == 5.0


@pytest.mark.parametrize(
    ("wish", "what"),
    [
        (lambda a: None, r"100% of the answers had no rating by wishes \(gave no score\)"),
        (lambda a: 1.0, "the others to a prompt were rated alike"),
    ],
)
def test_a_rater_that_never_prefers(toy, tmp_path, rated_by, wish, what):
    rated_by(wish)
    with pytest.raises(TrainingError, match=f"4 rollouts gave no pair: .*{what}"):
        train("online-dpo", tmp_path / "out", **values_of("online-dpo", toy) | {"missing_eos": None})


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"rule": "ippo"}, "--rule ippo: no such rule; there are dpo, "),
        ({"tau": 0.1}, "--tau: the rule dpo has no such setting; it has --beta, --label-smoothing, --offset"),
        ({"beta": 0}, "beta.*greater than 0"),
        ({"temperature": 0}, "temperature 0.*give a temperature above 0"),
        ({"samples_per_prompt": 1}, "samples_per_prompt.*greater than or equal to 2"),
    ],
)
def test_what_cannot_be_asked(toy, tmp_path, more, what):
    with pytest.raises(UserError, match=what):
        train("online-dpo", tmp_path / "out", **values_of("online-dpo", toy) | more)
    assert not (tmp_path / "out").exists()


def test_any_rule_by_name_with_its_own_settings(toy, tmp_path):
    values = values_of("online-dpo", toy) | {"rollouts": 2}
    train("online-dpo", tmp_path / "ipo", **values | {"rule": "ipo", "tau": 0.25})
    assert "tau 0.25, log_ratios summed" in Run(tmp_path / "ipo").stage["card"]["rule"]
    assert Run(tmp_path / "ipo").rows("metrics")[0]["loss"] == pytest.approx(4.0, abs=1e-3)
    train("online-dpo", tmp_path / "simpo", **values | {"rule": "simpo"})  # no reference: none is held, and no KL is known
    assert "kl" not in Run(tmp_path / "simpo").rows("metrics")[0]
