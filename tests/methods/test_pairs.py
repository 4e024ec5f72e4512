"""Reward model and DPO: what they compute on pairs, checked with plain forward passes of transformers."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from toy import result, train, user, values_of, write
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from temper.config import UserError, build
from temper.data.sources import read
from temper.data.split import split
from temper.data.template import render_chat
from temper.data.trees import comparison_trees
from temper.judges.reward_model import RewardModel
from temper.losses.reward import bradley_terry
from temper.methods import preference, reward
from temper.methods.base import Batching, forests, offline
from temper.models.load import load_policy, load_scalar
from temper.records import Message
from temper.runs import Run
from temper.train import Optim

WINDOW = preference.Window()


def rendered(tokenizer, pair):
    """ids of the chosen and of the rejected conversation, with their targets."""
    return [render_chat(tokenizer, [*pair.prompt, Message(role="assistant", content=a)], "last") for a in (pair.chosen, pair.rejected)]


@torch.no_grad()
def plain_scores(folder, conversations):
    """By transformers' own head and pooling, one conversation at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/model").eval()
    return torch.tensor([float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in conversations])


@torch.no_grad()
def plain_logp(folder, conversations):
    """Summed log-probability of the learned tokens of each (ids, target)."""
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    out = []
    for ids, target in conversations:
        logp = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
        out.append(float((logp * torch.tensor(target)[1:]).sum()))
    return torch.tensor(out)


@pytest.fixture(scope="module")
def pairs(toy):
    return read(toy.pairs, "pairs").records


# ---------------------------------------------------------------- reward model


@pytest.mark.parametrize("budget", [1, 90, 100_000])
def test_scores_are_read_at_the_last_token_whatever_they_are_packed_with(toy, pairs, budget):
    """= transformers' own reading of each conversation alone: the prompt shared, the pairs packed, the prompt's end never read."""
    model, tokenizer = load_scalar(toy.reward)
    trees, _ = comparison_trees(tokenizer, pairs, model, WINDOW)
    won, lost = torch.tensor(reward.scores(model, trees, budget)).T
    both = [rendered(tokenizer, p) for p in pairs]
    torch.testing.assert_close(won, plain_scores(toy.reward, [ids for (ids, _), _ in both]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lost, plain_scores(toy.reward, [ids for _, (ids, _) in both]), atol=2e-5, rtol=1e-5)


def test_the_first_loss_is_bradley_terry_of_the_plain_scores(toy, tmp_path, pairs):
    """With margins, soft labels and centring; all pairs in one step."""
    rows = [
        {
            "prompt": user(p.prompt[0].content),
            "chosen": p.chosen,
            "rejected": p.rejected,
            "margin": 0.1 * i,
            "soft": 1 - 0.02 * i,
            "meta": {},
        }
        for i, p in enumerate(pairs)
    ]
    data = write(tmp_path / "rated.jsonl", rows)
    train("reward", tmp_path / "more", model=toy.reward, data=str(data), batch=18, held_out=0, centring=0.05, tokens_per_microbatch=70)
    _, tokenizer = load_scalar(toy.reward)
    both = [rendered(tokenizer, p) for p in pairs]
    won, lost = (plain_scores(toy.reward, [row[side][0] for row in both]) for side in (0, 1))
    margin, soft = torch.tensor([0.1 * i for i in range(18)]), torch.tensor([1 - 0.02 * i for i in range(18)])
    (row,) = [r for r in Run(tmp_path / "more").rows("metrics") if "eval" not in r]
    assert row["loss"] == pytest.approx(float(bradley_terry(won, lost, margin=margin, soft=soft, centring=0.05).mean()), rel=1e-4)
    assert row["margin"] == pytest.approx(float((won - lost).mean()), rel=1e-4)
    assert row["accuracy"] == pytest.approx(float((won > lost).float().mean()))


def test_scores_have_mean_zero_and_deviation_one_over_the_training_answers(toy, pairs):
    judge = RewardModel(toy.reward)
    kept, out = split(pairs, 0.2, 0)
    assert len(out) == 4
    prompts, answers = [p.prompt for p in kept] * 2, [p.chosen for p in kept] + [p.rejected for p in kept]
    scores = torch.tensor(judge.score_answers(prompts, answers))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores.std()) == pytest.approx(1, abs=1e-5)
    raw = plain_scores(
        toy.reward,
        [
            render_chat(judge.tokenizer, [*p, Message(role="assistant", content=a)], "last")[0]
            for p, a in zip(prompts, answers, strict=True)
        ],
    )
    torch.testing.assert_close(scores, (raw - raw.mean()) / raw.std(), atol=1e-4, rtol=1e-4)
    for budget in 1, 60:
        assert judge.score_answers(prompts, answers, budget) == pytest.approx(scores.tolist(), abs=1e-5)


def test_held_out_figures(toy, tmp_path, pairs):
    """Accuracy by counting; in expectation and its ceiling from the raters' exact probabilities, where every record has them."""
    chance = [0.5 + 0.02 * i for i in range(18)]
    rows = [
        {
            "prompt": user(p.prompt[0].content),
            "chosen": p.chosen,
            "rejected": p.rejected,
            "margin": None,
            "soft": 1.0,
            "meta": {"probability": x},
        }
        for p, x in zip(pairs, chance, strict=True)
    ]
    data = write(tmp_path / "labelled.jsonl", rows)
    summary = train("reward", tmp_path / "rm", model=toy.sft, data=str(data), held_out=0.4, lr=1e-5)
    _, out = split(read(str(data), "pairs").records, 0.4, 0)
    judge = RewardModel(tmp_path / "rm")
    won, lost = (judge.score_answers([p.prompt for p in out], [getattr(p, side) for p in out]) for side in ("chosen", "rejected"))
    right = [a > b for a, b in zip(won, lost, strict=True)]
    p = [r.meta["probability"] for r in out]
    assert summary["held_out_pairs"] == len(out) == 7
    assert summary["held_out_accuracy"] == pytest.approx(sum(right) / 7)
    assert summary["expected_accuracy"] == pytest.approx(sum(x if ok else 1 - x for x, ok in zip(p, right, strict=True)) / 7)
    assert summary["ceiling"] == pytest.approx(sum(max(x, 1 - x) for x in p) / 7)
    plain = train("reward", tmp_path / "plain", model=toy.sft, data=toy.pairs, held_out=0.4, lr=1e-5)
    assert "ceiling" not in plain


@pytest.mark.parametrize("method", ["reward", "dpo"])
def test_pairs_need_a_template(toy, tmp_path, method):
    """The line names the model, not the data."""
    with pytest.raises(UserError, match=f"^{re.escape(toy.base)}.*: a base model, whose tokenizer has no chat template"):
        train(method, tmp_path / "out", model=toy.base, data=toy.pairs)


def test_a_language_model_is_no_reward_model(toy):
    with pytest.raises(UserError, match="a language model, not a reward model"):
        RewardModel(toy.sft)


# ---------------------------------------------------------------- DPO


def test_the_reference_is_the_model_at_the_start_computed_once(toy, pairs, monkeypatch):
    model, tokenizer = load_policy(toy.sft)
    trees, _ = comparison_trees(tokenizer, pairs, model, WINDOW)
    preference.with_reference(model, trees, 80)
    both = [rendered(tokenizer, p) for p in pairs]
    for side in 0, 1:
        mine = torch.tensor([tree[1 + side].labels["ref_logp"] for tree in trees])
        torch.testing.assert_close(mine, plain_logp(toy.sft, [row[side] for row in both]), atol=1e-4, rtol=1e-5)
    forwards = []
    inner = preference.token_logp
    monkeypatch.setattr(preference, "token_logp", lambda m, f, **how: (forwards.append(f.T), inner(m, f, **how))[1])
    b = Batching(batch=6, epochs=1)
    steps = list(preference.train_on(model, trees, "dpo", {"beta": 0.1}, b, Optim(lr=1e-3), 3))
    assert len(forwards) == 1 + 3  # the check before the first step, then one forward per step: none of a reference
    assert steps[-1].n == 3


@pytest.mark.slow
def test_a_reference_is_kept_for_the_runs_beside_it(toy, tmp_path, monkeypatch):
    """A run that reads it and one that computes it are the same to the last bit; other weights or data have another place."""
    computed = []
    compute = preference._reference
    monkeypatch.setattr(preference, "_reference", lambda *given: computed.append(given) or compute(*given))
    values = values_of("dpo", toy)
    train("dpo", tmp_path / "a" / "first", **values)
    train("dpo", tmp_path / "a" / "other", **values | {"beta": 0.5})
    train("dpo", tmp_path / "a" / "again", **values)
    assert len(computed) == 1
    (file,) = (tmp_path / "a" / ".references").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    train("dpo", tmp_path / "a" / "damaged", **values)
    assert len(computed) == 2
    assert len({result(tmp_path / "a" / name)[0] for name in ("first", "again", "damaged")}) == 1
    assert result(tmp_path / "a" / "again") == result(tmp_path / "a" / "first") != result(tmp_path / "a" / "other")
    train("dpo", tmp_path / "a" / "fewer", **values | {"held_out": 0.5})
    train("dpo", tmp_path / "a" / "packed", **values | {"tokens_per_microbatch": 64})
    train("dpo", tmp_path / "a" / "base", **values | {"model": str(tmp_path / "a" / "first")})
    assert len(computed) == 5


def test_the_reference_of_an_adapted_model_is_the_model_beneath(toy, pairs):
    peft = pytest.importorskip("peft")
    model, tokenizer = load_policy(toy.sft)
    trees = [comparison_trees(tokenizer, pairs, model, WINDOW)[0] for _ in range(2)]
    preference.with_reference(model, trees[0], 8192)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    preference.with_reference(adapted, trees[1], 8192)
    labels = [[s.labels["ref_logp"] for tree in part for s in tree] for part in trees]
    assert labels[0] == labels[1]
    assert preference.answer_logp(adapted, next(iter(forests(trees[0], 8192)))[1]).requires_grad


def test_dpo_starts_at_ln_two(toy, tmp_path):
    train("dpo", tmp_path / "dpo", **values_of("dpo", toy))
    first = Run(tmp_path / "dpo").rows("metrics")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)


def test_its_second_loss_is_that_of_the_formula(toy, pairs):
    """One step is taken; then -log sigma(beta h) from plain forwards of the new policy and of the reference."""
    model, tokenizer = load_policy(toy.sft)
    trees, _ = comparison_trees(tokenizer, pairs, model, WINDOW)
    preference.with_reference(model, trees, 8192)
    b = Batching(batch=18, epochs=2)
    run = preference.train_on(model, trees, "dpo", {"beta": 0.7}, b, Optim(lr=3e-3, warmup=0), 2)
    next(run)
    with torch.no_grad():
        forest = offline(trees, b, preference.count_records)(0)[0]
        now = preference.answer_logp(model, forest)
        h = [
            float(now[s] - forest.columns["ref_logp"][s] - (now[r] - forest.columns["ref_logp"][r]))
            for s, r in zip(*reward.ends(forest), strict=True)
        ]
    second = next(run).metrics
    assert abs(sum(h)) > 0.1
    assert second["margin"] == pytest.approx(sum(h) / 18, rel=1e-4)
    assert second["loss"] == pytest.approx(sum(math.log1p(math.exp(-0.7 * x)) for x in h) / 18, rel=1e-4)


@pytest.mark.parametrize("gap", [0.01, -2.0])
def test_the_check_before_the_first_step_finds_another_reference(toy, pairs, gap):
    model, tokenizer = load_policy(toy.sft)
    trees, _ = comparison_trees(tokenizer, pairs, model, WINDOW)
    preference.with_reference(model, trees, 8192)
    trees[4][2].labels["ref_logp"] += gap
    run = preference.train_on(model, trees, "dpo", {"beta": 0.1}, Batching(batch=18), Optim(), 1)
    with pytest.raises(UserError, match="policy and reference differ by"):
        next(run)


def test_dpo_prefers_what_it_was_shown(toy, tmp_path, pairs):
    """Held-out pairs too; and the reference it reports the gain over is the start."""
    summary = train("dpo", tmp_path / "dpo", **(values_of("dpo", toy) | {"lr": 5e-3}))
    assert summary["held_out_accuracy"] == 1.0
    _, tokenizer = load_policy(toy.sft)
    both = [rendered(tokenizer, p) for p in pairs]
    gains = [plain_logp(tmp_path / "dpo", [r[side] for r in both]) - plain_logp(toy.sft, [r[side] for r in both]) for side in (0, 1)]
    assert float((gains[0] - gains[1]).mean()) > 1.0


def test_a_tie_pulls_neither_way(toy, pairs):
    """Soft label 1/2 at the reference: the gradient is zero, so nothing moves."""
    model, tokenizer = load_policy(toy.sft)
    trees, _ = comparison_trees(tokenizer, [p.model_copy(update={"soft": 0.5}) for p in pairs], model, WINDOW)
    preference.with_reference(model, trees, 8192)
    step = next(preference.train_on(model, trees, "dpo", {"beta": 0.1}, Batching(batch=18), Optim(), 1))
    assert step.metrics["grad_norm"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "rankings"])
def test_what_collect_writes_feeds_both(toy, tmp_path, name):
    train("collect", tmp_path / "pairs", **(values_of("collect", toy) | {"prompts": "world:prompts?n=30"}))
    summary = train("reward", tmp_path / "rm", model=toy.sft, data=str(tmp_path / "pairs" / f"{name}.jsonl"), held_out=0.3)
    assert 0.5 <= summary["ceiling"] <= 1
    assert min(summary["expected_accuracy"], 1 - summary["expected_accuracy"]) >= 1 - summary["ceiling"] - 1e-9
    if name == "rankings":
        train("dpo", tmp_path / "dpo", model=toy.sft, data=str(tmp_path / "pairs" / "rankings.jsonl"))
        card = Run(tmp_path / "dpo").stage["card"]
        assert card["comparisons"] > card["records"] > 0
        return
    data = str(tmp_path / "pairs" / "pairs.jsonl")
    train("dpo", tmp_path / "dpo", model=toy.sft, data=data)
    read_back = [json.loads(line) for line in Path(data).read_text().splitlines()]
    card = Run(tmp_path / "dpo").stage["card"]
    assert card["records"] + card["held_out"] == len(read_back)
    assert card["records"] == card["comparisons"]


def test_settings_reach_the_loss(toy):
    s = build(preference.settings("dpo"), values_of("dpo", toy) | {"beta": 0.5, "label_smoothing": 0.2})
    model, tokenizer = load_policy(toy.sft)
    trees, _ = comparison_trees(tokenizer, read(toy.pairs, "pairs").records, model, WINDOW)
    preference.with_reference(model, trees, 8192)
    for name, value in ("beta", 5.0), ("label_smoothing", 0.0):
        runs = []
        for settings in (s, s.model_copy(update={name: value})):
            fresh, _ = load_policy(toy.sft)
            run = preference.train(settings, fresh, trees)
            next(run)
            runs.append(next(run).metrics["loss"])
        assert runs[0] != pytest.approx(runs[1], rel=1e-4)
