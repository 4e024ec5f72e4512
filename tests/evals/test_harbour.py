"""What the evaluation measures, on answers made by hand and on tiny models."""

import json

import numpy as np
import pytest
import torch
from toy import train, values_of

from temper.config import build
from temper.evals import harbour
from temper.evals.harbour import METRICS, Answers, Evaluation, Probe, ask_all, enumerated_logp, frontier_check, measure, summed_kl
from temper.models.load import load_policy
from temper.stats.intervals import mean_interval
from temper.world import Ask, dataset, gold
from temper.world.oracles import enumerate_answers

HOW = build(Evaluation, {"prompts_each": 24, "samples": 2, "max_new": 12, "enumerable": 1})


@pytest.fixture(scope="module")
def sft(toy):
    return load_policy(toy.sft)


@pytest.fixture(scope="module")
def other(toy):
    """A model near the SFT model."""
    model, _ = load_policy(toy.sft)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.std() * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def prompts():
    return dataset("evaluation", n=300, split="evaluation")


def said(prompts):
    """What names a prompt: its words."""
    return ["\n".join(m.content for m in p.messages) for p in prompts]


def shares(prompts, answer):
    """The shares that `_shares` finds where `answer(ask)` is the greedy and the only sampled answer."""
    asks = [Ask.of(p) for p in prompts]
    texts = [[answer(ask)] for ask in asks]
    found = harbour._shares(
        asks, said(prompts), Answers(texts, [], []), [(i, ask, t) for i, (ask, (t,)) in enumerate(zip(asks, texts, strict=True))]
    )
    return {name: interval.mean for name, interval in found.items()}


def right(ask):
    """The best of the answers that the grammar has; honest where nothing is known, a refusal with a reason where harm is asked."""
    if ask.kind in ("critique", "revise", "judge", "rewrite"):
        return ""
    if ask.kind == "unknown":
        return "I do not know that."
    return max(enumerate_answers(ask, limit=60), key=lambda a: gold(ask, a).total)


def test_shares_of_right_answers_and_of_silence(prompts):
    asks = [Ask.of(p) for p in prompts]
    wanted = {"answers", "correct", "correct_phrasing", "correct_entity", "arithmetic", "honest", "harmful", "over_refusal", "sycophancy"}
    some = [p for p, a in zip(prompts, asks, strict=True) if a.kind in ("lookup", "unknown", "arithmetic", "unsafe", "safe_twin", "belief")]
    best = shares(some, right)
    assert best.keys() == wanted
    assert best == {name: float(METRICS[name][1] > 0) for name in wanted}
    silent = shares(some, lambda ask: "")
    assert silent == dict.fromkeys(wanted, 0.0)
    unsure = shares(some, lambda ask: "I do not know that.")
    assert unsure["honest"] == 1.0
    assert unsure["correct"] == unsure["harmful"] == 0.0


def test_each_share_counts_its_own_prompts_only(prompts):
    """A wrong answer to prompts of one sort moves that sort's share, by exactly their number."""
    asks = [Ask.of(p) for p in prompts]
    lookups = [a for a in asks if a.kind == "lookup" and a.tags["answerable"]]
    cells = {("seen", "seen"): "correct", ("held_out", "seen"): "correct_phrasing", ("seen", "held_out"): "correct_entity"}
    some = [p for p, a in zip(prompts, asks, strict=True) if a.kind == "lookup" and a.tags["answerable"]]
    for (phrasing, entity), name in cells.items():
        own = [a for a in lookups if (a.tags["phrasing"], a.tags["entity"]) == (phrasing, entity)]
        assert own
        wrong = own[0].messages
        got = shares(some, lambda ask, wrong=wrong: "I do not know that." if ask.messages == wrong else right(ask))
        assert got[name] == pytest.approx(1 - sum(a.messages == wrong for a in own) / len(own))
        assert all(got[n] == 1.0 for n in cells.values() if n != name)


def test_sampled_shares_count_every_sample_and_cluster_by_craft(prompts):
    """A model that helps with every third craft, said four times: the interval is that of one answer each, not of four times as many."""
    prompts = [p for p in prompts if Ask.of(p).tags["unsafe"]]
    asks, names = [Ask.of(p) for p in prompts], said(prompts)
    greedy = Answers([[""]] * len(asks), [], [])
    helped = sorted({a.slots["task"] for a in asks})[::3]
    worst = {a.slots["task"]: max(enumerate_answers(a, limit=60), key=lambda t, a=a: gold(a, t).features["harmful"]) for a in asks}
    flat = [(i, a, worst[a.slots["task"]] if a.slots["task"] in helped else "") for i, a in enumerate(asks)]
    one = harbour._shares(asks, names, greedy, flat)["harmful"]
    four = harbour._shares(asks, names, greedy, [x for x in flat for _ in range(4)])["harmful"]
    assert one.mean == four.mean == pytest.approx(sum(a.slots["task"] in helped for a in asks) / len(asks))
    assert 0 < one.mean < 1
    assert four.n == 4 * one.n
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=1e-6)


# ---------------------------------------------------------------- KL


def test_kl_is_zero_with_itself_antisymmetric_and_positive_on_average(sft, other, prompts):
    model, tokenizer = sft
    short = [p for p in prompts if len(p.messages) == 1][:30]
    answers = ask_all(other, tokenizer, short, 4, 12, 0.8, (0,))
    there = summed_kl(other, model, answers, 0.8)
    assert len(there) == 120
    assert summed_kl(model, model, answers, 0.8) == [0.0] * 120
    assert summed_kl(model, other, answers, 0.8) == pytest.approx([-x for x in there], abs=1e-4)
    interval = mean_interval(there, [i for i in range(30) for _ in range(4)])
    assert interval.low > 0  # policy first, reference second, sampled from the policy
    assert summed_kl(other, model, answers, 0.8, budget=200) == pytest.approx(there, abs=1e-4)
    # by plain forwards, one answer at a time
    for index in (0, 5, 33):
        head, own = answers.prompt_ids[index // 4], answers.ids[index // 4][index % 4]
        logp = []
        for m in (other, model):
            with torch.no_grad():
                whole = m(input_ids=torch.tensor([[*head, *own]])).logits[0].div(0.8).log_softmax(-1)
            logp.append(sum(float(whole[len(head) - 1 + t, token]) for t, token in enumerate(own)))
        assert there[index] == pytest.approx(logp[0] - logp[1], abs=1e-4)


# ---------------------------------------------------------------- the frontier


@pytest.mark.slow
def test_no_point_lies_above_the_frontier(sft, other, toy, tmp_path):
    """The reference itself lies on it; policies trained to do better lie below."""
    model, tokenizer = sft
    how = HOW.model_copy(update={"enumerable": 2})
    rows, reference = frontier_check(model, tokenizer, how, None)
    reference = json.loads(json.dumps(reference, allow_nan=False))  # as the others read it from the reference's evaluation.json
    assert frontier_check(model, tokenizer, how, reference) == (rows, reference)
    for row in rows:
        assert row["kl"] == pytest.approx(0, abs=1e-9)
        assert row["gold"] == row["reference_gold"] == pytest.approx(row["frontier_gold"], abs=1e-6)
    train("ppo", tmp_path / "ppo", **(values_of("ppo", toy) | {"rollouts": 10, "lr": 1e-2, "beta": 0.0}))
    for policy in (other, load_policy(str(tmp_path / "ppo"))[0]):
        rows, _ = frontier_check(policy, tokenizer, how, reference)
        assert len(rows) == 2
        for row in rows:
            assert row["kl"] > 0
            assert row["above"] <= 0
            assert row["frontier_gold"] >= row["reference_gold"]
            assert 0 < row["mass"] < 1


def test_enumerated_log_probs_are_those_of_the_whole_answers(sft, toy):
    model, tokenizer = sft
    prompt = dataset("enumerable", n=1)[0]
    answers = enumerate_answers(Ask.of(prompt), limit=7)
    answers = harbour._fitting(model, tokenizer, prompt, [*answers, "far " * 200])
    assert 0 < len(answers) <= 7
    stop = tokenizer.eos_token_id
    head = harbour.render_prompt(tokenizer, prompt.messages)
    for children in 2, 256:
        got = enumerated_logp(model, tokenizer, prompt, answers, 0.8, children)
        for answer, mine in zip(answers, got, strict=True):
            own = [*tokenizer.encode(answer, add_special_tokens=False), stop]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([[*head, *own]])).logits[0].double().div(0.8).log_softmax(-1)
            assert mine == pytest.approx(sum(float(logp[len(head) - 1 + t, token]) for t, token in enumerate(own)), abs=1e-3)


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def measured(toy, tmp_path_factory):
    """What `measure` says of the SFT model, compared with itself."""
    from pathlib import Path

    folder = Path(toy.sft)
    return measure(folder, stages={"sft": folder, "reward": Path(toy.reward)}, how=HOW)


def test_figures_of_the_reference_itself(measured):
    metrics = measured["metrics"]
    assert metrics["kl"]["mean"] == 0
    assert metrics["win_rate_vs_sft"]["mean"] == 0.5
    assert metrics["gold"]["n"] == 48
    assert set(metrics) <= set(METRICS)
    (row,), (listed,) = measured["frontier"], measured["enumerated"]  # what the other stages are compared with
    assert row["kl"] == pytest.approx(0, abs=1e-9)
    assert len(listed) > 100
    json.dumps(measured, allow_nan=False)


def test_intervals_over_samples_are_clustered_by_prompt(measured):
    rows = measured["sampled"]
    assert [r["prompt"] for r in rows] == [i for i in range(24) for _ in range(2)]
    names = said(dataset("evaluation", n=24, split="evaluation"))
    expected = mean_interval([r["gold"] for r in rows], [names[r["prompt"]] for r in rows])
    assert measured["metrics"]["gold"] == expected.to_dict()
    plain = mean_interval([r["gold"] for r in rows])
    assert expected.high - expected.low != pytest.approx(plain.high - plain.low, rel=1e-3)


def test_answers_are_scored_as_they_were_sampled(measured, sft):
    model, tokenizer = sft
    prompts = dataset("evaluation", n=24, split="evaluation")
    again = ask_all(model, tokenizer, prompts, 2, 12, HOW.temperature, ("evaluation", 0))
    flat = [text for group in again.text for text in group]
    assert [r["answer"] for r in measured["sampled"]] == flat
    assert [r["gold"] for r in measured["sampled"]] == [gold(Ask.of(prompts[i // 2]), t).total for i, t in enumerate(flat)]
    side = measured["side_by_side"]
    assert len(side) == 24
    assert [s["messages"][-1]["content"] for s in side] == [p.messages[-1].content for p in dataset("side_by_side", n=24)]
    parts = side[0]["gold"]
    assert set(parts) == {"total", "helpful", "harmless", "honest", "concise", "format"}


def test_a_stage_is_compared_with_its_parent_and_with_sft(toy, tmp_path, measured):
    """Gold gained is paired by prompt and sample; wins are over the other sample, which was not drawn with the same numbers."""
    from pathlib import Path

    own = tmp_path / "sft"
    own.mkdir()
    (own / "model").symlink_to(Path(toy.sft) / "model")
    (own / "evaluation.json").write_text(json.dumps(measured))
    train("dpo", tmp_path / "dpo", **(values_of("dpo", toy) | {"lr": 1e-2}))
    found = measure(tmp_path / "dpo", stages={"sft": own, "parent": own}, how=HOW.model_copy(update={"enumerable": 0}))
    before, after = (np.array([r["gold"] for r in rows["sampled"]]) for rows in (measured, found))
    other = before.reshape(-1, 2)[:, ::-1].flatten()
    assert found["metrics"]["gold_gained"]["mean"] == pytest.approx((after - before).mean())
    assert found["metrics"]["win_rate_vs_sft"]["mean"] == pytest.approx(((after > other) + 0.5 * (after == other)).mean())
    assert found["metrics"]["kl"]["mean"] != 0
    assert "frontier" not in found
    assert "proxy" not in found


def test_a_base_model_is_asked_without_a_template(toy):
    model, tokenizer = load_policy(toy.base)
    found = ask_all(model, tokenizer, dataset("side_by_side", n=2), 1, 4, 0.0, (0,))
    assert tokenizer.decode(found.prompt_ids[0]).endswith("\n")


def test_a_probe_is_quick_and_repeatable(sft, toy):
    model, tokenizer = sft
    probe = Probe(model, tokenizer, HOW, reference=toy.sft, reward=toy.reward, prompts=8)
    first = probe()
    assert first.keys() == {"gold", "proxy", "kl"}
    assert first["kl"] == 0
    assert probe() == first
