"""PPO: what a rollout writes down, checked with plain forward passes; the ratio's start; the partition into minibatches."""

import math

import pytest
import torch
from toy import train, values_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from temper.config import UserError, build
from temper.losses.advantage import whiten
from temper.losses.kl import adaptive_beta
from temper.methods import ppo, rollouts
from temper.runs import Run
from temper.train import TrainingError


@pytest.fixture
def make(toy, tmp_path, monkeypatch):
    """(settings, module, Rollouts) on the toy, as `prepare` makes them."""

    def build_one(**more):
        made = []

        class Caught(ppo.Rollouts):
            def __init__(self, *args):
                super().__init__(*args)
                made.append(self)

        s = build(ppo.PPO, values_of("ppo", toy) | {"beta": 0.3, **more})
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "Rollouts", Caught)
            ppo.prepare(s, Run(tmp_path / "run"))
        return s, made[0].module, made[0]

    return build_one


def disturb(model, size=0.3):
    """Another model near it."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += size * p.std() * torch.randn_like(p)
    return model


def answers(source):
    """Of each answer of the rollout: (path's ids, tokens of the answer, its columns, whether it ended)."""
    for minibatch in source.pending:
        for forest in minibatch:
            for s in range(forest.S):
                if forest.parent[s] < 0:
                    continue
                own, p = slice(int(forest.start[s]), int(forest.end[s])), int(forest.parent[s])
                path = torch.cat([forest.tokens[int(forest.start[p]) : int(forest.end[p])], forest.tokens[own]])
                columns = {n: x[own] for n, x in forest.columns.items() if n not in forest.labels}
                yield path, int(forest.end[s] - forest.start[s]), columns, float(forest.columns["ended"][s])


def plain(toy, name):
    kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    return kind.from_pretrained(f"{getattr(toy, name)}/model").eval()


@torch.no_grad()
def plain_logp(model, path, n, temperature=1.0):
    logp = (model(input_ids=path[None]).logits[0].float() / temperature).log_softmax(-1)
    return logp[:-1].gather(-1, path[1:, None])[-n:, 0]


@torch.no_grad()
def plain_values(model, path):
    """[T] the score head on every state."""
    return model.score(model.base_model(input_ids=path[None]).last_hidden_state[0])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_what_a_rollout_writes_down(make, toy, temperature):
    """Log-probs, values before the action, the score at the last token only, returns before whitening."""
    s, module, source = make(temperature=temperature, samples_per_prompt=2, lam=1.0, missing_eos=-3.0, max_new=6)
    disturb(module["policy"])
    source(0)
    reference, reward = plain(toy, "sft"), plain(toy, "reward")
    scale = reward.config.temper_reward
    ends = set()
    for path, n, c, ended in answers(source):
        ends.add(ended)
        torch.testing.assert_close(c["ref_logp"], plain_logp(reference, path, n, temperature), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(c["old_logp"], c["sampler_logp"], atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            states = plain_values(reward, path)
            before = (states[-n - 1 : -1] - scale["mean"]) / scale["std"]  # the value model starts as the reward model, as it scores
            score = (float(states[-1]) - scale["mean"]) / scale["std"] if ended else -3.0
        torch.testing.assert_close(c["old_value"], before, atol=2e-5, rtol=1e-4)
        # lambda = 1: the return of token t is the score, minus the penalties from t on
        kl = s.beta * (c["old_logp"] - c["ref_logp"])
        torch.testing.assert_close(c["returns"], score - kl.flip(0).cumsum(0).flip(0), atol=1e-4, rtol=1e-4)
    assert ends == {0.0, 1.0}
    assert source.last["sampler_gap"] < 1e-5


def test_an_answer_that_did_not_end_keeps_its_score_if_asked(make):
    _, _, source = make(missing_eos=None, max_new=3, lam=1.0, beta=0.0)
    source(0)
    found = [(c["returns"], ended) for _, _, c, ended in answers(source)]
    assert any(not ended for _, ended in found)
    assert all(float(r[0]) != -1.0 for r, _ in found)
    assert all(float((r - r[0]).abs().max()) < 1e-5 for r, _ in found)  # beta 0, lambda 1: one score for all tokens


def test_advantages_are_whitened_over_the_rollout_and_returns_are_not(make):
    _, module, source = make(samples_per_prompt=3, minibatches=3, tokens_per_microbatch=60)
    disturb(module["policy"])
    source(0)
    forests = [f for minibatch in source.pending for f in minibatch]
    assert len(forests) > 3
    old, returns, advantage = (torch.cat([f.columns[n][f.learned] for f in forests]) for n in ("old_value", "returns", "advantage"))
    torch.testing.assert_close(advantage, whiten(returns - old), atol=1e-4, rtol=1e-4)
    assert abs(float(advantage.mean())) < 1e-5
    assert float(advantage.var(correction=0)) == pytest.approx(1, abs=1e-4)
    assert float((returns - old).var()) != pytest.approx(1, abs=0.05)


def test_the_first_minibatch_has_ratio_one_and_no_kl(make):
    s, module, source = make()
    batches = source(0)
    assert source.last["kl"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for batch in batches:
            loss = ppo.make_loss(s)(module, batch)
            assert float(loss.metrics["clipped"][0]) == 0
            assert float(loss.metrics["approx_kl"][0]) == pytest.approx(0, abs=1e-6)
            at = batch.learned
            assert float(loss.terms["policy"].total) == pytest.approx(-float(batch.columns["advantage"][at].sum()), abs=1e-4)
            error = (batch.columns["old_value"] - batch.columns["returns"])[at]
            assert float(loss.terms["value"].total()) == pytest.approx(float(error.square().sum() / 2), rel=1e-4)


@pytest.mark.parametrize(("name", "what"), [("old_logp", "ratio is not 1"), ("ref_logp", "policy is not the reference")])
def test_the_check_before_the_first_step_finds_other_log_probs(make, name, what):
    s, module, source = make()

    class Tampered:
        def __call__(self, step):
            batches = source(step)
            batches[0].columns[name][batches[0].learned[1]] += 0.01
            return batches

    with pytest.raises((TrainingError, UserError), match=rf"{what}.* 0\.01"):
        next(ppo.train(s, module, Tampered()))


def test_another_reference_is_found_out(make):
    s, module, source = make()
    disturb(source.reference, 0.05)
    with pytest.raises(UserError, match="the policy is not the reference"):
        next(ppo.train(s, module, source))


@pytest.mark.parametrize(("prompts", "minibatches", "budget"), [(6, 2, 8192), (7, 3, 50), (5, 4, 1), (5, 5, 8192), (4, 1, 70)])
def test_every_epoch_learns_from_each_token_once(make, prompts, minibatches, budget):
    """Also where the prompts cannot be shared out evenly."""
    _, _, source = make(
        prompts_per_step=prompts, minibatches=minibatches, tokens_per_microbatch=budget, samples_per_prompt=2, epochs_per_batch=3
    )
    seen = []
    for inner in range(3 * minibatches):
        batches = source(inner)
        assert batches
        seen.append(sorted(tuple(f.tokens.tolist()) for f in batches))
    epochs = [sorted(f for part in seen[e * minibatches : (e + 1) * minibatches] for f in part) for e in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    whole = [f for minibatch in source.pending for f in minibatch]
    assert epochs[0] == sorted(tuple(f.tokens.tolist()) for f in whole)
    assert sum(int((f.parent < 0).sum()) for f in whole) == prompts
    assert sum(int((f.parent >= 0).sum()) for f in whole) == 2 * prompts
    sizes = [sum(int((f.parent < 0).sum()) for f in m) for m in source.pending]
    assert max(sizes) - min(sizes) <= 1


def test_a_rollout_is_sampled_only_when_the_last_one_is_used_up(make):
    _, module, source = make(minibatches=2, epochs_per_batch=2)
    source(0)
    first = source.pending
    disturb(module["policy"])
    for step in 1, 2, 3:
        source(step)
        assert source.pending is first
    source(4)
    assert source.pending is not first
    assert source.last["kl"] != pytest.approx(0, abs=1e-4)  # the weights have moved


def test_a_restored_source_goes_on_with_its_pending_rollout(make):
    _, module, source = make(kl_target=2.0)
    source(0)
    state = source.state()
    _, _, again = make(kl_target=2.0)
    disturb(module["policy"])
    again.restore(state)
    assert again.beta == source.beta == adaptive_beta(0.3, 0.0, 2.0) != 0.3
    for step in 1, 2, 3:
        for a, b in zip(source(step), again(step), strict=True):
            assert all(torch.equal(x, b.tensors()[n]) for n, x in a.tensors().items())
    assert again.metrics(3) == source.metrics(3)


def test_metrics_are_those_of_the_answers(make):
    _, module, source = make(samples_per_prompt=4)
    disturb(module["policy"])
    source(0)
    found = list(answers(source))
    lengths = [n for _, n, _, _ in found]
    kl = torch.tensor([float((c["old_logp"] - c["ref_logp"]).sum()) for _, _, c, _ in found])
    assert source.last["length"] == pytest.approx(sum(lengths) / len(lengths))
    assert source.last["kl"] == pytest.approx(float(kl.mean()), abs=1e-4)
    assert source.last["kl_error"] == pytest.approx(float(kl.std()) / math.sqrt(len(kl)), rel=1e-3)
    assert source.last["truncated"] == pytest.approx(sum(not ended for *_, ended in found) / len(found))


@pytest.mark.slow
def test_answers_that_are_cut_off_are_announced_once_and_end_a_run_in_which_none_ends(make, toy, tmp_path, monkeypatch):
    s, module, source = make(max_new=1, rollouts=4)
    found = [(step.n, e["note"]) for step in ppo.train(s, module, source) for e in step.events if e["event"] == "answers cut off"]
    assert len(found) == 1
    assert found[0][0] == 1
    assert "100% of the answers did not end" in found[0][1]
    assert "--max-new (now 1)" in found[0][1]
    assert source.state()["endless"] == 4 * 6

    monkeypatch.setattr(rollouts, "HOPELESS", 15)
    with pytest.raises(TrainingError, match=r"none of 18 answers in a row ended.*raise --max-new"):
        train("ppo", tmp_path / "ppo", **(values_of("ppo", toy) | {"max_new": 1}))
    events = Run(tmp_path / "ppo").rows("events")
    assert [e["event"] for e in events if e["event"] != "rewarded"] == ["first update", "answers cut off", "stopped"]
    s, module, source = make(max_new=1, rollouts=4, missing_eos=None)  # answers that are not meant to end
    assert len(list(ppo.train(s, module, source))) == 16


def test_a_negative_kl_is_announced_once(make, monkeypatch):
    """Answers drawn from the reference have E log(policy / reference) = -KL(reference || policy)."""
    _, module, source = make(samples_per_prompt=8)
    disturb(module["policy"])
    source(0)
    assert [e["event"] for e in source.events(0)] == ["rewarded"]
    real = rollouts.sample
    monkeypatch.setattr(rollouts, "sample", lambda model, *args, **more: real(source.reference, *args, **more))
    source(4)
    event, rewarded = source.events(4)
    assert (event["event"], rewarded["event"]) == ("negative KL", "rewarded")
    assert "not drawn from the policy" in event["note"]
    assert source.last["kl"] < -4 * source.last["kl_error"] < 0
    source(8)
    assert [e["event"] for e in source.events(8)] == ["rewarded"]


@pytest.mark.slow
def test_it_raises_the_reward(toy, tmp_path):
    """The reward model prefers "It is grey." to the two other ways in which the toy's SFT model answers."""
    values = values_of("ppo", toy) | {"rollouts": 25, "prompts_per_step": 18, "lr": 3e-3, "beta": 0.01, "minibatches": 1, "max_new": 16}
    train("ppo", tmp_path / "ppo", **values)
    rows = Run(tmp_path / "ppo").rows("metrics")
    reward = [row["reward"] for row in rows if "reward" in row]
    assert sum(reward[-6:]) / 6 > sum(reward[:6]) / 6 + 0.4
    assert rows[-1]["kl"] > 0.1


def test_what_the_user_did_wrong(toy, tmp_path):
    for more, what in (
        ({"temperature": 0}, "--temperature 0: PPO must sample"),
        ({"top_p": 0.9}, r"top_p 0\.9: PPO learns from the policy's own distribution"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty 1\.2: PPO learns from"),
        ({"kl_horizon": 100}, "--kl-horizon 100 has no effect without --kl-target"),
        ({"kl_rate": 0.2}, r"--kl-rate 0\.2 has no effect without --kl-target"),
        ({"kl_rate": 0.2, "kl_horizon": 9, "kl_target": 1}, r"--kl-rate 0\.2 has no effect beside --kl-horizon"),
        ({"kl_target": 1, "beta": 0}, "--kl-target cannot adapt --beta 0"),
        ({"ptx_weight": 3}, r"--ptx-weight 3\.0 has no effect without --ptx-data"),
        ({"missing_eos": None, "missing_eos_is": "penalty"}, "--missing-eos-is penalty has no effect without --missing-eos"),
        ({"minibatches": 7}, "--minibatches 7 > --prompts-per-step 6"),
        ({"reward": toy.sft}, "a language model, not a reward model"),
        ({"max_new": 155}, "tokens beside 155 of answer|leaves no room|for the answer"),
    ):
        with pytest.raises(UserError, match=what):
            train("ppo", tmp_path / "out", **(values_of("ppo", toy) | more))
        assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(toy, tmp_path):
    train("pretrain", tmp_path / "base", data=toy.chats.replace("chats", "text"), width=16, layers=1, heads=2, context=160, vocab=300)
    train("sft", tmp_path / "sft", model=str(tmp_path / "base"), data=toy.chats, epochs=0.1)
    with pytest.raises(UserError, match="its tokenizer is not that of"):
        train("ppo", tmp_path / "out", **(values_of("ppo", toy) | {"model": str(tmp_path / "sft")}))
