"""Driving a stage: what is logged, and that no death changes the result. As a script: one such stage, to be killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from temper.config import UserError
from temper.driver import drive
from temper.forest import Forest, Segment, plant
from temper.runs import Run, atomic_write, load_latest
from temper.train import Loss, Optim, Term, TrainingError, fit
from temper.train.fit import TIMINGS

STEPS = 24
IDENTITY = {"method": "toy"}


class Rollouts:
    """Samples from the model every other step and keeps the rollout for the step after, like PPO."""

    def __init__(self, model, pause=0.0):
        self.model, self.pause, self.rng, self.pending = model, pause, np.random.Generator(np.random.Philox(7)), None

    def __call__(self, step):
        time.sleep(self.pause)
        if step % 2 == 0:
            starts = torch.tensor(self.rng.integers(0, 11, 4))
            sampled = torch.multinomial(self.model(starts).softmax(-1).detach(), 3, replacement=True)
            self.pending = plant([[Segment([int(a), *b], [0.0, 1.0, 1.0, 1.0])] for a, b in zip(starts, sampled.tolist(), strict=True)])
        return [self.pending]

    def state(self):
        return {"rng": self.rng.bit_generator.state, "pending": self.pending.tensors()}

    def restore(self, state):
        self.rng.bit_generator.state = state["rng"]
        self.pending = Forest.from_tensors(state["pending"])


def stage(folder, *, pause=0.0, source=None, finish=None, claim=None, **more):
    """Runs the toy stage in `folder` as far as it gets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Dropout(0.2), nn.Linear(8, 11))

    def loss(model, forest):
        at = forest.learned
        logp = model(forest.tokens[forest.previous[at]]).log_softmax(-1).gather(1, forest.tokens[at, None])
        return Loss({"nll": Term(-logp.sum(), "tokens")}, {})

    def evaluate():
        model.eval()
        return {"norm": float(model[2].weight.norm().detach()), "noise": float(torch.rand(()))}

    def export(module):
        assert module is model
        atomic_write(run.file("weights.safetensors"), save(module.state_dict()))

    batches = Rollouts(model, pause)
    if source:
        batches = source(batches)
    with Run.claim(folder, IDENTITY, **(claim or {})) as run:
        settings = {"evaluate_every": 5, "samples_every": 8, "save_seconds": 0.0, "title": "toy", "quiet": True, **more}
        return drive(
            lambda state: fit(model, batches, loss, steps=STEPS, optim=Optim(lr=0.05), seed=1, resume=state),
            run,
            steps=STEPS,
            evaluate=evaluate,
            samples=lambda: [{"text": str(torch.rand(()).item())}],
            finish=finish or export,
            **settings,
        )


def result(folder):
    """What must not depend on how often the stage was interrupted."""
    run = Run(folder)
    metrics = [{name: value for name, value in row.items() if name not in TIMINGS} for row in run.rows("metrics")]
    return metrics, run.rows("samples"), (Path(folder) / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "toy"
    summary = stage(folder)
    yield folder, summary, result(folder)
    torch.set_num_threads(threads)


def test_what_a_run_leaves_behind(whole):
    folder, summary, (metrics, samples, _) = whole
    assert [row["step"] for row in metrics if "eval" not in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in metrics if "eval" in row] == [5, 10, 15, 20, 24]
    assert [row["step"] for row in samples] == [8, 16, 24]
    run = Run(folder)
    assert run.done
    assert run.stage["summary"] == summary
    assert run.status["phase"] == "done"
    assert (summary["steps"], summary["tokens"], summary["tokens_learned"], summary["resumed"]) == (STEPS, STEPS * 16, STEPS * 12, 0)
    assert summary["seconds"] > 0
    assert summary["peak_mb"] > 10
    assert summary["last"]["loss"] == metrics[-2]["loss"]
    assert [row["event"] for row in run.rows("events")] == ["first update"]
    assert not run.checkpoints.exists()
    assert load_file(folder / "weights.safetensors").keys() == {"0.weight", "2.weight", "2.bias"}


def test_a_run_that_is_done_is_not_run_again(whole):
    folder, summary, before = whole

    def never(batches):
        raise AssertionError

    assert stage(folder, finish=never) == summary
    assert result(folder) == before


class StopAt:
    """Does something when the source is asked for a step."""

    def __init__(self, inner, step, action):
        self.inner, self.step, self.action = inner, step, action

    def __call__(self, step):
        if step == self.step:
            self.action()
        return self.inner(step)

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 7, 8])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(whole, tmp_path, capsys, number, step):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as caught:
        stage(
            tmp_path / "toy",
            source=lambda inner: StopAt(inner, step, lambda: os.kill(os.getpid(), number)),
            save_seconds=1e9,
            command="temper toy --out x",
        )
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"stopped after step {step + 1} of {STEPS}, saved in" in said
    assert "the same command goes on: temper toy --out x" in said
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = Run(tmp_path / "toy")
    assert run.status["phase"] == "interrupted"
    assert not run.done
    assert load_latest(run.checkpoints).step == step + 1
    summary = stage(tmp_path / "toy")
    assert summary["resumed"] == 1
    assert result(tmp_path / "toy") == whole[2]
    assert summary["tokens"] == whole[1]["tokens"]


def test_a_second_ctrl_c_stops_at_once_and_loses_only_this_step(whole, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "toy", source=lambda inner: StopAt(inner, 5, twice))
    stage(tmp_path / "toy")
    assert result(tmp_path / "toy") == whole[2]


def test_a_death_between_the_last_step_and_done(whole, tmp_path):
    def dies(module):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        stage(tmp_path / "toy", finish=dies)
    assert not Run(tmp_path / "toy").done

    def never(inner):
        return StopAt(inner, STEPS - 1, lambda: pytest.fail("the last step was made again"))

    stage(tmp_path / "toy", source=never)
    assert result(tmp_path / "toy") == whole[2]


def test_any_exception_leaves_the_last_checkpoint_to_go_on_from(whole, tmp_path):
    """Also a step's rows that were logged after the checkpoint, and a torn line, are made again."""

    def fails():
        raise RuntimeError("some bug")

    with pytest.raises(RuntimeError, match="some bug"):
        stage(tmp_path / "toy", source=lambda inner: StopAt(inner, 11, fails), save_seconds=1e9)
    with open(tmp_path / "toy" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 12, "lo')
    assert load_latest(Run(tmp_path / "toy").checkpoints).state is None
    stage(tmp_path / "toy")
    assert result(tmp_path / "toy") == whole[2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(whole, tmp_path, capsys):
    def fails():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stage(tmp_path / "toy", source=lambda inner: StopAt(inner, 13, fails))
    last = tmp_path / "toy" / "checkpoints" / "step-00000013"
    os.truncate(last / "tensors.safetensors", 100)
    stage(tmp_path / "toy", quiet=False)
    said = capsys.readouterr().err
    assert f"{last} is damaged (tensors.safetensors does not match its checksum); using the one before it" in said
    assert f"toy: going on after step 12 of {STEPS}" in said
    events = Run(tmp_path / "toy").rows("events")
    assert [event["event"] for event in events if "step" not in event] == ["damaged checkpoint", "resumed"]
    assert result(tmp_path / "toy") == whole[2]


def test_nan_stops_the_run_and_saves_nothing_over_the_last_checkpoint(tmp_path):
    def poison(inner):
        return StopAt(inner, 7, lambda: inner.model[2].weight.data.fill_(float("nan")))

    with pytest.raises(TrainingError, match="step 8: loss term 'nll' is nan in micro-batch 1 of 1"):
        stage(tmp_path / "toy", source=poison)
    run = Run(tmp_path / "toy")
    assert load_latest(run.checkpoints).step == 7
    assert run.status["phase"] == "failed"
    assert run.rows("events")[-1]["event"] == "stopped"


def test_full_disk_while_saving(whole, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="step-00000010: no space left on the disk; the checkpoint before"):
        stage(tmp_path / "toy", source=lambda inner: StopAt(inner, 9, lambda: patch.setattr("safetensors.torch.save_file", full)))
    stage(tmp_path / "toy")
    assert result(tmp_path / "toy") == whole[2]


def test_checkpoints_by_seconds(tmp_path):
    def stop(module):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "a", save_seconds=1e9, finish=stop)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000024"]
    stage(tmp_path / "a")
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_the_memory_of_all_ranks_is_summed(tmp_path, monkeypatch):
    monkeypatch.setattr("temper.driver._peak_mb", lambda: 100.0)
    monkeypatch.setattr("temper.train.ranks.gather", lambda value: [value, 3 * value] if isinstance(value, float) else [value])
    assert stage(tmp_path / "a")["peak_mb"] == 400


def test_plain_lines_without_a_terminal_and_silence_when_quiet(tmp_path, capsys, monkeypatch):
    stage(tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("temper.driver.LINES", 0.0)
    stage(tmp_path / "b", quiet=False)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith(f"toy 1/{STEPS}  loss ")
    assert lines[0].endswith("left")
    assert len(lines) == STEPS


def test_steps_that_end_early_are_an_error(tmp_path):
    with Run.claim(tmp_path / "r", IDENTITY) as run, pytest.raises(RuntimeError, match="ended after 0 of 3"):
        drive(lambda state: iter(()), run, steps=3, finish=lambda module: None, quiet=True)


@pytest.mark.slow
def test_killed_at_two_random_moments(whole, tmp_path):
    """kill -9, the same command, kill -9, the same command."""
    folder, rng = tmp_path / "toy", random.Random()
    wanted, kills = sorted(rng.sample(range(1, STEPS - 3), 2)), 0
    command, environment = [sys.executable, __file__, str(folder)], {**os.environ, "OMP_NUM_THREADS": "1"}
    first, second, third = (subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) for _ in range(3))  # imports side by side
    for child, rows in zip((first, second), wanted, strict=True):
        assert child.stdin
        child.stdin.write(b"go\n")
        child.stdin.close()
        while sum("eval" not in row for row in Run(folder).rows("metrics")) < rows and child.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        child.kill()
        kills += child.wait() == -signal.SIGKILL
    assert kills > 0
    third.communicate(b"go\n")
    assert third.returncode == 0
    assert result(folder) == whole[2], f"killed after {wanted} steps"


if __name__ == "__main__":
    sys.stdin.readline()  # imported and ready
    torch.set_num_threads(1)
    stage(sys.argv[1], pause=0.02, save_seconds=0.04)
