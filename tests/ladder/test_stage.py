"""One stage: a folder that is given up when nothing was trained in it, and a summary that no death leaves half-written."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from toy import train, values_of

from temper.config import UserError
from temper.data import store
from temper.ladder.stage import absent, input_fingerprint
from temper.methods import sft
from temper.runs import Run, save_checkpoint

IDENTITY = {"method": "sft"}


def test_a_run_that_is_given_up_leaves_nothing(tmp_path):
    run = Run.claim(tmp_path / "out", IDENTITY)
    run.set_status(phase="prepare", now=True)
    run.event("something")
    run.file("revisions.jsonl").write_text("{}\n")
    (run.file("revised") / "deep").mkdir(parents=True)
    run.abandon()
    assert not (tmp_path / "out").exists()
    Run.claim(tmp_path / "out", {"method": "dpo"}).close()  # anybody's now


def test_what_others_put_there_stays(tmp_path):
    run = Run.claim(tmp_path / "out", IDENTITY)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run.abandon()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("what", ["metrics", "checkpoint"])
def test_a_run_that_can_go_on_is_only_closed(tmp_path, what):
    run = Run.claim(tmp_path / "out", IDENTITY)
    if what == "metrics":
        run.log("metrics", {"step": 1})
    else:
        save_checkpoint(run.checkpoints, 3, {"fit": 1})
    run.abandon()
    assert Run(tmp_path / "out").stage["identity"] == IDENTITY
    with pytest.raises(UserError, match="belongs to another run"):
        Run.claim(tmp_path / "out", {"method": "dpo"})


def test_a_run_that_is_written_elsewhere_is_not_given_up(tmp_path):
    with Run.claim(tmp_path / "out", IDENTITY) as run:
        with pytest.raises(UserError, match="is being written by process"):
            Run.claim(tmp_path / "out", IDENTITY)
        run.log("metrics", {"step": 1})
    assert Run(tmp_path / "out").rows("metrics")


def test_a_failure_that_is_no_mistake_of_the_users_keeps_the_folder(toy, tmp_path, monkeypatch):
    """A bug in the preparation: the events and whatever was made stay to be looked at; the same command tries again."""

    def broken(settings, run):
        run.event("made something")
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("temper.methods.sft.prepare", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            train("sft", tmp_path / "out", **values_of("sft", toy))
    assert Run(tmp_path / "out").rows("events")
    train("sft", tmp_path / "out", **values_of("sft", toy))
    assert Run(tmp_path / "out").done


def test_a_death_between_done_and_the_last_line_of_the_summary(toy, tmp_path):
    """The held-out figures are added on the way back."""
    values = values_of("reward", toy)
    whole = train("reward", tmp_path / "rm", **values)
    (tmp_path / "rm" / "checkpoints").mkdir()  # they go after the run was marked as done
    assert "held_out_accuracy" in whole
    path = tmp_path / "rm" / "stage.json"
    there = json.loads(path.read_text())
    there["summary"] = {k: v for k, v in there["summary"].items() if not k.startswith("held_out")}
    path.write_text(json.dumps(there))
    assert train("reward", tmp_path / "rm", **values) == whole
    assert not (tmp_path / "rm" / "checkpoints").exists()
    assert Run(tmp_path / "rm").stage["summary"] == whole


def test_inputs_count_by_their_content(tmp_path, toy):
    (tmp_path / "a.jsonl").write_text("x")
    (tmp_path / "b.jsonl").write_text("x")
    assert input_fingerprint("data", str(tmp_path / "a.jsonl")) == input_fingerprint("data", str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_text("y")
    assert input_fingerprint("data", str(tmp_path / "a.jsonl")) != input_fingerprint("data", str(tmp_path / "b.jsonl"))
    # a stage counts by its model alone: its logs and times may differ
    assert input_fingerprint("model", toy.sft) == input_fingerprint("model", f"{toy.sft}/model") != input_fingerprint("model", toy.base)
    assert input_fingerprint("data", "world:prompts?n=3") != input_fingerprint("data", "world:prompts?n=4")


def test_only_what_is_read_counts(tmp_path, toy):
    def same(name, folder, change):
        before = input_fingerprint(name, str(folder))
        change.parent.mkdir(exist_ok=True)
        change.write_text("x")
        return input_fingerprint(name, str(folder)) == before

    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}")
    assert same("data", tmp_path / "rows", tmp_path / "rows" / "notes.pdf")
    assert same("data", tmp_path / "rows", tmp_path / "rows" / "deeper" / "b.jsonl")
    assert not same("data", tmp_path / "rows", tmp_path / "rows" / "c.jsonl")
    assert same("principles", tmp_path / "rows", tmp_path / "rows" / "d.jsonl")  # a folder is no constitution: it will be refused
    copy = shutil.copytree(f"{toy.sft}/model", tmp_path / "model")
    assert same("model", copy, copy / "runs" / "events.log")
    assert not same("model", copy, copy / "chat_template.jinja")


def test_threads_and_ranks_are_part_of_what_a_stage_is(toy, tmp_path):
    values = values_of("sft", toy) | {"epochs": 0.1}
    train("sft", tmp_path / "out", **values)
    there = Run(tmp_path / "out").stage
    assert set(there["identity"]) == {"method", "settings", "inputs", "threads", "ranks"}
    assert (there["identity"]["threads"], there["identity"]["ranks"]) == (1, 1)
    assert (there["record"]["threads"], there["record"]["ranks"]) == (1, 1)
    Run.claim(tmp_path / "two", {**there["identity"], "ranks": 2}).close()
    with pytest.raises(UserError, match="belongs to another run: ranks 2 there, 1 here"):
        Run.claim(tmp_path / "two", there["identity"])


@pytest.mark.parametrize(("name", "value"), [("VERSION", "harbour-next"), ("code_version", lambda *modules: "other code")])
def test_the_world_counts_by_its_version_and_its_code(monkeypatch, name, value):
    before = input_fingerprint("data", "world:prompts?n=3")
    monkeypatch.setattr(store, name, value)
    assert input_fingerprint("data", "world:prompts?n=3") != before


def test_what_a_job_has_to_say_stands_on_its_card(toy, tmp_path, monkeypatch):
    prepare = sft.prepare
    monkeypatch.setattr(sft, "prepare", lambda *given: dataclasses.replace(prepare(*given), notes=["the window is short"]))
    train("sft", tmp_path / "out", **values_of("sft", toy) | {"epochs": 0.1})
    assert Run(tmp_path / "out").stage["card"]["notes"] == ["the window is short"]


def test_collecting_reports_what_it_took(toy, tmp_path):
    summary = train("collect", tmp_path / "out", **values_of("collect", toy))
    assert summary["tokens"] > 0 < summary["tokens_per_second"]
    assert summary["peak_mb"] > 50
    assert "tokens" not in Run(tmp_path / "out").stage["card"]


@pytest.mark.slow
def test_every_tensor_moves_at_the_first_update(toy, tmp_path):
    """What is declared trainable is trained (PPO: policy and value; Constitutional AI: in both phases)."""
    for method, updates in ("pretrain", 1), ("sft", 1), ("reward", 1), ("dpo", 1), ("ppo", 1), ("constitution", 2):
        short = {"ppo": {"rollouts": 1}}.get(method, {"epochs": 0.3})
        train(method, tmp_path / method, **(values_of(method, toy) | short))
        found = [row for row in Run(tmp_path / method).rows("events") if row["event"] == "first update"]
        assert len(found) == updates, method
        for row in found:
            assert row["declared"] == row["changed"] > 0, (method, row)
            assert "note" not in row, (method, row)
    assert Path(tmp_path / "ppo" / "model").is_dir()


def test_what_a_reward_is_made_of_is_an_input(toy, tmp_path):
    """A --reward that names models and files is another where one of them is; the names of checks are no folders."""
    score = tmp_path / "score.py"
    score.write_text("def f(prompts, answers, metas): ...")
    spec = f"0.5*{toy.reward} + python:{score}:f - 0.1*format:words=..9"
    before = input_fingerprint("reward", spec)
    assert before == input_fingerprint("reward", spec) != input_fingerprint("reward", spec.replace("0.5", "0.6"))
    score.write_text("def f(prompts, answers, metas): pass")
    assert before != input_fingerprint("reward", spec)
    assert input_fingerprint("reward", toy.reward) == input_fingerprint("model", toy.reward)
    assert absent({"reward": spec}) is None
    assert absent({"reward": "maths + gold/3"}) is None  # may be a name of the hub
    assert absent({"reward": f"maths + {tmp_path}/nothing"}) == f"{tmp_path}/nothing: no such folder"
    score.unlink()
    assert absent({"reward": spec}) == f"{score}: no such file"
    with pytest.raises(UserError, match="no rater 'mahts'"):
        absent({"reward": "mahts"})
