"""What holds for every method: it trains from files to a folder that others can read, and packing never changes a figure."""

import json
import math
from pathlib import Path

import pytest
import torch
from toy import train, values_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from temper.config import UserError, leaves
from temper.data.template import render_prompt, stop_ids
from temper.ladder.by_hand import command_of
from temper.ladder.stage import INPUTS
from temper.methods import NAMES, examples, load
from temper.models.load import load_policy
from temper.records import Message
from temper.rollout import Request, Sampling, sample
from temper.runs import Run

TRAINED = ("pretrain", "sft", "reward", "process-reward", "dpo", "simpo", "kto", "bco", "online-dpo", "ppo", "grpo", "constitution")
MORE = {"pretrain": {"lr": 1e-2}, "sft": {"lr": 2e-2, "epochs": 6}, "reward": {"lr": 1e-2}}


def losses(folder, name="loss"):
    return [row[name] for row in Run(folder).rows("metrics") if name in row]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """method -> folder of a finished run, made when it is first asked for."""
    made = {}

    def get(method):
        if method not in made:
            out = tmp_path_factory.mktemp("trained") / method
            train(method, out, **(values_of(method, toy) | MORE.get(method, {})))
            made[method] = out
        return made[method]

    return get


@pytest.mark.parametrize("method", ["pretrain", "sft", "reward", "dpo"])
def test_the_loss_falls(trained, method):
    loss = losses(trained(method))
    assert sum(loss[-3:]) < 0.8 * sum(loss[:3])


@pytest.mark.slow
@pytest.mark.parametrize("method", [*TRAINED, "collect"])
def test_what_a_stage_leaves_behind(trained, toy, method, capsys):
    folder = trained(method)
    stage = Run(folder).stage
    assert stage["status"] == "done"
    assert stage["identity"]["method"] == method
    assert stage["card"]
    for name in ("pairs.jsonl", "rankings.jsonl") if method == "collect" else ("model/model.safetensors",):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "checkpoints").exists()
    assert not list(folder.rglob(".tmp-*"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(method, folder, **(values_of(method, toy) | MORE.get(method, {}))) == stage["summary"]  # done is not done again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "simpo", "kto"])
def test_held_out_records_are_not_trained_on_and_are_reported(trained, method):
    stage = Run(trained(method)).stage
    card, summary = stage["card"], stage["summary"]
    assert card["held_out"] > 0
    assert card["held_out"] + card["records"] == {"sft": 168, "kto": 36}.get(method, 18)
    assert any(name.startswith("held_out_") for name in summary)


@pytest.mark.parametrize("method", ["pretrain", "sft", "dpo", "kto", "online-dpo", "ppo", "grpo", "constitution"])
def test_any_program_can_load_the_model_and_it_gives_the_same_greedy_answers(trained, toy, method):
    """`AutoModelForCausalLM` and plain `generate`, no setting but the length: it stops at the end of the turn as the sampler does."""
    folder = trained(method) / "model"
    theirs, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    mine, tokenizer = load_policy(str(folder))
    stop = stop_ids(tokenizer)
    ends = theirs.generation_config.eos_token_id
    assert set(stop) <= set(ends if isinstance(ends, list) else [ends])
    questions = ["What colour is the Old Tom?", "Tell me the colour of the Long Eel.", "Is it safe?"]
    prompts = [render_prompt(tokenizer, [Message(role="user", content=q)]) for q in questions]
    answers = sample(mine, Request(prompts, sampling=Sampling(temperature=0, max_new=24), stop=stop))
    for question, prompt, (answer,) in zip(questions, prompts, answers, strict=True):
        if words.chat_template:
            chat = words.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            assert chat["input_ids"][0].tolist() == prompt
        ids = torch.tensor([prompt])
        out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert out[0, len(prompt) :].tolist() == answer.tokens
    if method != "pretrain":
        assert any(a.finish == "stop" for (a,) in answers)


SHORT: dict[str, dict[str, float]] = {
    "ppo": {"rollouts": 2},
    "grpo": {"rollouts": 3},
    "online-dpo": {"rollouts": 2},
    "constitution": {"sl_epochs": 0.5, "epochs": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_packing_changes_no_figure(toy, tmp_path, method):
    """One row per micro-batch, and all of the step in one: the same metrics to 1e-5."""
    rows = []
    for budget in 1, 100_000:
        values = values_of(method, toy) | SHORT.get(method, {"epochs": 1}) | {"tokens_per_microbatch": budget, "lr": 1e-4}
        train(method, tmp_path / str(budget), **values)
        rows.append([r for r in Run(tmp_path / str(budget)).rows("metrics") if "eval" not in r])
    assert len(rows[0]) == len(rows[1])
    for a, b in list(zip(*rows, strict=True))[:8]:  # rounding grows from step to step
        assert a.keys() == b.keys()
        noise = {"accuracy"} if abs(a.get("margin", 1.0)) < 1e-5 else set()  # at DPO's start the sign of h is rounding
        for name in a.keys() - {"seconds", "tokens_per_second", "sampler_gap", "sampler_gap_most", "tokens"} - noise:
            assert math.isclose(a[name], b[name], rel_tol=1e-4, abs_tol=1e-5), (a["step"], name, a[name], b[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_the_seed_decides(toy, tmp_path, method):
    """The same seed gives the same bytes, another seed others."""
    short: dict[str, float] = {"epochs": 0.25}
    if method in ("ppo", "grpo", "online-dpo"):
        short = {"rollouts": 1}
    elif method == "constitution":
        short = {"sl_epochs": 0.1, "epochs": 0.2}
    made = []
    for folder, seed in ("a", 0), ("b", 0), ("c", 1):
        train(method, tmp_path / folder, **(values_of(method, toy) | short | {"seed": seed}))
        made.append((tmp_path / folder / "model" / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("method", NAMES)
def test_what_a_method_file_promises(method):
    """Its metrics are explained, every input is fingerprinted, every setting says what it is, and every flag in its examples exists."""
    module = load(method)
    known = leaves(command_of(method))
    assert module.METRICS
    assert all(text for text in module.METRICS.values())
    assert all(field.description for _, field in known.values())
    assert {"model", "data", "prompts", "reward", "red_team", "helpful", "helpful_pairs", "principles"} & known.keys() <= set(INPUTS)
    for line in examples(method).strip().splitlines():
        words = line.split()
        assert words[:2] == ["temper", method]
        assert {w.removeprefix("--").replace("-", "_") for w in words if w.startswith("--")} <= known.keys()


@pytest.mark.parametrize("method", TRAINED)
def test_every_metric_is_named(trained, method):
    """What stands in metrics.jsonl beside the loop's own figures is explained in METRICS."""
    own = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_learned",
        "seconds",
        "tokens_per_second",
        "nll",
        "preference",
        "policy",
        "value",
    }
    rows = Run(trained(method)).rows("metrics")
    found = {name for row in rows for name in (row.get("eval") or row)}
    named = {name.removesuffix("_low").removesuffix("_high") for name in found - own}
    assert named <= load(method).METRICS.keys()


def test_settings_that_are_inputs_are_in_the_identity_by_content(toy, tmp_path):
    """A changed file of the same name is another run."""
    data = tmp_path / "chats.jsonl"
    data.write_bytes(Path(toy.chats).read_bytes())
    values = values_of("sft", toy) | {"data": str(data), "epochs": 0.2}
    train("sft", tmp_path / "out", **values)
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}) + "\n")
    with pytest.raises(UserError, match=r"out belongs to another run: inputs.data \w{12} there, \w{12} here"):
        train("sft", tmp_path / "out", **values)
