"""The reward model on rankings of several answers: all pairs of a ranking, averaged, each answer computed once."""

from itertools import combinations

import pytest
import torch
from toy import train, user, write

from temper.data.split import split
from temper.data.trees import comparison_tree, comparison_trees
from temper.forest import plant
from temper.judges.reward_model import RewardModel
from temper.methods import reward
from temper.models.load import load_scalar
from temper.records import Message, Pair, Ranked
from temper.runs import Run
from temper.stats.intervals import mean_interval, share_interval

ANSWERS = ["It is red.", "Blue.", "The boat is grey, I think.", "No.", "I do not know."]
QUESTIONS = ["What colour is the Sea Star?", "Tell me the colour of the Old Tom.", "Which colour has the Red Hen?", "Is it safe?"]


def ranking(question, answers, **meta):
    return Ranked(prompt=[Message(role="user", content=question)], answers=answers, meta=meta)


def all_pairs(record):
    return [Pair(prompt=record.prompt, chosen=a, rejected=b) for a, b in combinations(record.answers, 2)]


@pytest.fixture(scope="module")
def rankings():
    """Of three, two, five and four answers."""
    return [ranking(q, answers) for q, answers in zip(QUESTIONS, (ANSWERS[:3], ANSWERS[1:3], ANSWERS, ANSWERS[1:]), strict=True)]


@pytest.fixture(scope="module")
def model(toy):
    return load_scalar(toy.reward)


def planted(tokenizer, records):
    trees = [comparison_tree(tokenizer, record) for record in records]
    return plant(trees, reward.count_records(trees))


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("centring", [0.0, 0.05])
def test_the_loss_of_a_ranking_is_the_mean_over_its_pairs_one_by_one(model, rankings, centring):
    """All rankings in one forest, against each pair in a forest of its own: values and gradients."""
    (module, tokenizer), loss = model, reward.make_loss(centring)
    forest = planted(tokenizer, rankings)
    out = loss(module, forest)
    together = out.terms["preference"].total
    assert out.terms["preference"].per == "records"
    assert forest.weights == {"records": 4.0}
    one_by_one = torch.zeros(())
    for record in rankings:
        pairs = all_pairs(record)
        assert len(pairs) == len(record.answers) * (len(record.answers) - 1) // 2
        one_by_one = one_by_one + sum(loss(module, planted(tokenizer, [pair])).terms["preference"].total for pair in pairs) / len(pairs)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-5)
    a, b = gradients(module, together), gradients(module, one_by_one)
    assert max(float(g.abs().max()) for g in b.values()) > 0.01
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], atol=1e-5, rtol=1e-5, msg=name)


def test_its_metrics_count_every_comparison(model, rankings):
    (module, tokenizer), loss = model, reward.make_loss(0.01)
    metrics = loss(module, planted(tokenizer, rankings)).metrics
    scores = reward.scores(module, comparison_trees(tokenizer, rankings, module, reward.Window())[0], 8192)
    gaps = [a - b for each in scores for a, b in combinations(each, 2)]
    assert len(gaps) == 3 + 1 + 10 + 6
    assert {name: (float(total), n) for name, (total, n) in metrics.items()} == {
        "accuracy": (sum(gap > 0 for gap in gaps), 20),
        "margin": (pytest.approx(sum(gaps), abs=1e-4), 20),
    }


def test_what_is_compared_with_what(model, rankings):
    """By hand: a ranking of three and a pair. Answers of different records are never compared."""
    _, tokenizer = model
    forest = planted(tokenizer, rankings[:2])
    c = reward.compared(forest)
    assert c.answers.tolist() == [1, 2, 3, 5, 6]  # 0 and 4 are the prompts
    assert list(zip(c.better.tolist(), c.worse.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert c.share.tolist() == pytest.approx([1 / 3] * 3 + [1])
    first, second = reward.ends(planted(tokenizer, all_pairs(rankings[0])))
    assert (first.tolist(), second.tolist()) == ([1, 4, 7], [2, 5, 8])


@pytest.mark.parametrize("budget", [1, 90, 100_000])
def test_scores_are_those_of_each_answer_alone(toy, model, rankings, budget):
    module, tokenizer = model
    trees, _ = comparison_trees(tokenizer, rankings, module, reward.Window())
    judge = RewardModel(toy.reward)
    for record, got in zip(rankings, reward.scores(module, trees, budget), strict=True):
        alone = [judge.score_answers([record.prompt], [answer])[0] for answer in record.answers]
        assert [(raw - judge.mean) / judge.std for raw in got] == pytest.approx(alone, abs=2e-5)


def rows(records, **meta):
    return [{"prompt": user(r.prompt[0].content), "answers": r.answers, "meta": {**r.meta, **meta}} for r in records]


def test_a_file_of_pairs_and_the_same_as_rankings_of_two_train_alike(toy, tmp_path):
    pairs = [(f"{q} {i}", *two) for i, two in enumerate(combinations(ANSWERS, 2)) for q in QUESTIONS[:2]]
    files = {
        "pairs": [{"prompt": user(q), "chosen": a, "rejected": b} for q, a, b in pairs],
        "rankings": [{"prompt": user(q), "answers": [a, b], "meta": {}} for q, a, b in pairs],
    }
    found = []
    for name, file in files.items():
        data = write(tmp_path / f"{name}.jsonl", file)
        train("reward", tmp_path / name, model=toy.sft, data=str(data), batch=4, held_out=0.2, lr=1e-2)
        metrics = [
            {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in Run(tmp_path / name).rows("metrics")
        ]
        card = Run(tmp_path / name).stage["card"]
        assert card["records"] == card["comparisons"] == 16
        found.append((metrics, (tmp_path / name / "model" / "model.safetensors").read_bytes()))
    assert found[0] == found[1]
    assert len({row["loss"] for row in found[0][0] if "loss" in row}) == 4


def test_held_out_figures_over_all_comparisons(toy, tmp_path, rankings):
    """By counting; the raters' exact probabilities stand in the order of the pairs."""
    known = [
        ranking(f"{r.prompt[0].content} {i}", r.answers, probabilities=[0.3 + 0.03 * j + 0.1 * i for j in range(len(all_pairs(r)))])
        for i in range(4)
        for r in rankings
    ]
    data = write(tmp_path / "known.jsonl", rows(known))
    summary = train("reward", tmp_path / "rm", model=toy.sft, data=str(data), held_out=0.4, lr=1e-5)
    _, out = split(known, 0.4, 0)
    assert len(out) == 6
    assert len({len(r.answers) for r in out}) > 1
    judge, right, p, cluster = RewardModel(tmp_path / "rm"), [], [], []
    for i, record in enumerate(out):
        cluster += [i] * len(all_pairs(record))
        scores = judge.score_answers([record.prompt] * len(record.answers), record.answers)
        right += [a > b for a, b in combinations(scores, 2)]
        p += record.meta["probabilities"]
    assert 0 < sum(right) < len(right)
    assert summary["held_out_pairs"] == len(right)
    assert summary["held_out_accuracy"] == pytest.approx(sum(right) / len(right))
    assert summary["expected_accuracy"] == pytest.approx(sum(x if ok else 1 - x for x, ok in zip(p, right, strict=True)) / len(p))
    assert summary["ceiling"] == pytest.approx(sum(max(x, 1 - x) for x in p) / len(p))
    gap = mean_interval([0.0 if ok == (x > 0.5) else abs(2 * x - 1) for x, ok in zip(p, right, strict=True)], cluster)
    assert (gap.low, gap.mean, gap.high) == pytest.approx([summary[f"ceiling_gap{end}"] for end in ("_low", "", "_high")])
    share = share_interval(right, cluster)
    assert (share.low, share.high) == pytest.approx((summary["held_out_accuracy_low"], summary["held_out_accuracy_high"]))
    card = Run(tmp_path / "rm").stage["card"]
    assert card["records"] + card["held_out"] == 16
    assert card["comparisons"] == 4 * 20 - len(right)


def test_pairs_and_rankings_may_stand_in_one_file(toy, tmp_path, rankings):
    """With probabilities in all of them, each in its own way; where one lacks them there is no ceiling."""
    pair = {"prompt": user("Where?"), "chosen": "Here.", "rejected": "There.", "margin": None, "soft": 1.0, "meta": {"probability": 0.7}}
    chances = [{"probabilities": [0.8] * len(all_pairs(r))} for r in rankings]
    known = [{**row, "meta": meta} for row, meta in zip(rows(rankings), chances, strict=True)]
    more = {"model": toy.sft, "held_out": 0.5, "lr": 1e-5}
    summary = train("reward", tmp_path / "a", data=str(write(tmp_path / "a.jsonl", [*known, pair])), **more)
    assert 0.7 <= summary["ceiling"] <= 0.8
    for row in known:
        row["meta"] = {}
    assert "ceiling" not in train("reward", tmp_path / "b", data=str(write(tmp_path / "b.jsonl", [*known, pair])), **more)
