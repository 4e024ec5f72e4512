"""kill -9 at random moments, then the same command: the same bytes as the uninterrupted run, for every method."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from toy import command, result, start, train, values_of

from temper.runs import Run, save_checkpoint

TRAINED = ("pretrain", "sft", "reward", "process-reward", "dpo", "kto", "bco", "online-dpo", "ppo", "grpo", "constitution")
LIMIT = 120.0  # seconds after which a command is taken to hang


def finish(process, log):
    process.join(LIMIT)
    assert process.exitcode == 0, log.read_text()


def uninterrupted(method, toy, folder) -> tuple[tuple, float]:
    """(its result, the seconds it took)"""
    log, began = folder / "log", time.monotonic()
    finish(start(command(method, toy, folder / "whole"), log), log)
    return result(folder / "whole"), time.monotonic() - began


def killed_until(method, toy, folder, expected, seconds, moments, rng) -> int:
    """Kills the command at `moments` random moments of runs in one folder after the other, each brought to its end; how many hit."""
    hits, tries = 0, 0
    while hits < moments:
        out, log = folder / f"killed-{tries}", folder / "log"
        tries += 1
        assert tries < 10 * moments, "it is always done before it can be killed"
        while hits < moments:
            began, process = time.monotonic(), start(command(method, toy, out, "--save-seconds", "0.05"), log)
            process.join(rng.uniform(0.02, 1.0) * seconds)
            process.kill()
            process.join(LIMIT)
            if process.exitcode != -signal.SIGKILL:
                assert process.exitcode == 0, log.read_text()
                seconds = min(seconds, time.monotonic() - began)  # the first run may have waited for imports
                break
            hits += 1
        finish(start(command(method, toy, out, "--save-seconds", "0.05"), log), log)
        assert result(out) == expected, f"{method}: differs after {hits} kills"
        assert not [path.name for path in out.rglob(".tmp-*")]
        assert not (out / "checkpoints").exists()
    return hits


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_killed_at_two_random_moments(toy, tmp_path, method):
    expected, seconds = uninterrupted(method, toy, tmp_path)
    assert killed_until(method, toy, tmp_path, expected, seconds, 2, random.Random(f"two {method}")) == 2


@pytest.mark.slow
def test_collect_killed_makes_the_same_pairs(toy, tmp_path):
    """It has no steps: it begins again, and its files are there as a whole or not at all."""
    log = tmp_path / "log"
    argv = [*command("collect", toy, tmp_path / "whole"), "--samples-per-prompt", "40"]
    finish(start(argv, log), log)
    expected = [(tmp_path / "whole" / name).read_bytes() for name in ("rankings.jsonl", "pairs.jsonl")]
    argv[argv.index("--out") + 1] = str(tmp_path / "killed")
    for moment in 0.1, 0.3:
        process = start(argv, log)
        process.join(moment)
        process.kill()
        process.join()
        assert (tmp_path / "killed" / "pairs.jsonl").exists() == Run(tmp_path / "killed").done
    finish(start(argv, log), log)
    assert [(tmp_path / "killed" / name).read_bytes() for name in ("rankings.jsonl", "pairs.jsonl")] == expected


@pytest.mark.slow
def test_the_real_command_killed_in_the_middle_of_ppo(toy, tmp_path):
    """As above, but `python -m temper` itself, and killed when it is known to have saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    log = tmp_path / "log"
    finish(start(command("ppo", toy, tmp_path / "whole"), log), log)
    argv = [sys.executable, "-m", "temper", *command("ppo", toy, tmp_path / "killed", "--save-seconds", "0.05")]
    process = subprocess.Popen(argv, env=environment)
    while not list((tmp_path / "killed").glob("checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert subprocess.run(argv, env=environment, check=False).returncode == 0
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    assert Run(tmp_path / "killed").stage["summary"]["resumed"] == 1


class Dead(BaseException):
    """Stops a run where it stands."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "constitution"])
def test_stopped_right_after_a_checkpoint(toy, tmp_path, monkeypatch, method):
    """Without processes, at known steps: in the middle of a rollout and at its end; in both phases of Constitutional AI."""
    values = values_of(method, toy) | ({"kl_target": 3.0} if method == "ppo" else {})
    train(method, tmp_path / "whole", **values)
    second = [row["step"] for row in Run(tmp_path / "whole").rows("metrics") if row.get("phase") == 2]
    steps = (second[0] - 2, second[0] - 1, second[0] + 1) if second else (3, 4, 17)
    for at in steps:

        def stop(folder, step, *args, at=at, **kwargs):
            save_checkpoint(folder, step, *args, **kwargs)
            if step == at:
                raise Dead

        with monkeypatch.context() as patch:
            patch.setattr("temper.driver.save_checkpoint", stop)
            with pytest.raises(Dead):
                train(method, tmp_path / "killed", save_seconds=1e-9, **values)
    train(method, tmp_path / "killed", **values)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    assert Run(tmp_path / "killed").stage["summary"]["resumed"] == len(steps)
