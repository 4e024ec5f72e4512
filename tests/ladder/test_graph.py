"""The recipe as a graph: what it may say, what is stale, in which order and beside what it runs."""

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from toy import TINY, values_of

from temper.config import UserError, build, dump, parse
from temper.ladder import graph
from temper.ladder.by_hand import command_of
from temper.ladder.graph import nodes, wanted
from temper.ladder.processes import Node, _child, execute
from temper.ladder.recipe import _flat, read_recipe, resolved
from temper.ladder.run import RunSettings, by_hand, claim, effort, main
from temper.ladder.stage import Place, identity
from temper.methods import load
from temper.runs import Run
from temper.train import ranks


def stages_of(toy):
    """All methods, the toy's files, seconds in all."""
    own = {method: values_of(method, toy) for method in ("pretrain", "sft", "collect", "reward", "dpo", "ppo", "constitution")}
    sizes = {
        "base": "pretrain",
        "sft": "sft",
        "comparisons": "collect",
        "reward": "reward",
        "dpo": "dpo",
        "ppo": "ppo",
        "constitution": "constitution",
    }
    stages = {name: {"method": method, **own[method]} for name, method in sizes.items()}
    for name in ("comparisons", "reward", "dpo", "ppo", "constitution"):
        stages[name]["model"] = "@sft"
    stages["sft"] |= {"model": "@base", "epochs": 4, "lr": 2e-2}
    stages["comparisons"] |= {"prompts": "world:prompts?n=60", "max_new": 16}
    stages["reward"]["data"] = stages["dpo"]["data"] = "@comparisons/pairs.jsonl"
    stages["ppo"]["reward"] = "@reward"
    return stages


def recipe(path: Path, stages, **more) -> str:
    path.write_text(yaml.safe_dump({"name": "toy", "stages": stages, **more}, sort_keys=False))
    return str(path)


SIMPLE = {"base": {"method": "pretrain", "data": "x.txt"}, "sft": {"method": "sft", "model": "@base", "data": "x.jsonl"}}


def changed(**stages):
    return {**SIMPLE, **{name: {**SIMPLE.get(name, {}), **values} for name, values in stages.items()}}


# ---------------------------------------------------------------- what a recipe may say


@pytest.mark.parametrize(
    ("stages", "more", "what"),
    [
        (changed(base={"model": "@sft"}), {}, r"base has no setting 'model'"),
        (changed(sft={"model": "@bass"}), {}, r"sft needs @bass, which is no stage; there are base, sft"),
        (changed(sft={"method": "sfd"}), {}, r"sft: method 'sfd'; there are pretrain, sft, collect"),
        (changed(sft={"method": ["sft"]}), {}, r"sft: method \['sft'\]; there are"),
        ({"sft": {"model": "x"}}, {}, r"sft: method None; there are"),
        (changed(sft={"larning_rate": 1}), {}, r"sft has no setting 'larning_rate'; did you mean 'lr'\?"),
        (changed(sft={"thread": 1}), {}, r"sft has no setting 'thread'; did you mean 'threads'\?"),
        (changed(sft={"budgt": 1}), {}, r"sft has no setting 'budgt'; did you mean 'budget'\?"),
        (changed(sft={"threads": 0}), {}, r"sft: 'threads': got 0, input should be greater than or equal to 1"),
        (changed(sft={"ranks": 0}), {}, r"sft: 'ranks': got 0, input should be greater than or equal to 1"),
        (changed(sft={"rankz": 2}), {}, r"sft has no setting 'rankz'; did you mean 'ranks'\?"),
        (changed(sft={"lr": -1}), {}, r"sft: 'lr': got -1"),
        ({"sft": {"method": "sft", "data": "x"}}, {}, r"sft: 'model' is missing"),
        (changed(**{"a/b": {"method": "pretrain", "data": "x"}}), {}, r"a stage called 'a/b'; its name is its folder"),
        ({"../up": {"method": "pretrain", "data": "x"}}, {}, r"a stage called '../up'"),
        ({}, {}, r"stages: .*at least 1"),
        (SIMPLE, {"stage": {}}, r"stage: Extra inputs"),
        (SIMPLE, {"evaluation": {"prompt_each": 30}}, r"evaluation has no setting 'prompt_each'; did you mean 'prompts_each'\?"),
        (
            {"a": {"method": "sft", "model": "@b", "data": "x"}, "b": {"method": "sft", "model": "@a", "data": "x"}},
            {},
            r"in a cycle: a -> b -> a",
        ),
        ({"a": {"method": "sft", "model": "@a", "data": "x"}}, {}, r"in a cycle: a -> a; take one of the @ away"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_said_in_one_line(tmp_path, stages, more, what):
    path = recipe(tmp_path / "r.yaml", stages, **more)
    with pytest.raises(UserError, match=what) as caught:
        read_recipe(path, None)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_no_recipe(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: no such file"):
        read_recipe(str(tmp_path / "none.yaml"), None)
    (tmp_path / "bad.yaml").write_text("name: x\nstages: [\n")
    with pytest.raises(UserError, match=r"bad.yaml:3"):
        read_recipe(str(tmp_path / "bad.yaml"), None)


def test_stages_come_after_what_they_need_and_share_the_seed(tmp_path, toy):
    stages = stages_of(toy)
    backwards = dict(reversed(stages.items()))
    backwards["reward"] |= {"seed": 7}
    found, ordered = read_recipe(recipe(tmp_path / "r.yaml", backwards, seed=3), None)
    place = {s.name: i for i, s in enumerate(ordered)}
    assert all(place[need] < place[s.name] for s in ordered for need in s.needs)
    assert {s.name: s.values.get("seed") for s in ordered} == {name: 7 if name == "reward" else 3 for name in stages}
    _, other = read_recipe(str(tmp_path / "r.yaml"), 5)
    assert {s.name: s.values.get("seed") for s in other} == {name: 7 if name == "reward" else 5 for name in stages}
    assert found.seed == 3
    assert {s.name: (s.parent, s.needs) for s in ordered if s.name in ("sft", "ppo", "dpo")} == {
        "sft": ("base", ["base"]),
        "ppo": ("sft", ["sft", "reward"]),
        "dpo": ("sft", ["sft", "comparisons"]),
    }


def test_the_embedded_recipe_is_sound():
    path = Path(__file__).parents[2] / "recipes" / "harbour.yaml"
    found, ordered = read_recipe(str(path), None)
    assert [s.name for s in ordered][:2] == ["base", "sft"]
    assert {s.name for s in ordered} == {"base", "sft", "comparisons", "reward", "ppo", "dpo", "constitution"}
    assert all(s.budget for s in ordered)
    assert found.evaluation


# ---------------------------------------------------------------- the graph


def names(found):
    return {n.name: set(n.needs) for n in found}


def test_evaluations_wait_for_what_they_compare_with(tmp_path, toy):
    found, ordered = read_recipe(recipe(tmp_path / "r.yaml", stages_of(toy), evaluation={}), None)
    graph_of = names(nodes(found, ordered, tmp_path, ""))
    assert "evaluate reward" not in graph_of
    assert "evaluate comparisons" not in graph_of
    assert graph_of["evaluate ppo"] == {"ppo", "sft", "reward", "evaluate sft"}
    assert graph_of["evaluate sft"] == {"sft", "base", "reward", "evaluate base"}
    assert graph_of["evaluate base"] == {"base"}
    assert names(nodes(found.model_copy(update={"evaluation": None}), ordered, tmp_path, "")) == {s.name: set(s.needs) for s in ordered}


def test_a_stage_takes_the_threads_of_all_its_ranks(tmp_path):
    found, ordered = read_recipe(recipe(tmp_path / "r.yaml", changed(base={"threads": 3, "ranks": 2}), evaluation={}), None)
    assert [(s.name, s.threads, s.ranks) for s in ordered] == [("base", 3, 2), ("sft", 1, 1)]
    assert all("ranks" not in s.values for s in ordered)  # no setting of the method
    assert {n.name: n.cores for n in nodes(found, ordered, tmp_path, "")} == {"base": 6, "sft": 1, "evaluate base": 1, "evaluate sft": 1}


def test_no_order_of_methods_makes_stages_wait_for_each_other(tmp_path):
    """A reward model trained on the DPO model cannot be a probe while DPO trains; SFT after DPO cannot be DPO's reference."""
    for stages in (
        {
            **SIMPLE,
            "dpo": {"method": "dpo", "model": "@sft", "data": "x"},
            "reward": {"method": "reward", "model": "@dpo", "data": "x"},
            "ppo": {"method": "ppo", "model": "@dpo", "reward": "@reward", "prompts": "x"},
        },
        {
            "base": SIMPLE["base"],
            "dpo": {"method": "dpo", "model": "@base", "data": "x"},
            "sft": {"method": "sft", "model": "@dpo", "data": "x"},
            "reward": {"method": "reward", "model": "@sft", "data": "x"},
        },
    ):
        found, ordered = read_recipe(recipe(tmp_path / "r.yaml", stages, evaluation={}), None)
        left, done = names(nodes(found, ordered, tmp_path, "")), set()
        while left:
            ready = {name for name, needs in left.items() if needs <= done}
            assert ready, left
            done |= ready
            left = {name: needs for name, needs in left.items() if name not in ready}


def test_only_a_stage_with_what_it_needs(tmp_path, toy):
    found, ordered = read_recipe(recipe(tmp_path / "r.yaml", stages_of(toy), evaluation={}), None)
    every = nodes(found, ordered, tmp_path, "")
    assert {n.name for n in wanted(every, "comparisons")} == {"base", "sft", "comparisons"}
    assert {n.name for n in wanted(every, None)} == {n.name for n in every}
    assert "dpo" not in {n.name for n in wanted(every, "ppo")}
    assert "evaluate ppo" in {n.name for n in wanted(every, "ppo")}
    with pytest.raises(UserError, match=r"--only pp0: no such stage; there are base, sft, comparisons"):
        wanted(every, "pp0")


# ---------------------------------------------------------------- what is stale


def statuses(path, out):
    _, ordered = read_recipe(path, None)
    return {s.name: graph.make(s, out, "", None, None)["status"] for s in ordered}


@pytest.mark.slow
def test_nothing_is_made_twice_and_a_change_reaches_its_dependants_only(tmp_path, toy):
    stages, path, out = stages_of(toy), tmp_path / "r.yaml", tmp_path / "out"
    del stages["ppo"], stages["constitution"]
    every = dict.fromkeys(stages, "skipped")
    assert statuses(recipe(path, stages), out) == dict.fromkeys(stages, "done")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert statuses(recipe(path, stages), out) == every
    assert {p: p.stat().st_mtime_ns for p in before} == before
    stages["dpo"]["beta"] = 0.2
    assert statuses(recipe(path, stages), out) == every | {"dpo": "done"}
    stages["comparisons"]["seed"] = 4
    assert statuses(recipe(path, stages), out) == every | dict.fromkeys(("comparisons", "reward", "dpo"), "done")
    stages["sft"]["budget"] = 50  # shown only
    assert statuses(recipe(path, stages), out) == every
    stages["sft"]["lr"] = 1e-2
    assert statuses(recipe(path, stages), out) == every | dict.fromkeys(("sft", "comparisons", "reward", "dpo"), "done")
    # a stage made again with the same content leaves its dependants fresh
    Run.claim(out / "sft", {}, fresh=True).abandon()
    assert statuses(recipe(path, stages), out) == every | {"sft": "done"}


@pytest.mark.slow
def test_a_changed_setting_makes_a_stage_and_those_that_need_it_stale(tmp_path, toy):
    """The short form of the test above."""
    stages, path, out = stages_of(toy), tmp_path / "r.yaml", tmp_path / "out"
    stages = {name: stages[name] | {"epochs": 0.1} for name in ("base", "sft")}
    for name, found in (
        (None, "done done"),
        (None, "skipped skipped"),
        ("sft", "skipped done"),
        ("base", "done done"),
        (None, "skipped skipped"),
    ):
        if name:
            stages[name]["lr"] = 0.1
        assert " ".join(statuses(recipe(path, stages), out).values()) == found


@pytest.mark.slow
def test_other_code_and_unfinished_runs_are_stale(tmp_path, toy, monkeypatch):
    stages, path, out = {"base": stages_of(toy)["base"]}, tmp_path / "r.yaml", tmp_path / "out"
    statuses(recipe(path, stages), out)
    weights = (out / "base" / "model" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("temper.ladder.graph.code_version", lambda *only: "other")
        assert statuses(str(path), out) == {"base": "done"}
    assert statuses(str(path), out) == {"base": "skipped"}
    stage = json.loads((out / "base" / "stage.json").read_text())
    (out / "base" / "stage.json").write_text(json.dumps(stage | {"status": "running"}))
    assert statuses(str(path), out) == {"base": "done"}
    assert (out / "base" / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_stage_of_a_recipe_is_the_command_by_hand(tmp_path, toy):
    """The command that ladder.json shows makes the same run: it finds the stage done, and alone it gives the same bytes."""
    from temper.cli import main

    stages, out = {name: stages_of(toy)[name] for name in ("base", "sft")}, tmp_path / "out"
    stages["sft"] |= {"skip_bad": True, "max_length": None}
    _, ordered = read_recipe(recipe(tmp_path / "r.yaml", stages), 3)
    for s in ordered:
        graph.make(s, out, "", None, None)
        argv = by_hand(s, out).split()[1:]
        assert main([*argv, "--quiet", "--json"]) == 0
        alone = [*argv[: argv.index("--out")], "--out", str(tmp_path / s.name), "--quiet", "--json"]
        assert main(alone) == 0
        assert (tmp_path / s.name / "model" / "model.safetensors").read_bytes() == (
            out / s.name / "model" / "model.safetensors"
        ).read_bytes()
        assert Run(tmp_path / s.name).stage["fingerprint"] == Run(out / s.name).stage["fingerprint"]


def test_the_command_of_a_stage_on_several_ranks_makes_the_same_stage(tmp_path, toy, monkeypatch):
    stages = {"base": stages_of(toy)["base"] | {"ranks": 2, "threads": 3}}
    _, (stage,) = read_recipe(recipe(tmp_path / "r.yaml", stages), None)
    words = shlex.split(by_hand(stage, tmp_path))
    assert words[:6] == ["torchrun", "--nproc-per-node", "2", "-m", "temper", "pretrain"]
    given = parse(command_of("pretrain"), words[6:], "temper pretrain")
    monkeypatch.setattr(ranks, "count", lambda: int(words[2]))
    own = build(load("pretrain").settings("pretrain"), stage.resolved(tmp_path))
    assert given.place.out == str(tmp_path / "base")
    assert identity("pretrain", given.method, given.place) == identity("pretrain", own, Place(out="", threads=3))


# ---------------------------------------------------------------- executing


def note(folder, name, seconds=0.0, status="done", code=0):
    """A node's work: says when it began and ended."""
    began = time.time()
    time.sleep(seconds)
    (Path(folder) / name).write_text(json.dumps([began, time.time()]))
    if status == "user":
        raise UserError("what you gave is wrong")
    if status == "bug":
        raise RuntimeError("a bug")
    if status == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"status": status, "seconds": seconds}


def node(folder, name, *needs, threads=1, **how):
    return Node(name, list(needs), threads, partial(note, str(folder), name, **how))


def play(todo, cores=2):
    told = []
    outcomes = execute(todo, cores, lambda name, event, outcome: told.append((name, event)), lambda: None)
    return outcomes, told


def spans(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.mark.slow
def test_branches_run_side_by_side_within_the_cores(tmp_path):
    todo = [
        node(tmp_path, "a"),
        node(tmp_path, "b", "a", seconds=0.6),
        node(tmp_path, "c", "a", seconds=0.6),
        node(tmp_path, "d", "b", "c", threads=2),
    ]
    outcomes, told = play(todo)
    assert {o.status for o in outcomes.values()} == {"done"}
    t = spans(tmp_path)
    assert t["b"][0] < t["c"][1]
    assert t["c"][0] < t["b"][1]
    assert t["d"][0] >= max(t["b"][1], t["c"][1])
    assert told.index(("d", "started")) > told.index(("c", "done"))
    for path in tmp_path.iterdir():
        path.unlink()
    play(todo, cores=1)
    t = sorted(spans(tmp_path).values())
    assert all(before[1] <= after[0] for before, after in pairwise(t))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "code", "error"), [("user", 2, "what you gave is wrong"), ("bug", 1, "a bug"), ("killed", 1, "exit code -9")]
)
def test_after_a_failure_what_runs_ends_and_nothing_new_begins(tmp_path, status, code, error):
    todo = [
        node(tmp_path, "bad", status=status),
        node(tmp_path, "beside", seconds=0.5),
        node(tmp_path, "after", "beside"),
        node(tmp_path, "below", "bad"),
    ]
    outcomes, _ = play(todo)
    assert outcomes["bad"].status == "failed"
    assert outcomes["bad"].code == code
    assert error in outcomes["bad"].error
    assert outcomes["beside"].status == "done"
    assert set(outcomes) == {"bad", "beside"}


@pytest.mark.slow
def test_stages_end_with_the_run_that_started_them(tmp_path):
    """kill -9 of `temper run`: its stages do not go on in the background, so the same command does not find them writing."""
    script = f"import sys; sys.path[:0] = {sys.path!r}\nfrom ladder.test_graph import *\nplay([node({str(tmp_path)!r}, 'slow', seconds=4)])"
    parent = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__':\n  exec({script!r})"], stdin=subprocess.DEVNULL)
    mine: list[int] = []
    for _ in range(300):
        mine = [pid for pid in _descendants(parent.pid) if b"from multiprocessing.forkserver" in _command(pid)]
        if len(mine) > 1:  # the server and the stage
            break
        time.sleep(0.1)
    assert len(mine) > 1
    parent.kill()
    parent.wait()
    for _ in range(30):
        if not any(_command(pid) for pid in mine):
            break
        time.sleep(0.1)
    assert not any(_command(pid) for pid in mine)
    assert not (tmp_path / "slow").exists()


def _command(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return b"" if state == "Z" else Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _descendants(pid):
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


@pytest.mark.slow
def test_a_stage_on_two_ranks(tmp_path, toy, capfd):
    """The same losses as one rank's, and weights that all ranks hold; the number of ranks belongs to the stage, so another one is stale."""
    stages, path = {"base": stages_of(toy)["base"] | {"epochs": 1}}, tmp_path / "r.yaml"

    def run(ranks, out):
        stages["base"]["ranks"] = ranks
        found, ordered = read_recipe(recipe(path, stages), None)
        outcomes, _ = play(nodes(found, ordered, tmp_path / out, ""))
        return outcomes["base"]

    assert run(2, "two").status == "done"
    assert run(1, "one").status == "done"
    there, alone = (Run(tmp_path / name / "base") for name in ("two", "one"))
    assert there.stage["identity"] == {**alone.stage["identity"], "ranks": 2}
    assert (there.stage["record"]["ranks"], alone.stage["record"]["ranks"]) == (2, 1)
    losses = [[row["loss"] for row in run.rows("metrics") if "loss" in row] for run in (there, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) > 3
    assert run(2, "two").status == "skipped"
    assert run(1, "two").status == "done"
    assert Run(tmp_path / "two" / "base").stage["identity"]["ranks"] == 1
    capfd.readouterr()
    stages["base"]["data"] = str(tmp_path / "none.txt")
    outcome = run(2, "wrong")
    assert (outcome.status, outcome.code, outcome.error) == ("failed", 2, f"{tmp_path / 'none.txt'}: no such file")
    assert "Traceback" not in capfd.readouterr().err  # the follower met the mistake too


def one_fails(how):
    """What a rank does while the other waits for it."""
    if ranks.rank() == 1:
        if how == "bug":
            raise ValueError("a bug of one rank")
        if how == "user":
            raise UserError("what you gave is wrong")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupted" and ranks.rank() == 0:
        raise KeyboardInterrupt
    return {"status": "done", "seconds": float(ranks.led(1.0))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "code", "error"),
    [
        ("", "done", 0, ""),
        ("bug", "failed", 1, "a bug of one rank"),
        ("user", "failed", 2, "what you gave is wrong"),
        ("killed", "failed", 1, "exit code -9"),
        ("interrupted", "interrupted", 130, ""),
    ],
)
def test_the_rank_that_failed_says_why_and_nothing_is_left(tmp_path, monkeypatch, how, status, code, error):
    multiprocessing.util.get_temp_dir()  # is made once and stays until this process ends
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = play([Node("two", [], 1, partial(one_fails, how), ranks=2)])[0]["two"]
    assert (outcome.status, outcome.code) == (status, code)
    assert error in outcome.error
    assert "onnection" not in outcome.error  # that the other rank lost touch is no news
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("raised", "ends"), [(UserError("no such file"), None), (KeyboardInterrupt(), 130), (ValueError("a bug"), None)])
def test_a_follower_tells_and_prints_nothing(monkeypatch, capfd, raised, ends):
    def run():
        raise raised

    monkeypatch.setattr(ranks, "join", lambda *who: None)
    here, there = multiprocessing.Pipe(duplex=False)
    with pytest.raises(SystemExit, match="130") if ends else nullcontext():
        _child(run, there, 1, 2, "meeting")
    assert here.poll() == (ends is None)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- the run's folder


def test_whose_folder_it_is(tmp_path):
    claim(tmp_path / "new", "toy", False, [])
    (tmp_path / "new" / "recipe.yaml").write_text("name: toy\n")
    claim(tmp_path / "new", "toy", False, [])
    with pytest.raises(UserError, match=r"new belongs to another run: recipe toy there, harbour here"):
        claim(tmp_path / "new", "harbour", False, [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"mine holds thesis.tex but no recipe.yaml: not written by temper"):
        claim(tmp_path / "mine", "toy", True, ["sft"])
    with pytest.raises(UserError, match="is a file, not a folder"):
        claim(tmp_path / "mine" / "thesis.tex", "toy", False, [])


def made(out, name, finished, seconds, peak_mb):
    (out / name).mkdir(parents=True)
    (out / name / "stage.json").write_text(json.dumps({"finished": finished, "summary": {"seconds": seconds, "peak_mb": peak_mb}}))


def test_what_a_run_has_cost(tmp_path):
    """Nodes side by side count once in time and together in memory; one made again counts as it was made last."""
    made(tmp_path, "a", 110, 10, 500)
    made(tmp_path, "b", 130, 20, 300)
    made(tmp_path, "c", 125, 5, 400)
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps({"finished": 133, "seconds": 3, "peak_mb": 100}))
    names = ["a", "b", "c", "evaluate b", "evaluate c", "never made"]
    assert effort(tmp_path, names, None) == {"elapsed_s": 33.0, "peak_mb": 700.0}
    assert effort(tmp_path, names, (98.0, 134.0))["elapsed_s"] == 36.0  # with the start of the processes
    (tmp_path / "ladder.json").write_text('{"elapsed_s": 36.0}')
    assert effort(tmp_path, names, None)["elapsed_s"] == 36.0  # nothing was made
    (tmp_path / "c" / "stage.json").unlink()
    (tmp_path / "c").rmdir()
    made(tmp_path, "c", 1010, 8, 900)  # again, much later
    assert effort(tmp_path, names, (1001.0, 1011.0)) == {"elapsed_s": 43.0, "peak_mb": 900.0}


def test_a_missing_input_is_said_before_anything_is_made(tmp_path, toy, capsys):
    from temper.cli import main as command

    stages, out = stages_of(toy), tmp_path / "out"
    for name, key, value, what in (
        ("ppo", "prompts", "nope.jsonl", "nope.jsonl: no such file"),
        ("dpo", "data", str(tmp_path / "none.jsonl"), f"{tmp_path / 'none.jsonl'}: no such file"),
        ("constitution", "principles", "nope.yaml", "nope.yaml: no such file"),
        ("reward", "model", "./nowhere", "./nowhere: no such folder"),
    ):
        wrong = {**stages, name: {**stages[name], key: value}}
        path = recipe(tmp_path / "r.yaml", wrong)
        assert command(["run", path, "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"temper: {path}: {name}: {what}\n"
        assert not out.exists()


def test_the_users_recipe_is_not_written_over(tmp_path, toy):
    path = Path(recipe(tmp_path / "recipe.yaml", {"base": stages_of(toy)["base"]}))
    before = "# mine\n" + path.read_text()
    path.write_text(before)
    with pytest.raises(UserError, match=r"recipe.yaml: the run would write its recipe.yaml, .*; choose another --out"):
        main([str(path), "--out", str(tmp_path)])
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_fresh_clears_the_stages_and_nothing_else(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: toy\n")
    with Run.claim(tmp_path / "sft", {"a": 1}) as run:
        run.log("metrics", {"step": 1})
        run.finish({})
    (tmp_path / "sft" / "evaluation.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    claim(tmp_path, "toy", True, ["sft", "dpo"])
    assert not (tmp_path / "sft").exists()
    assert (tmp_path / "notes.txt").exists()


def test_the_resolved_recipe_writes_every_default_out(tmp_path, toy):
    stages = stages_of(toy)
    stages["ppo"]["ranks"] = 2
    found, ordered = read_recipe(recipe(tmp_path / "r.yaml", stages, evaluation={"prompts_each": 30}), 4)
    (tmp_path / "recipe.yaml").write_text(resolved(found, ordered))
    again, same = read_recipe(str(tmp_path / "recipe.yaml"), None)
    assert again.seed == 4
    assert again.evaluation == {"prompts_each": 30}
    for a, b in zip(ordered, same, strict=True):
        assert (a.name, a.method, a.threads, a.ranks, a.budget, a.needs) == (b.name, b.method, b.threads, b.ranks, b.budget, b.needs)
        assert _flat(a) == _flat(b) == b.values
    assert "beta2" in same[0].values
    assert dump(RunSettings())["recipe"] == "recipes/harbour.yaml"
    assert TINY["vocab"] == same[0].values["vocab"]


def test_the_recipes_of_temper_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _ = read_recipe("recipes/harbour.yaml", None)
    assert found.name == "harbour"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "harbour.yaml").write_text("name: mine\nstages: {a: {method: pretrain, data: x.txt}}\n")
    assert read_recipe("recipes/harbour.yaml", None)[0].name == "mine"  # the folder's own comes first
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        read_recipe("recipes/nowhere.yaml", None)
