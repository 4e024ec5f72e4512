"""Reward models: rules, heads, members, calibration by section; by equivalence with what the plain one does."""

import pytest
import torch
from toy import QUESTIONS, train, user, write

from temper.config import UserError
from temper.data.trees import comparison_tree
from temper.forest import plant
from temper.judges.ensemble import members
from temper.judges.reward_model import RewardModel
from temper.losses.reward import davidson, plackett_luce
from temper.methods import reward
from temper.models.heads import scalar
from temper.models.load import load_scalar
from temper.records import Message, Pair, Ranked
from temper.runs import Run

ANSWERS = ["It is red.", "Blue.", "The boat is grey, I think.", "No.", "I do not know."]


def ranked(k, n):
    return Ranked(prompt=[Message(role="user", content=QUESTIONS[k].format("Red Hen"))], answers=ANSWERS[:n])


def planted(tokenizer, records, heads=None):
    trees = [comparison_tree(tokenizer, record) for record in records]
    for tree, head in zip(trees, heads or [0] * len(trees), strict=True):
        for segment in tree:
            segment.labels = {**segment.labels, "head": float(head)}
    return plant(trees, reward.count_records(trees))


def test_plackett_luce_of_a_forest_is_that_of_each_ranking(toy):
    model, tokenizer = load_scalar(toy.reward)
    records = [ranked(0, 3), ranked(1, 5), ranked(2, 2)]
    total = reward.make_loss(0.0, "plackett_luce")(model, planted(tokenizer, records)).terms["preference"].total
    alone = 0.0
    for record in records:
        forest = planted(tokenizer, [record])
        r = scalar(model, forest, forest.last[1:])[None]
        alone += float(plackett_luce(r, torch.ones_like(r, dtype=torch.bool)))
    assert float(total) == pytest.approx(alone, rel=1e-5)
    pair = planted(tokenizer, [records[2]])
    two = (reward.make_loss(0.01, rule)(model, pair).terms["preference"].total for rule in ("plackett_luce", "bradley_terry"))
    assert float(next(two)) == pytest.approx(float(next(two)), rel=1e-6)


def test_the_rule_and_its_settings_reach_the_loss(toy):
    model, tokenizer = load_scalar(toy.reward)
    pair = Pair(prompt=ranked(0, 2).prompt, chosen=ANSWERS[0], rejected=ANSWERS[1], soft=0.5)
    forest = planted(tokenizer, [pair])
    won, lost = scalar(model, forest, forest.last[1:])
    total = reward.make_loss(0.0, "davidson", tie=0.8, flip=0.1)(model, forest).terms["preference"].total
    assert float(total) == pytest.approx(float(davidson(won[None], lost[None], soft=torch.tensor([0.5]), tie=0.8, flip=0.1)), rel=1e-6)


def test_each_record_teaches_its_own_head(toy):
    model, tokenizer = load_scalar(toy.sft, labels=["helpful", "harmless"])
    forest = planted(tokenizer, [ranked(0, 3), ranked(1, 3)], heads=[1, 0])
    reward.make_loss(weights=[1.0, 0.0])(model, forest).terms["preference"].total.backward()
    grad = model.score.weight.grad
    assert grad[0].abs().max() > 0
    assert not grad[1].any()  # its weight is 0, and the other record is not about it
    lone, _ = load_scalar(toy.sft)
    lone.score.weight = torch.nn.Parameter(model.score.weight[:1].detach().clone())
    reward.make_loss()(lone, planted(tokenizer, [ranked(1, 3)])).terms["preference"].total.backward()
    torch.testing.assert_close(lone.score.weight.grad, grad[:1], atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def two_heads(toy, tmp_path_factory):
    """Rows that say which head they are about: one likes what the other does not."""
    folder = tmp_path_factory.mktemp("heads")
    rows = []
    for k in range(40):
        a, b = f"It is {k}.", f"Well, it may be {k}, I think."
        for head, (won, lost) in {"brief": (a, b), "wordy": (b, a)}.items():
            question = user(f"{QUESTIONS[k % 3].format('Old Tom')} {k}")
            rows.append({"prompt": question, "chosen": won, "rejected": lost, "margin": None, "soft": 1.0, "meta": {"head": head}})
    data = write(folder / "rows.jsonl", rows)
    values = {"model": toy.sft, "data": str(data), "heads": "head", "head_weights": ["wordy=2"], "batch": 8, "lr": 1e-2}
    train("reward", folder / "rm", epochs=6, held_out=0.2, **values)
    return folder / "rm"


def test_heads_disagree_and_add_up(two_heads):
    prompt = [Message(role="user", content="What colour is the Old Tom? 41")]
    both = RewardModel(two_heads)
    brief, wordy = (RewardModel(f"{two_heads}:{head}") for head in ("brief", "wordy"))
    answers = ["It is 41.", "Well, it may be 41, I think."]
    one, other, total = (judge.score_answers([prompt] * 2, answers) for judge in (brief, wordy, both))
    assert one[0] > one[1]
    assert other[1] > other[0]
    assert total == pytest.approx([a + 2 * b for a, b in zip(one, other, strict=True)], abs=1e-4)
    assert RewardModel(two_heads, weights={"brief": 1}).score_answers([prompt] * 2, answers) == pytest.approx(one, abs=1e-5)
    with pytest.raises(UserError, match="no head 'kind'; its heads are brief, wordy"):
        RewardModel(f"{two_heads}:kind")
    card = Run(two_heads).stage["card"]
    assert card["heads"] == {"brief": 1.0, "wordy": 2.0}
    assert card["accuracy_by"]["head"].keys() == {"brief", "wordy"}
    assert min(row["mean"] for row in card["accuracy_by"]["head"].values()) > 0.9
    assert sum(b["observed"]["n"] for b in card["reliability"]) == Run(two_heads).stage["summary"]["held_out_pairs"]


@pytest.mark.slow
def test_members_learn_the_same_records_and_differ(toy, tmp_path):
    values = {"model": toy.sft, "data": toy.pairs, "batch": 8, "epochs": 1, "lr": 1e-3, "held_out": 0.2}
    summary = train("reward", tmp_path / "three", members=3, **values)
    found = members(tmp_path / "three")
    assert len(found) == 3
    assert summary["steps"] % 3 == 0
    last = train("reward", tmp_path / "alone", seed=0, **values)
    alone = RewardModel(tmp_path / "alone")
    for a, b in zip(found[0].model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(a, b)  # the first member is the model of one
    assert not torch.equal(found[0].model.score.weight, found[1].model.score.weight)
    assert last["held_out_pairs"] == summary["held_out_pairs"]


@pytest.mark.slow
def test_members_go_on_where_they_were_stopped(toy, tmp_path, monkeypatch):
    from temper.runs import save_checkpoint

    class Dead(BaseException):
        pass

    values = {"model": toy.sft, "data": toy.pairs, "batch": 8, "epochs": 1, "members": 2, "lr": 1e-3}
    train("reward", tmp_path / "whole", **values)
    steps = Run(tmp_path / "whole").stage["summary"]["steps"]
    for at in (steps // 2, steps // 2 + 1):

        def stop(folder, step, *args, at=at, **kwargs):
            save_checkpoint(folder, step, *args, **kwargs)
            if step == at:
                raise Dead

        with monkeypatch.context() as patch:
            patch.setattr("temper.driver.save_checkpoint", stop)
            with pytest.raises(Dead):
                train("reward", tmp_path / "killed", save_seconds=1e-9, **values)
    train("reward", tmp_path / "killed", **values)
    for name in ("model", "members/0"):
        whole, killed = ((tmp_path / x / name / "model.safetensors").read_bytes() for x in ("whole", "killed"))
        assert whole == killed


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"tie": 0.5}, "--rule bradley_terry knows no ties"),
        ({"rule": "plackett_luce", "flip_rate": 0.1}, "plackett_luce takes rankings whole"),
        ({"heads": "aspect"}, "pairs.jsonl:1: has no field 'aspect'"),
        ({"heads": "file"}, "all rows name the same head, 'pairs'"),
        ({"head_weights": ["a=1"]}, "--head-weights without --heads"),
    ],
)
def test_bad_settings(toy, tmp_path, values, match):
    with pytest.raises(UserError, match=match):
        train("reward", tmp_path / "out", model=toy.sft, data=toy.pairs, **values)
    assert not (tmp_path / "out").exists()
