"""One backbone for PPO's models: each role computes what the same adapter alone does, and nothing leaks between them."""

import pytest
import torch
from torch import nn
from toy import train, values_of

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models import heads, shared
from temper.models.adapt import Adapter
from temper.models.commands import main
from temper.models.load import load_policy, load_scalar
from temper.runs import Run
from temper.train import Loss, Optim, Term, fit
from temper.train.compute import Compute

FOREST = plant([[Segment([1, 2, 3, 4]), Segment([5, 6, 7], [1, 1, 1], 0), Segment([8, 9], [1, 0.5], 0)]])
LORA = {"adapter": "lora", "lora_rank": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def ladder(toy, tmp_path_factory):
    """SFT and reward model as adapters of the toy's base."""
    folder = tmp_path_factory.mktemp("adapters")
    train("sft", folder / "sft", **(values_of("sft", toy) | LORA | {"lr": 2e-3, "epochs": 4, "batch": 16}))
    train("reward", folder / "reward", **(values_of("reward", toy) | {"model": str(folder / "sft"), "lr": 1e-3, "epochs": 2}))
    return folder


@pytest.mark.slow
def test_adapters_in_the_methods(ladder, toy, tmp_path):
    """SFT learns; a reward model begins as the SFT adapter; DPO's reference is the adapter it began with; the gate is on the card."""
    rows = [r["loss"] for r in Run(ladder / "sft").rows("metrics") if "loss" in r]
    assert sum(rows[-3:]) < 0.9 * sum(rows[:3])
    card = Run(ladder / "sft").stage["card"]
    assert "read back, logits within" in card["export"]
    train("dpo", tmp_path / "dpo", **(values_of("dpo", toy) | {"model": str(ladder / "sft"), "lr": 1e-3, "epochs": 2}))
    first = next(r for r in Run(tmp_path / "dpo").rows("metrics") if "loss" in r)
    assert abs(first["loss"] - 0.693147) < 1e-4
    model, _ = load_policy(tmp_path / "dpo")
    assert model.get_base_model().name_or_path.endswith("base/model")
    for kind in ("prompt", "prefix", "dora"):
        train("sft", tmp_path / kind, **(values_of("sft", toy) | {"adapter": kind, "virtual_tokens": 4, "epochs": 0.5}))
        assert "read back" in Run(tmp_path / kind).stage["card"]["export"]


def test_roles_are_the_adapters_alone(ladder):
    policy, _ = load_policy(ladder / "sft", adapters=Adapter())
    policy, reference = shared.roles(policy)
    reward, _ = load_scalar(str(ladder / "reward"), beside=policy)
    value, _ = load_scalar(str(ladder / "reward"), beside=policy, adapters=Adapter())
    alone, _ = load_policy(ladder / "sft")
    judge, _ = load_scalar(ladder / "reward")
    assert reward.backbone is value.backbone is policy.backbone
    at = FOREST.last
    with torch.no_grad():
        expected, scores = heads.token_logp(alone, FOREST), heads.scalar(judge, FOREST, at)
        for _ in range(2):
            assert torch.equal(heads.scalar(reward, FOREST, at), scores)
            assert torch.equal(heads.token_logp(policy, FOREST), expected)
            assert torch.equal(heads.scalar(value, FOREST, at), scores)
            assert torch.equal(heads.token_logp(reference, FOREST), expected)
    assert reward.config.temper_reward == judge.config.temper_reward
    module = nn.ModuleDict({"policy": policy, "value": value})
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"policy", "value"}
    assert trained == set(module.state_dict())
    assert not [n for n, p in reward.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_gradients_go_to_each_roles_own_adapter(ladder, activations):
    """The same update as with models apart, also where a layer is computed again in the backward pass."""

    def loss(module, batch):
        at = batch.learned
        return Loss(
            {
                "policy": Term(-heads.token_logp(module["policy"], batch).sum(), per="tokens"),
                "value": Term(lambda: heads.scalar(module["value"], batch, batch.previous[at]).square().sum(), per="tokens"),
            },
            {},
        )

    def updated(module):
        optim = Optim(lr=1e-3, warmup=0.0)
        *_, last = fit(module, lambda step: [FOREST], loss, steps=2, optim=optim, compute=Compute(activations=activations))
        with torch.no_grad():
            return heads.token_logp(module["policy"], FOREST), heads.scalar(module["value"], FOREST, FOREST.last), last.metrics["value"]

    policy, _ = shared.roles(load_policy(ladder / "sft", adapters=Adapter())[0])
    value, _ = load_scalar(str(ladder / "reward"), beside=policy, adapters=Adapter())
    apart = [load_policy(ladder / "sft", adapters=Adapter())[0], load_scalar(ladder / "reward", adapters=Adapter())[0]]
    ours = updated(nn.ModuleDict({"policy": policy, "value": value}))
    theirs = updated(nn.ModuleDict(dict(zip(("policy", "value"), apart, strict=True))))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_ppo_on_one_backbone(ladder, toy, tmp_path):
    """From adapters of one base, and from a full model under a new adapter: trained, saved as an adapter of that base, loaded anywhere."""
    values = values_of("ppo", toy) | {"reward": str(ladder / "reward"), "rollouts": 2}
    train("ppo", tmp_path / "ppo", **(values | {"model": str(ladder / "sft")}))
    rows = [r for r in Run(tmp_path / "ppo").rows("metrics") if "eval" not in r]
    assert abs(rows[0]["kl"]) < 1e-3
    assert abs(rows[-1]["kl"]) > 0
    model, _ = load_policy(tmp_path / "ppo")
    assert model.get_base_model().name_or_path.endswith("base/model")
    weights = tmp_path / "ppo" / "model" / "adapter_model.safetensors"
    assert weights.read_bytes() != (ladder / "sft" / "model" / "adapter_model.safetensors").read_bytes()
    train("ppo", tmp_path / "other", **(values | LORA | {"model": toy.sft, "reward": toy.reward}))  # two backbones, no reference model
    assert load_policy(tmp_path / "other")[0].get_base_model().name_or_path.endswith("sft/model")


@pytest.mark.slow
def test_the_commands(ladder, toy, tmp_path, capsys):
    assert main(["merge", str(ladder / "sft"), "--out", str(tmp_path / "whole")]) == 0
    assert "logits within" in capsys.readouterr().out
    assert main(["check", str(ladder / "sft"), "--against", str(tmp_path / "whole")]) == 0
    assert main(["export", str(ladder / "sft"), "--out", str(tmp_path / "half"), "--form", "merged", "--precision", "bfloat16"]) == 0
    assert main(["export", str(ladder / "reward"), "--out", str(tmp_path / "judge")]) == 0
    other = {"adapter": "lora", "lora_rank": 3, "rslora": True, "lr": 5e-3, "epochs": 0.5}
    train("sft", tmp_path / "other", **(values_of("sft", toy) | other))
    with torch.no_grad():
        alone, bare, whole = (heads.token_logp(load_policy(x)[0], FOREST) for x in (ladder / "sft", toy.base, tmp_path / "whole"))
        torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)
        both = [str(ladder / "sft"), str(tmp_path / "other")]
        for command, more, weights in (
            ("stack", [], (1, 1)),
            ("average", [], (0.5, 0.5)),
            ("average", ["--weights", "3", "1"], (0.75, 0.25)),
        ):
            out = tmp_path / f"{command}{len(more)}"
            assert main([command, *both, "--out", str(out), *more]) == 0
            made, one, two = (load_policy(x)[0] for x in (out, *both))
            deltas = [
                {n: p.get_delta_weight("default") for n, p in m.named_modules() if "default" in getattr(p, "lora_A", {})}
                for m in (made, one, two)
            ]
            for name, delta in deltas[0].items():
                expected = weights[0] * deltas[1][name] + weights[1] * deltas[2][name]
                torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(alone, bare, atol=1e-3)
    for argv, message in (
        (["merge", toy.sft, "--out", "x"], "no adapter"),
        (["stack", both[0], "--out", "x"], "two adapters or more"),
        (["average", *both, "--weights", "1", "--out", "x"], "1 weights for 2 adapters"),
        (["stack", both[0], str(ladder / "reward"), "--out", "x"], "only plain LoRA adapters of language models"),
        (["fold"], "no command 'adapter fold'"),
    ):
        with pytest.raises(UserError, match=message):
            main(argv)
    with pytest.raises(UserError, match="gives other logits") as wrong:
        main(["check", both[0], "--against", toy.base])
    assert wrong.value.code == 1


def test_the_identity_sees_the_base(ladder, toy, tmp_path):
    from temper.ladder.stage import input_fingerprint

    first = input_fingerprint("model", str(ladder / "sft"))
    assert first == input_fingerprint("model", str(ladder / "sft"))
    assert first != input_fingerprint("model", toy.base)


@pytest.mark.slow
def test_killed_with_an_adapter(ladder, toy, tmp_path, monkeypatch):
    """Stopped after a checkpoint and gone on with: the same bytes; the checkpoint holds no frozen weights."""
    from temper.runs import save_checkpoint

    class Dead(BaseException):
        pass

    values = values_of("ppo", toy) | {"model": str(ladder / "sft"), "reward": str(ladder / "reward"), "rollouts": 2}
    kinds = (("sft", values_of("sft", toy) | LORA | {"lora_dropout": 0.1, "epochs": 0.5}), ("ppo", values))
    for method, values in kinds:
        train(method, tmp_path / method, **values)

        def stop(folder, step, state, *args, **kwargs):
            assert not [n for n in state["fit"]["module"] if "base_layer" in n or "embed" in n]
            save_checkpoint(folder, step, state, *args, **kwargs)
            if step == 2:
                raise Dead

        with monkeypatch.context() as patch:
            patch.setattr("temper.driver.save_checkpoint", stop)
            with pytest.raises(Dead):
                train(method, tmp_path / f"{method} killed", save_seconds=1e-9, **values)
        train(method, tmp_path / f"{method} killed", **values)
        one, two = (tmp_path / name / "model" / "adapter_model.safetensors" for name in (method, f"{method} killed"))
        assert one.read_bytes() == two.read_bytes()
        assert Run(tmp_path / f"{method} killed").stage["summary"]["resumed"] == 1
