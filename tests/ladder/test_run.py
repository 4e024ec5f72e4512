"""`temper run` on a toy recipe with every method: all of it, again, in part, after a failure, after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from toy import result

from ladder.test_graph import recipe, stages_of
from temper.ladder.run import main
from temper.runs import Run

pytestmark = pytest.mark.slow
LOOK = {"prompts_each": 24, "samples": 2, "max_new": 12, "enumerable": 1}
TIMES = {"seconds", "finished", "peak_mb", "key", "against"}


def ladder(out):
    return json.loads((out / "ladder.json").read_text())


def figures(out):
    """Everything that must be the same for the same seed: weights, metrics, evaluations."""
    found = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        if (folder / "model").is_dir():
            found[folder.name] = result(folder)
        if (folder / "evaluation.json").exists():
            rows = json.loads((folder / "evaluation.json").read_text())
            found[f"evaluate {folder.name}"] = {k: v for k, v in rows.items() if k not in TIMES}
    found["pairs"] = (out / "comparisons" / "pairs.jsonl").read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """(recipe file, folder of the run, exit code)"""
    folder = tmp_path_factory.mktemp("ladder")
    path = recipe(folder / "toy.yaml", stages_of(toy), seed=1, evaluation=LOOK)
    code = main([path, "--out", str(folder / "out"), "--cores", "2"])
    return path, folder / "out", code


def test_all_rungs(whole):
    _, out, code = whole
    assert code == 0
    log = ladder(out)
    stages = ("base", "sft", "comparisons", "reward", "dpo", "ppo", "constitution")
    assert {name: s["status"] for name, s in log["stages"].items()} == dict.fromkeys(stages, "done")
    assert set(log["evaluations"]) == {"base", "sft", "dpo", "ppo", "constitution"}
    assert log["stages"]["ppo"]["parent"] == "sft"
    assert set(log["stages"]["ppo"]["inputs"]) == {"sft", "reward"}
    for name in ("sft", "dpo", "ppo", "constitution"):
        metrics = json.loads((out / name / "evaluation.json").read_text())["metrics"]
        assert {"gold", "answers", "harmful", "over_refusal", "length", "kl", "proxy", "win_rate_vs_sft", "gold_gained"} <= metrics.keys()
        assert all(m["low"] <= m["mean"] <= m["high"] and m["n"] > 0 for m in metrics.values() if m["low"] is not None)
    own = json.loads((out / "sft" / "evaluation.json").read_text())["metrics"]
    assert own["kl"]["mean"] == 0
    assert own["win_rate_vs_sft"]["mean"] == 0.5
    looks = [row["eval"] for row in Run(out / "ppo").rows("metrics") if "eval" in row]
    assert {"gold", "proxy", "kl"} <= looks[-1].keys()
    assert not any((out / name / "checkpoints").exists() for name in stages)


def test_the_report(whole):
    _, out, _ = whole
    assert (out / "report.html").stat().st_size > 10_000
    found = json.loads((out / "report.json").read_text())
    for name in ("base", "sft", "dpo", "ppo", "constitution"):
        assert {"mean", "low", "high", "n"} <= found["stages"][name]["gold"].keys()
    assert found["wall_s"].keys() >= {"base", "sft", "ppo"}
    assert found["elapsed_s"] >= max(found["wall_s"].values())
    assert found["peak_mb"] >= max(run["summary"]["peak_mb"] for run in found["runs"].values()) > 0
    collected = found["runs"]["comparisons"]["summary"]
    assert collected["tokens"] > 0 < collected["tokens_per_second"]


def test_nothing_is_done_again(whole):
    path, out, _ = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out and p.name != ".lock"}
    assert main([path, "--out", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {s["status"] for s in ladder(out)["stages"].values()} == {"skipped"}


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(whole, tmp_path):
    """Also with one core, so in another order."""
    path, out, _ = whole
    assert main([path, "--out", str(tmp_path / "again"), "--cores", "1"]) == 0
    assert figures(tmp_path / "again") == figures(out)
    assert main([path, "--out", str(tmp_path / "other"), "--seed", "2", "--only", "base"]) == 0
    assert result(tmp_path / "other" / "base") != result(out / "base")
    assert sorted(p.name for p in (tmp_path / "other").glob("[!.]*") if p.is_dir()) == ["base"]


def test_a_failing_stage_is_named_and_the_corrected_recipe_goes_on(toy, tmp_path, capsys):
    stages = {name: stages_of(toy)[name] for name in ("base", "sft", "comparisons")}
    stages["sft"]["data"] = str(tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").touch()
    path, out = recipe(tmp_path / "r.yaml", stages), tmp_path / "out"
    assert main([path, "--out", str(out)]) == 2
    assert f"temper: sft: {tmp_path / 'empty.jsonl'}: is empty" in capsys.readouterr().err
    log = ladder(out)["stages"]
    assert (log["base"]["status"], log["sft"]["status"], log["comparisons"]["status"]) == ("done", "failed", "waiting")
    assert not (out / "sft").exists()
    stages["sft"]["data"] = toy.chats
    assert main([recipe(tmp_path / "r.yaml", stages), "--out", str(out)]) == 0
    assert {name: s["status"] for name, s in ladder(out)["stages"].items()} == {"base": "skipped", "sft": "done", "comparisons": "done"}


def _listen():
    """A child of a background job would ignore SIGINT from birth."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def long_stage(toy, tmp_path_factory):
    """(recipe file, what its uninterrupted run gives)"""
    folder = tmp_path_factory.mktemp("long")
    path = recipe(folder / "r.yaml", {"base": stages_of(toy)["base"] | {"epochs": 100}})
    assert main([path, "--out", str(folder / "out")]) == 0
    return path, result(folder / "out" / "base")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_the_same_command_goes_on(long_stage, tmp_path, number):
    """The signal goes to `temper run` alone: its stages stop too, saved or not, and nothing is lost but time."""
    path, expected = long_stage
    out = tmp_path / "out"
    command = [sys.executable, "-m", "temper", "run", path, "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, preexec_fn=_listen)  # noqa: PLW1509
    while len(Run(out / "base").rows("metrics")) < 20 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on" in err
        assert list((out / "base" / "checkpoints").glob("step-*"))
    else:
        assert process.returncode == -signal.SIGKILL
    time.sleep(0.5)  # the stage notices that it is alone
    assert not Run(out / "base").done
    assert main([path, "--out", str(out)]) == 0
    assert result(out / "base") == expected
