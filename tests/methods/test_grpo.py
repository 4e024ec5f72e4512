"""GRPO: advantages by hand, aggregation through the loop's weights, presets, answers without a rating, the fused gradient."""

import json
import math
from pathlib import Path

import pytest
import torch
from toy import train, values_of
from vllm_server import Server

from temper.config import UserError, build
from temper.losses.kl import k1
from temper.methods import grpo, ppo, start
from temper.methods.rated import Ending, Sampled
from temper.methods.switches import BASE, PRESETS, resolved
from temper.models.load import load_policy, save
from temper.runs import Run
from temper.train import TrainingError


class Fake:
    """A rater whose ratings are a function of the answer."""

    name = "fake"

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def rate(self, answers):
        self.asked += answers
        return [self.rule(a) for a in answers]


class Stepped(Fake):
    """One step at each answer's first token and one at its last."""

    def steps(self, answers):
        return [[(0, self.rule(a)), (len(a.tokens) - 1, 1.0)] for a in answers]


def last_token(answer):
    """A reward that differs between most answers."""
    return float(sum(answer.tokens) % 7) / 3


@pytest.fixture
def make(toy, tmp_path, monkeypatch):
    """(settings resolved, module, Rollouts) on the toy, rated by `rule`."""

    def build_one(rule=last_token, steps=None, method=grpo, **more):
        made = []

        class Caught(method.Rollouts):
            def __init__(self, *args):
                super().__init__(*args)
                made.append(self)

        name = method.__name__.rpartition(".")[2]
        if steps:
            more["step_reward"] = toy.reward
        s = build(method.settings(name), values_of(name, toy) | more)
        with monkeypatch.context() as patch:
            patch.setattr(method, "Rollouts", Caught)
            patch.setattr(start, "rater", lambda spec, tokenizer, **how: Fake(rule))
            patch.setattr(start, "step_rater", lambda *args, **how: Stepped(steps))
            method.prepare(s, Run(tmp_path / "run"))
        return made[0].settings, made[0].module, made[0]

    return build_one


def disturb(model, size=0.3):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += size * p.std() * torch.randn_like(p)
    return model


def answers(source):
    """Of each answer of the rollout its group's number, columns, score and targets."""
    groups = 0
    for minibatch in source.pending:
        for forest in minibatch:
            for s in range(forest.S):
                if forest.parent[s] < 0:
                    groups += 1
                    continue
                own = slice(int(forest.start[s]), int(forest.end[s]))
                columns = {name: x[own] for name, x in forest.columns.items() if name not in forest.labels}
                yield groups, columns, float(forest.columns["score"][s]), forest.target[own]


def step_of(loss, module, batches):
    """(loss, gradients) of one optimiser step, as the loop divides."""
    module.zero_grad()
    weights = {name: sum(b.weights[name] for b in batches) for name in batches[0].weights}
    total = 0.0
    for batch in batches:
        share = sum(term.total * term.coefficient / weights[term.per] for term in loss(module, batch).terms.values())
        share.backward()
        total += float(share.detach())
    return total, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_fused_gradient_is_that_of_the_plain_loss(make, preset):
    """Where a rollout is used for one update: value and gradient to 1e-6."""
    s, module, source = make(preset=preset, temperature=1.3)
    disturb(module["policy"])
    batches = source(0)
    assert "logp" not in source.last
    value, gradient = step_of(grpo.make_loss(s), module, batches)
    plain, want = step_of(grpo.make_loss(s, on_policy=False), module, batches)
    assert want.norm() > 1e-3
    assert value == pytest.approx(plain, abs=1e-6)
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()) + 1e-7)


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_aggregation_is_by_hand_and_micro_batches_change_nothing(make, aggregation):
    found = []
    for budget in 1, 100_000:
        s, module, source = make(aggregation=aggregation, tokens_per_microbatch=budget, clip=9.0, epochs_per_batch=2)
        source(0)
        disturb(module["policy"], 0.05)
        batches = source(1)
        assert len(batches) == (4 if budget == 1 else 1)
        found.append(step_of(grpo.make_loss(s), module, batches))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        parts = []
        for batch in batches:
            logp = grpo.token_logp(module["policy"], batch)
            old, advantage = (batch.columns[c][batch.learned] for c in ("old_logp", "advantage"))
            each = -advantage * (logp - old).exp()
            parts += each.split(batch.length[batch.parent >= 0].tolist())
    want = {
        "sequence": sum(float(x.mean()) for x in parts) / len(parts),
        "token": float(torch.cat(parts).mean()),
        "constant": sum(float(x.sum()) for x in parts) / 12 / len(parts),  # --max-new 12
    }
    assert found[0][0] - (0.04 * kl_loss(module, batches, aggregation)) == pytest.approx(want[aggregation], abs=1e-5)


@torch.no_grad()
def kl_loss(module, batches, aggregation):
    parts = []
    for batch in batches:
        logp = grpo.token_logp(module["policy"], batch)
        old, ref = (batch.columns[c][batch.learned] for c in ("old_logp", "ref_logp"))
        each = (logp - old).exp() * ((ref - logp).exp() - 1 - (ref - logp))
        parts += each.split(batch.length[batch.parent >= 0].tolist())
    if aggregation == "token":
        return float(torch.cat(parts).mean())
    return sum(float(x.mean() if aggregation == "sequence" else x.sum() / 12) for x in parts) / len(parts)


def by_group(source):
    found = {}
    for group, columns, score, target in answers(source):
        found.setdefault(group, []).append((columns, score, target))
    return found.values()


def test_advantages_of_the_presets_by_hand(make):
    _, _, source = make()
    source(0)
    for group in by_group(source):
        reward = torch.tensor([score for _, score, _ in group])
        std = reward.std(correction=0)
        want = (reward - reward.mean()) / std if std > 1e-4 else torch.zeros(3)
        for (columns, _, target), x in zip(group, want, strict=True):
            torch.testing.assert_close(columns["advantage"], x.expand(len(target)), atol=1e-5, rtol=1e-5)

    _, _, source = make(preset="rloo", beta=0.5)
    disturb(source.reference)
    source(0)
    for group in by_group(source):
        shaped = torch.tensor([score - 0.5 * float(k1(c["old_logp"], c["ref_logp"]).sum()) for c, score, _ in group])
        want = 1.5 * (shaped - shaped.mean())  # G / (G - 1)
        for (columns, _, target), x in zip(group, want, strict=True):
            torch.testing.assert_close(columns["advantage"], x.expand(len(target)), atol=1e-4, rtol=1e-4)

    _, _, source = make(preset="reinforce++", beta=0.5)
    disturb(source.reference)
    source(0)
    raw = []
    for _, c, score, _ in answers(source):
        kl = k1(c["old_logp"], c["ref_logp"])
        raw.append(score - 0.5 * kl.flip(0).cumsum(0).flip(0))
    got = torch.cat([c["advantage"] for _, c, _, _ in answers(source)])
    raw = torch.cat(raw)
    torch.testing.assert_close(got, (raw - raw.mean()) / raw.std(correction=0), atol=1e-4, rtol=1e-4)
    assert float(got.mean()) == pytest.approx(0, abs=1e-4)


def test_rewards_of_steps(make):
    """Process GRPO: standardised over the group's steps, each token gets those of the steps that end from it on."""
    _, _, source = make(steps=last_token, outcome_weight=0.0)
    source(0)
    for group in by_group(source):
        first = [float(c["step_reward"][0]) - (len(t) == 1) for c, _, t in group]
        values = torch.tensor([x for one in first for x in (one, 1.0)], dtype=torch.double)
        z = (values - values.mean()) / values.std(correction=0)
        if values.std(correction=0) < 1e-4:
            z = torch.zeros_like(values)
        for k, (columns, _, target) in enumerate(group):
            want = torch.full((len(target),), float(z[2 * k + 1]))
            want[0] += float(z[2 * k])
            torch.testing.assert_close(columns["advantage"], want, atol=1e-4, rtol=1e-4)
    _, _, source = make(method=ppo, steps=lambda a: 2.0, rule=lambda a: 0.25, beta=0.0, lam=1.0, missing_eos=None)
    source(0)
    for _, columns, _, target in answers(source):  # returns: the step at the first token, the step and the score at the last
        want = torch.full((len(target),), 1.25)
        want[0] += 2.0
        torch.testing.assert_close(columns["returns"], want, atol=1e-4, rtol=1e-4)


def test_answers_without_a_rating_are_left_out_and_counted(make):
    """Not in a baseline, not in a mean, not in a divisor; the numbers of the others do not know of them."""
    broken = {None: 0, math.nan: 1, math.inf: 2}
    for nothing in broken:
        s, module, source = make(rule=lambda a, nothing=nothing: nothing if sum(a.tokens) % 3 == 0 else last_token(a))
        batches = source(0)
        found = list(answers(source))
        left = [float(target.abs().sum()) == 0 for _, _, _, target in found]
        assert 0 < sum(left) < len(left)
        assert source.last["unrated"] == pytest.approx(sum(left) / len(left))
        assert source.last["reward"] == pytest.approx(
            sum(score for (_, _, score, _), out in zip(found, left, strict=True) if not out) / (len(left) - sum(left))
        )
        assert sum(b.weights["answers"] for b in batches) == len(left) - sum(left)
        for group in by_group(source):
            own = [(c["advantage"], score) for c, score, target in group if float(target.abs().sum())]
            if own:
                mean = sum(score for _, score in own) / len(own)
                assert all(float(a[0]) * (score - mean) >= 0 for a, score in own)
        assert step_of(grpo.make_loss(s), module, batches)[1].isfinite().all()
        events = [e["event"] for e in source.events(0)]
        assert "answers without a rating" in events
        assert events[-1] == "rewarded"


def test_rewards_that_tell_no_answers_apart_are_announced(make):
    for rule, said in (lambda a: 0.0, True), (last_token, False):
        _, _, source = make(rule=rule)
        source(0)
        assert ("rewards all alike" in [e["event"] for e in source.events(0)]) == said


def test_a_minibatch_without_a_rated_answer_is_a_step_without_effect(make):
    s, module, source = make(minibatches=4)
    first = source.given.prompts.ids[0]
    source.given.reward.rule = lambda a: None if a.prompt_ids == asked else last_token(a)
    asked = source.given.prompts.ids[source.given.prompts.order.rows(1, 0)[0]]
    assert first
    steps = [step for step, _ in zip(grpo.train(s, module, source), range(4), strict=False)]
    assert all(math.isfinite(step.metrics["loss"]) for step in steps)
    assert min(step.metrics["tokens_learned"] for step in steps) == 0


def test_a_reward_that_rates_nothing_stops_the_run_in_one_line(make):
    _, _, source = make(rule=lambda a: None)
    with pytest.raises(TrainingError, match="fake: rated none of the 12 answers"):
        source(0)
    _, _, source = make()
    source.given.reward.rate = lambda answers: [1.0]
    with pytest.raises(UserError, match="fake: 1 ratings for 12 answers"):
        source(0)


def test_cut_answers(make):
    ending = Ending(missing_eos=-1.0)
    assert [ending.of(x, 3, False, 10) for x in (0.5, -2.0)] == [-1.0, -2.0]
    assert ending.of(0.5, 3, True, 10) == 0.5
    assert Ending(missing_eos=-1.0, missing_eos_is="reward").of(-2.0, 10, False, 10) == -1.0
    assert Ending(missing_eos=1.0, missing_eos_is="penalty").of(0.5, 10, False, 10) == -0.5
    soft = Ending(overlong=0.5)  # from 5 tokens of 10 on
    assert [soft.of(1.0, n, True, 10) for n in (3, 5, 7, 10)] == [1.0, 1.0, pytest.approx(0.6), 0.0]
    assert soft.of(1.0, 10, False, 10) == 0.0
    _, _, source = make(truncated="mask", max_new=4)
    batches = source(0)
    learned = sum(b.weights["answers"] for b in batches)
    assert learned == round((1 - source.last["truncated"]) * 12) < 12
    assert source.last["unrated"] == 0


def test_dynamic_sampling_replaces_groups_that_say_nothing(make):
    """Some prompts give equal rewards; the rollout is filled with others, in so many rounds at the most, and counts what it asked."""
    odd = lambda a: float(len(a.prompt_ids) % 2) * last_token(a)  # noqa: E731
    s, module, source = make(rule=odd, dynamic=6, kl="none")
    source(0)
    assert source.last["dead"] > 0
    assert source.last["asked"] > 1
    groups = [[score for _, score, _ in group] for group in by_group(source)]
    assert len(groups) == 4
    assert all(max(group) - min(group) > 1e-4 for group in groups)
    state = source.state()["at"]
    assert state == round(source.last["asked"] * 4)
    s, module, source = make(rule=lambda a: 1.0, dynamic=2, kl="none")  # never enough: it goes on with what there is
    batches = source(0)
    assert source.last["dead"] == 1
    assert len(list(by_group(source))) == 1
    assert step_of(grpo.make_loss(s), module, batches)[1].abs().max() == 0


def test_at_step_0_the_ratio_is_one_and_the_policy_the_reference(make):
    for more in {"epochs_per_batch": 2}, {"ratio": "sequence", "epochs_per_batch": 2}:
        s, module, source = make(**more)
        step = next(grpo.train(s, module, source))
        assert step.metrics["clipped"] == 0
        assert step.metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
        assert step.metrics["kl"] == pytest.approx(0, abs=1e-4)
        assert step.metrics["sampler_gap"] < 1e-5
        assert step.metrics["kl_loss"] == pytest.approx(0, abs=1e-6)
    s, module, source = make()
    disturb(source.reference, 0.05)
    with pytest.raises(TrainingError, match="the policy is not the reference"):
        next(grpo.train(s, module, source))


def test_the_most_and_the_least_rewarded_are_written_down(make):
    _, _, source = make()
    source(0)
    [event] = [e for e in source.events(0) if e["event"] == "rewarded"]
    scores = sorted(score for _, _, score, _ in answers(source))
    assert [row["reward"] for row in event["most"]] == pytest.approx(scores[::-1][:2])
    assert [row["reward"] for row in event["least"]] == pytest.approx(scores[:2])
    assert event["most"][0]["prompt"]


def test_a_restored_source_goes_on_with_its_pending_rollout(make):
    _, module, source = make(epochs_per_batch=2, minibatches=2, dynamic=2)
    source(0)
    state = source.state()
    _, _, again = make(epochs_per_batch=2, minibatches=2, dynamic=2)
    disturb(module["policy"])
    again.restore(state)
    for step in 1, 2, 3:
        for a, b in zip(source(step), again(step), strict=True):
            assert all(torch.equal(x, b.tensors()[n]) for n, x in a.tensors().items())
    assert again.at == source.at
    assert again.metrics(3) == source.metrics(3)


def test_presets_and_what_is_given_beside_them():
    def of(**more):
        return resolved(build(grpo.GRPO, {"model": "m", "reward": "r", "prompts": "p", **more}))

    for name, changed in PRESETS.items():
        s = of(preset=name)
        want = BASE | changed
        got = s.switches.model_dump()
        assert {k: got[k] for k in want if k not in ("overlong", "constant")} == {
            k: v for k, v in want.items() if k not in ("overlong", "constant")
        }
        assert s.ending.overlong == want["overlong"]
        assert got["constant"] == (want["constant"] or 48.0)
    assert of(preset="dapo", clip_high="0.5", scale="none").switches.clip_high == 0.5
    assert of(preset="grpo", clip=0.1).switches.clip_high == 0.1  # symmetric
    assert of(preset="dapo", clip=0.1).switches.clip_high == 0.28
    assert of(preset="rloo", kl="none").switches.beta == 0
    assert of(preset="dapo", overlong=0.0).ending.overlong == 0


def test_what_the_user_did_wrong(toy, tmp_path):
    for more, what in (
        ({"temperature": 0}, "--temperature 0: GRPO must sample"),
        ({"top_k": 5}, r"top_k 5: GRPO learns from the policy's own distribution"),
        ({"samples_per_prompt": 1}, "--samples-per-prompt 1: .*give at least 2"),
        ({"preset": "dapo", "beta": 0.1}, "--beta 0.1, but --kl is none"),
        ({"preset": "dapo", "kl": "k2-in-loss"}, "--kl k2-in-loss with --beta 0 has no effect"),
        ({"kl": "k1-in-loss"}, "its gradient is 0 on average"),
        ({"kl": "k3-in-reward"}, "use k1-in-reward"),
        ({"constant": 3.0}, "--constant 3, but --aggregation is sequence"),
        ({"outcome_weight": 0.5}, r"--outcome-weight 0\.5 has no effect without --step-reward"),
        ({"kl_credit": "to-go"}, "it is about k1-in-reward"),
        ({"preset": "ppo"}, "preset"),
        ({"clip": -1}, "clip"),
        ({"reward": toy.sft}, "a language model, not a reward model"),
        ({"step_reward": toy.reward}, "not their steps|not a process reward model"),
    ):
        with pytest.raises(UserError, match=what):
            train("grpo", tmp_path / "out", **(values_of("grpo", toy) | more))
        assert not (tmp_path / "out").exists()


def test_a_group_of_one_needs_no_group(make):
    _, _, source = make(preset="reinforce++", samples_per_prompt=1)
    source(0)
    assert "dead" not in source.last


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["grpo", "rloo", "gspo"])
def test_it_raises_the_reward(toy, tmp_path, preset):
    """The reward model prefers "It is grey." to the two other ways in which the toy's SFT model answers."""
    values = values_of("grpo", toy) | {"preset": preset, "rollouts": 25, "prompts_per_step": 8, "lr": 3e-3, "beta": 0.01, "max_new": 16}
    if preset == "gspo":
        del values["beta"]
    train("grpo", tmp_path / "grpo", **values)
    reward = [row["reward"] for row in Run(tmp_path / "grpo").rows("metrics") if "reward" in row]
    assert sum(reward[-5:]) / 5 > sum(reward[:3]) / 3 + 0.4


def test_ppo_with_a_reward_that_is_no_model(make):
    """The value starts from the policy; scores can be put on their own scale, once or as they come."""
    for how in "once", "running":
        s, module, source = make(method=ppo, normalise=how, rule=lambda a: 100 + 10 * last_token(a), missing_eos=None)
        assert module["value"].score.out_features == 1
        source(0)
        scores = torch.tensor([score for _, _, score, _ in answers(source)])
        assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
        assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
        first = source.seen
        source.given.reward.rule = lambda a: 500.0
        source(s.plan.updates)
        assert (source.seen == first) == (how == "once")
        assert source.state()["seen"] == source.seen
        late = [score for _, _, score, _ in answers(source)]
        assert (max(late) > 20) == (how == "once")


def test_ppo_mixes_other_data_in(make, toy):
    """PPO-ptx: its own term, divided by its own tokens."""
    s, module, source = make(method=ppo, ptx_data=toy.text, ptx_batch=3, ptx_weight=2.0)
    step = next(ppo.train(s, module, source))
    batches = [b for b in source(1) if "advantage" not in b.columns]
    assert sum(b.weights["ptx"] for b in batches) == sum(float(b.target.sum()) for b in batches) > 0
    assert step.metrics["loss"] == pytest.approx(step.metrics["policy"] + 0.1 * step.metrics["value"] + 2 * step.metrics["ptx"], rel=1e-5)


def test_ppo_whitens_as_it_is_told(make):
    for how, one in ("population", 0), ("bessel", 1):
        _, _, source = make(method=ppo, whiten=how)
        source(0)
        advantage = torch.cat([c["advantage"] for _, c, _, _ in answers(source)])
        assert float(advantage.var(correction=one)) == pytest.approx(1, abs=1e-4)
    _, _, source = make(method=ppo, whiten="none", whiten_rewards=True, lam=0.0, gamma=1e-9)
    source(0)
    reward = torch.cat([c["returns"] for _, c, _, _ in answers(source)])  # lambda 0, no future: the reward of each token
    plain = torch.zeros_like(reward)
    at = -1
    for _, _, score, target in answers(source):
        at += len(target)
        plain[at] = score
    torch.testing.assert_close(reward, (plain - plain.mean()) / plain.std(correction=0) + plain.mean(), atol=1e-3, rtol=1e-3)


def test_whitening_is_over_the_answers_that_are_learned(make):
    """What the rater could not rate has no say in the scale of the others' rewards and advantages."""
    some = {"method": ppo, "rule": lambda a: None if sum(a.tokens) % 2 else 5 + last_token(a), "samples_per_prompt": 3, "beta": 0.0}
    _, _, source = make(**some, whiten="none", whiten_rewards=True, lam=0.0, gamma=1e-9)
    source(0)
    assert 0 < source.last["unrated"] < 1
    kept = [(c["returns"], score) for _, c, score, target in answers(source) if target.any()]
    plain = torch.cat([torch.tensor([*[0.0] * (len(r) - 1), score]) for r, score in kept])
    want = (plain - plain.mean()) / plain.std(correction=0) + plain.mean()
    torch.testing.assert_close(torch.cat([r for r, _ in kept]), want, atol=1e-3, rtol=1e-3)
    _, _, source = make(**some)
    source(0)
    advantage = torch.cat([c["advantage"] for _, c, _, target in answers(source) if target.any()])
    assert float(advantage.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantage.var(correction=0)) == pytest.approx(1, abs=1e-4)


def test_sampled_steps_and_kl():
    a = Sampled(None, torch.tensor([-1.0, -2.0]), steps=[(0, 0.5), (1, 1.0)], found={"ref_logp": torch.tensor([-1.5, -2.0])})
    assert a.kl.tolist() == [0.5, 0.0]
    assert a.step_reward.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_server_samples_from_the_weights_that_are_trained(toy, tmp_path, adapter):
    """The server's folder is read anew before each rollout; the ratio starts from the trainer's own log-probs."""
    model, tokenizer = load_policy(toy.sft)
    save(model, tokenizer, tmp_path / "served")
    server = Server(model, tmp_path / "served")
    values = values_of("grpo", toy) | {"rollouts": 3, "lr": 1e-2, "vllm": server.url, "vllm_folder": str(tmp_path / "served")}
    try:
        train("grpo", tmp_path / "run", **values, adapter=adapter)
    finally:
        server.shutdown()
        server.server_close()
    assert len(server.calls) == 6  # weights and cache, for each rollout
    assert len(server.asked) == 3 * values["prompts_per_step"] * values["samples_per_prompt"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["sampler_gap"] for row in rows if "sampler_gap" in row) < 1e-5
    read = server.model.get_input_embeddings().weight if adapter == "full" else server.model.model.layers[0].self_attn.q_proj.weight
    own = model.get_input_embeddings().weight if adapter == "full" else model.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(read, own)


def test_a_served_folder_that_must_not_be_replaced(toy, tmp_path):
    """The model to start from, an adapter's base, the reward model, what lies above them, and what is no model."""
    train("sft", tmp_path / "lora", **(values_of("sft", toy) | {"adapter": "lora", "epochs": 0.1}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    given = values_of("grpo", toy) | {"vllm": "http://localhost:1"}
    for folder, model in (
        (f"{toy.sft}/model", toy.sft),
        (toy.sft, f"{toy.sft}/model"),
        (f"{toy.base}/model", str(tmp_path / "lora")),
        (f"{toy.reward}/model", toy.sft),
        (str(Path(toy.sft).parent), toy.sft),
    ):
        with pytest.raises(UserError, match=r"replaced before each rollout, and .*, which the run reads, lies there"):
            train("grpo", tmp_path / "run", **(given | {"model": model, "vllm_folder": folder}))
    with pytest.raises(UserError, match=r"is no model.s folder now"):
        train("grpo", tmp_path / "run", **given, vllm_folder=str(tmp_path / "mine"))
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "mine" / "letters.txt").read_text() == "dear"


def test_a_server_without_its_folder_is_refused(toy, tmp_path):
    with pytest.raises(UserError, match="--vllm and --vllm-folder belong together"):
        train("grpo", tmp_path / "run", **values_of("grpo", toy), vllm="http://localhost:1")
