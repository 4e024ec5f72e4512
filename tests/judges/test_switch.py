"""Llama 2's piecewise reward, and the world's gold score as a rater."""

import math

import pytest

from temper.config import UserError
from temper.judges.rating import Answer, rater
from temper.judges.switch import SafetySwitch, switch
from temper.records import Prompt
from temper.world import Ask, dataset, gold


class Given:
    def __init__(self, name, ratings):
        self.name, self.ratings = name, ratings

    def rate(self, answers):
        return self.ratings


def asked(*texts):
    return [Answer(Prompt(messages=[{"role": "user", "content": text}]), [1], [2], "x", True) for text in texts]


def test_safety_below_the_threshold_or_where_the_prompt_is_about_it_else_helpfulness():
    logit = math.log(0.15 / 0.85)
    safe = Given("safe", [logit - 0.01, logit + 0.01, 3.0, None, None, 3.0])
    helpful = Given("helpful", [5.0, 6.0, 7.0, 8.0, 9.0, None])
    answers = asked("calm", "calm", "danger", "danger", "calm", "calm")
    told = SafetySwitch(safe, helpful, about_safety=lambda prompt: prompt.messages[0].content == "danger")
    assert told.rate(answers) == [logit - 0.01, 6.0, 3.0, None, None, None]
    assert told.name == "safe where safety is at stake, else helpful"
    assert switch([safe, helpful]).rate(answers) == [logit - 0.01, 6.0, 7.0, None, None, None]
    white = SafetySwitch(Given("s", [0.0, 0.0, None]), Given("h", [1.0, 3.0, 2.0]), whiten=True).rate(asked("a", "b", "c"))
    assert white == [-1.0, 1.0, None]
    with pytest.raises(ValueError, match="threshold 1"):
        SafetySwitch(safe, helpful, threshold=1)


def test_gold_and_its_parts():
    prompt = dataset("prompts", n=1)[0]
    answers = [Answer(prompt, [1], [2], text, True) for text in ("I do not know.", "Good day.")]
    scores = [gold(Ask.of(prompt), a.text) for a in answers]
    assert rater("gold").rate(answers) == [s.total for s in scores]
    assert rater("gold:concise").rate(answers) == [s.concise for s in scores]
    assert rater("gold").rate(asked("hello")) == [None]
    with pytest.raises(UserError, match="gold has no part 'beauty'; there are total, helpful"):
        rater("gold:beauty")
    with pytest.raises(UserError, match="runs/none: no such folder"):
        rater("runs/none")
