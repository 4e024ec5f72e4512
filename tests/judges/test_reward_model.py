"""A reward model as a rater: by the policy's tokens as by text, prompts shared; another tokenizer is refused, or asked by text."""

import shutil

import pytest
from toy import user

from temper.config import UserError
from temper.data.template import render_chat, render_prompt
from temper.judges.rating import Answer, rater
from temper.judges.reward_model import RewardModel
from temper.models.load import load_tokenizer
from temper.records import Message, Prompt

ASKED = [
    ("What colour is the Sea Star?", ["It is red.", "red.", "The boat is blue, I think."]),
    ("Tell me the colour of the Old Tom.", ["It is blue."]),
]


@pytest.fixture(scope="module")
def sampled(toy):
    """Answers as a policy with the reward model's tokenizer samples them, end token included."""
    tokenizer = load_tokenizer(toy.reward)
    out = []
    for ask, texts in ASKED:
        prompt = Prompt.model_validate({"messages": user(ask)})
        ids = render_prompt(tokenizer, prompt.messages)
        for text in texts:
            whole, _ = render_chat(tokenizer, [*prompt.messages, Message(role="assistant", content=text)], "last")
            assert whole[: len(ids)] == ids
            out.append(Answer(prompt, ids, whole[len(ids) :], text, True))
    return out


@pytest.mark.parametrize("budget", [1, 60, 8192])
def test_rate_is_score_answers_and_a_group_shares_its_prompt(toy, sampled, budget, monkeypatch):
    model = RewardModel(toy.reward)
    tokens = []
    score = model.score
    monkeypatch.setattr(model, "score", lambda forest, at: (tokens.append(forest.T), score(forest, at))[1])
    rated = model.rate(sampled, budget)
    assert sum(tokens) == sum(len(a.tokens) for a in sampled) + sum(len(a.prompt_ids) for a in (sampled[0], sampled[3]))
    text = model.score_answers([a.prompt.messages for a in sampled], [a.text for a in sampled], budget)
    assert rated == pytest.approx(text, abs=2e-5)
    assert len(set(text)) == 4


def test_the_same_by_tokens_by_text_and_in_a_mixture(toy, sampled):
    want = RewardModel(toy.reward).rate(sampled)
    tokenizer = load_tokenizer(toy.sft)
    assert rater(toy.reward, tokenizer=tokenizer).rate(sampled) == want
    assert rater(toy.reward).rate(sampled) == pytest.approx(want, abs=2e-5)
    mixed = rater(f"0.5*{toy.reward} + 2*format:^It", tokenizer=tokenizer).ratings(sampled)
    assert mixed.scores == pytest.approx([0.5 * w + 2 * a.text.startswith("It") for w, a in zip(want, sampled, strict=True)])
    assert mixed.parts == {toy.reward: want, "format:^It": [1, 0, 0, 1]}


def test_another_tokenizer_is_refused_or_asked_by_text(toy, sampled, tmp_path):
    other = shutil.copytree(toy.reward, tmp_path / "other")
    folder = next(p.parent for p in other.rglob("tokenizer.json"))
    tokenizer = load_tokenizer(toy.sft)
    changed = load_tokenizer(str(folder))
    changed.add_tokens(["qqq"])
    changed.save_pretrained(folder)
    with pytest.raises(UserError, match=rf"{other}: its tokenizer is not that of the policy; .* text:{other}$"):
        rater(f"gold + {other}", tokenizer=tokenizer)
    assert rater(f"text:{other}", tokenizer=tokenizer).rate(sampled) == pytest.approx(RewardModel(toy.reward).rate(sampled), abs=2e-5)


def test_a_conversation_beyond_its_window_is_masked(toy, sampled):
    long = sampled[0]._replace(text="red " * 500)
    found = rater(toy.reward).ratings([sampled[0], long])
    assert found.scores[0] is not None
    assert found.scores[1] is None
    assert found.failures[toy.reward].first.endswith("tokens, its window is 160")
