"""KTO and BCO as methods: what answers are compared with, found over the whole batch; class weights; thumbs and pairs."""

import pytest
import torch
from toy import result, train, user, values_of, write
from transformers import AutoModelForCausalLM

from temper.config import UserError, build
from temper.data.packing import batch_indices
from temper.data.sources import read
from temper.data.trees import comparison_trees
from temper.forest import Segment
from temper.losses.unpaired import Answers, bco, kto
from temper.methods import preference, unpaired
from temper.methods.base import Batching
from temper.models.load import load_policy
from temper.runs import Run

RATED = {"kto": kto, "bco": bco}


def prepared(toy, name, **more):
    """(settings, model, labelled trees with references, the mismatched pairs of each step)"""
    model, tokenizer = load_policy(toy.sft)
    trees, _ = comparison_trees(tokenizer, read(toy.pairs, "rated").records, model, unpaired.Window())
    s = build(unpaired.settings(name), values_of(name, toy) | {"batch": 8, "epochs": 1, "lr": 5e-3, "warmup": 0} | more)
    unpaired.weigh(trees, 1.5, 0.5)
    others = unpaired.mismatches(trees, s.batching, s.batching.steps(len(trees)), 160) if name == "kto" else []
    preference.with_reference(model, trees, 8192, also=others)
    return s, model, trees, others or None


@torch.no_grad()
def gain(models, prompt, answer):
    """log pi - log pi_ref of an answer's tokens, by plain forwards."""
    ids = torch.tensor([[*prompt, *answer]])
    logp = [m(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0] for m in models]
    return float((logp[0] - logp[1])[len(prompt) - 1 :].sum())


@pytest.mark.parametrize("budget", [1, 90, 100_000])
def test_z0_is_the_mean_over_the_mismatched_pairs_of_the_global_batch(toy, budget):
    """Of the policy before the step, whatever the micro-batches; then the loss is the formula's."""
    s, model, trees, others = prepared(toy, "kto", tokens_per_microbatch=budget, beta=0.3)
    plain = [AutoModelForCausalLM.from_pretrained(f"{toy.sft}/model").eval() for _ in range(2)]
    steps = unpaired.train(s, model, trees, others)
    for at in range(3):
        plain[0].load_state_dict(model.state_dict())  # as the step will find it
        rows = batch_indices(len(trees), 8, s.batching.seed, at)
        drift = []
        for i, row in enumerate(rows):
            prompt = trees[row][0].tokens
            j = next(r for r in rows[i + 1 :] + rows[:i] if trees[r][0].tokens != prompt)
            drift.append(gain(plain, prompt, trees[j][1].tokens))
        point = max(0.0, sum(drift) / len(drift))
        gains = torch.tensor([gain(plain, trees[r][0].tokens, trees[r][1].tokens) for r in rows])
        good = torch.tensor([trees[r][1].labels["good"] > 0 for r in rows])
        want = kto(Answers(gains, good, point, torch.where(good, 1.5, 0.5)), beta=0.3).mean()
        metrics = next(steps).metrics
        assert metrics["point"] == pytest.approx(point, abs=1e-4)
        assert metrics["loss"] == pytest.approx(float(want), abs=1e-5)
        assert metrics["good_gain"] == pytest.approx(float(gains[good].mean()), abs=1e-4)
        assert metrics["bad_gain"] == pytest.approx(float(gains[~good].mean()), abs=1e-4)
        if at:
            assert abs(sum(drift)) > 0.01


def test_bco_compares_with_the_moving_middle_of_its_classes(toy):
    s, model, trees, _ = prepared(toy, "bco")
    plain = [AutoModelForCausalLM.from_pretrained(f"{toy.sft}/model").eval() for _ in range(2)]
    steps, means = unpaired.train(s, model, trees, None), {}
    for at in range(3):
        plain[0].load_state_dict(model.state_dict())
        for good in True, False:
            rows = [r for r in batch_indices(len(trees), 8, s.batching.seed, at) if (trees[r][1].labels["good"] > 0) == good]
            if rows:
                now = sum(gain(plain, trees[r][0].tokens, trees[r][1].tokens) for r in rows) / len(rows)
                means[good] = 0.9 * means.get(good, now) + 0.1 * now
        assert next(steps).metrics["point"] == pytest.approx(sum(means.values()) / len(means), abs=1e-4)
    assert abs(means[True]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", RATED)
def test_the_start(toy, tmp_path, name):
    """Policy and reference are one: every gain and the point are 0; KTO's loss is half the mean weight, BCO's ln 2 of it."""
    train(name, tmp_path / name, **values_of(name, toy))
    first = Run(tmp_path / name).rows("metrics")[0]
    assert first["loss"] == pytest.approx({"kto": 0.5, "bco": 0.693147}[name], abs=1e-5)
    assert [first[key] for key in ("point", "good_gain", "bad_gain")] == pytest.approx([0, 0, 0], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RATED)
def test_good_answers_gain_on_bad_ones(toy, tmp_path, name):
    summary = train(name, tmp_path / name, **values_of(name, toy) | {"lr": 5e-3})
    last = [row for row in Run(tmp_path / name).rows("metrics") if {"good_gain", "bad_gain"} <= row.keys()][-1]
    assert last["good_gain"] > last["bad_gain"] + 1
    assert summary["held_out_auc"] > 0.9


def test_pairs_are_a_thumb_up_and_a_thumb_down(toy, tmp_path):
    """The same bytes from the pairs and from a file of their thumbs."""
    rated = read(toy.pairs, "rated").records
    rows = [
        {"prompt": [m.model_dump() for m in r.prompt], "completion": [{"role": "assistant", "content": r.answer}], "label": r.rating > 0}
        for r in rated
    ]
    values = values_of("kto", toy) | {"epochs": 1}
    train("kto", tmp_path / "pairs", **values)
    train("kto", tmp_path / "thumbs", **values | {"data": str(write(tmp_path / "thumbs.jsonl", rows))})
    assert result(tmp_path / "pairs") == result(tmp_path / "thumbs")
    assert Run(tmp_path / "pairs").stage["card"]["thumbs"] == Run(tmp_path / "thumbs").stage["card"]["thumbs"]


@pytest.mark.parametrize(
    ("good", "bad", "want"),
    [(10, 10, (1, 1)), (15, 10, (1, 1)), (10, 100, (10, 1)), (9, 10, (10 / 9, 1)), (20, 10, (1, 4 / 3)), (300, 10, (1, 20))],
)
def test_the_rarer_class_weighs_as_much_as_the_paper_asks(good, bad, want):
    """(lambda_D n_D) / (lambda_U n_U) within [1, 3/2], no weight larger than that takes."""
    up, down = unpaired.class_weights(good, bad, None, None)
    assert (up, down) == pytest.approx(want)
    assert 1 - 1e-9 <= up * good / (down * bad) <= 1.5 + 1e-9
    assert unpaired.class_weights(good, bad, 3.0, None) == (3.0, 1.0)


def test_the_weights_are_on_the_card_and_in_the_loss(toy, tmp_path):
    rows = [{"prompt": f"What is {i}?", "completion": "Red.", "label": i % 6 == 0} for i in range(12)]
    data = str(write(tmp_path / "thumbs.jsonl", rows))
    train("kto", tmp_path / "kto", model=toy.sft, data=data, batch=12, held_out=0)
    card = Run(tmp_path / "kto").stage["card"]
    assert (card["thumbs"], card["class_weights"].split(";")[0]) == ("2 up, 10 down", "up 5, down 1")
    assert Run(tmp_path / "kto").rows("metrics")[0]["loss"] == pytest.approx(0.5 * (2 * 5 + 10) / 12, abs=1e-5)


def thumb(prompt, answer):
    return [Segment(prompt, [0.0] * len(prompt)), Segment(answer, [1.0] * len(answer), parent=0)]


def test_what_is_mismatched_with_what():
    """The next answer of the batch to another prompt that the window has room for; none for a prompt that has none."""
    trees = [thumb([1, 1], [10]), thumb([1, 1], [11]), thumb([2], [12, 12, 12]), thumb([3, 3, 3], [13])]
    b = Batching(batch=4)
    order = batch_indices(4, 4, b.seed, 0)
    (found,) = unpaired.mismatches(trees, b, 1, None)
    for i, (prompt, answer) in zip(order, found, strict=True):
        after = [order[(order.index(i) + k) % 4] for k in (1, 2, 3)]
        assert (list(prompt.tokens), list(answer.tokens)) == (
            list(trees[i][0].tokens),
            list(next(trees[j][1].tokens for j in after if trees[j][0].tokens != trees[i][0].tokens)),
        )
    assert all(len(p.tokens) + len(a.tokens) <= 4 for p, a in unpaired.mismatches(trees, b, 1, 4)[0])
    assert len(unpaired.mismatches(trees[1:3], Batching(batch=2), 1, 2)[0]) == 1
    with pytest.raises(UserError, match="step 1: its 2 answers are all to one prompt"):
        unpaired.mismatches(trees[:2], Batching(batch=2), 1, None)


@pytest.mark.parametrize(
    ("rows", "more", "what"),
    [
        ([{"label": True}] * 3, {}, r"rows\.jsonl: its 3 thumbs are all up; kto needs answers of both kinds"),
        ([{"label": False}] * 3, {}, "its 3 thumbs are all down"),
        (
            [{"label": i > 0} for i in range(3)],
            {"batch": 1},
            "--batch 1: kto compares an answer with those to the batch's other prompts; give at least 2",
        ),
        ([{"label": i > 0} for i in range(3)], {"desirable_weight": 0}, "desirable_weight.*greater than 0"),
    ],
)
def test_thumbs_that_teach_nothing(toy, tmp_path, rows, more, what):
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"What is {i}?", "completion": "Red.", **row} for i, row in enumerate(rows)])
    with pytest.raises(UserError, match=what):
        train("kto", tmp_path / "out", model=toy.sft, data=str(data), held_out=0, **more)
    assert not (tmp_path / "out").exists()


def test_a_rating_that_is_no_thumb(toy, tmp_path):
    rows = [{"prompt": user(f"What is {i}?"), "answer": "Red.", "rating": float(i), "meta": {}} for i in range(3)]
    with pytest.raises(UserError, match=r"rows\.jsonl:3: rating 2; bco learns from thumbs, 1 up and 0 down"):
        train("bco", tmp_path / "out", model=toy.sft, data=str(write(tmp_path / "rows.jsonl", rows)), held_out=0)
