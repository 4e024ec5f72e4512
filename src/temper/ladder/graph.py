"""A recipe of stages as an artefact graph: what is stale, and what must be there before what. Floor 7.

A stage is stale when its settings, the content of its inputs, the thread count or Temper's code changed since it was made.
"""

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper.config import Settings, UserError, build, dump
from temper.driver import peak_mb
from temper.ladder.processes import Node
from temper.ladder.recipe import Recipe, Stage
from temper.ladder.stage import Context, Place, code_of, identity, input_fingerprint, run_stage
from temper.methods import load
from temper.runs import Run, atomic_write, code_version, fingerprint
from temper.train import machine, ranks

NO_POLICY = ("collect", "reward")  # methods whose stages cannot be asked anything


def stale(stage: Stage, settings: Settings, place: Place) -> str | None:
    """Why a stage must be made again, None when it need not: 'new', 'unfinished', or what changed. Its inputs must be there."""
    run = Run(place.out)
    there = run.stage
    if not there:
        return "new"
    if there.get("identity") != json.loads(json.dumps(identity(stage.method, settings, place))):
        return "its settings or inputs changed"
    if there.get("code") != code_version(*code_of(stage.method)):
        return "the code changed"
    if run.done and not (run.folder / there.get("artefact", "model")).exists():
        return "its artefact is gone"
    return None if run.done else "unfinished"


def make(stage: Stage, out: Path, command: str, probe: Mapping[str, str] | None, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Run one stage of a recipe if it is stale. Returns {"status", "seconds"}."""
    settings = build(load(stage.method).settings(stage.method), stage.resolved(out))
    sets = list(stage.evaluation_sets)
    place = Place(out=str(out / stage.name), threads=stage.threads, quiet=True, doctor=stage.doctor, evaluation_sets=sets)
    why = ranks.led(stale(stage, settings, place) if ranks.rank() == 0 else None)
    if why is None:
        return {"status": "skipped", "seconds": Run(place.out).stage["summary"]["seconds"]}
    place = place.model_copy(update={"fresh": why not in ("new", "unfinished")})
    summary = run_stage(stage.method, settings, place, Context(parent=stage.parent, command=command, probe=probe, evaluation=evaluation))
    return {"status": "done", "seconds": summary.get("seconds", 0.0)}


def evaluate(name: str, out: Path, against: dict[str, str], how: dict[str, Any], threads: int) -> dict[str, Any]:
    """Evaluate one stage into its evaluation.json, unless the one there is of the same models, settings and code."""
    from temper.evals.harbour import Evaluation, measure

    settings = build(Evaluation, how)
    machine.use(threads)
    began = time.monotonic()
    folder = out / name
    stages = {role: out / other for role, other in against.items()}
    models = {role: input_fingerprint("model", str(path)) for role, path in {"own": folder, **stages}.items()}
    key = fingerprint([models, dump(settings), threads, code_version("temper.evals.harbour")])
    target = folder / "evaluation.json"
    if target.exists() and json.loads(target.read_bytes()).get("key") == key:
        return {"status": "skipped", "seconds": json.loads(target.read_bytes())["seconds"]}
    found = measure(folder, stages=stages, how=settings)
    seconds = round(time.monotonic() - began, 3)
    made = {"key": key, "seconds": seconds, "finished": time.time(), "peak_mb": round(peak_mb(), 1)}
    atomic_write(target, json.dumps({**made, "settings": dump(settings), "against": against, **found}, indent=1) + "\n")
    return {"status": "done", "seconds": seconds}


def nodes(recipe: Recipe, stages: list[Stage], out: Path, command: str) -> list[Node]:
    """Stages and, where the recipe asks for it, the evaluations of those that can be asked."""
    found: list[Node] = []
    by = {s.name: s for s in stages}
    looked = recipe.evaluation is not None
    reward = next((s.name for s in stages if s.method == "reward"), None)
    sft = next((s.name for s in stages if s.method == "sft"), None)
    before_sft, before_reward = _upstream(by, sft), _upstream(by, reward)  # what these need cannot wait for them
    for s in stages:
        needs, probe = list(s.needs), None
        if looked and s.method not in (*NO_POLICY, "pretrain"):  # a base model answers nothing before its training ends, nor after
            probe = {}
            if s.method not in ("pretrain", "sft") and sft and s.name not in before_sft:
                probe["reference"] = str(out / sft)
                needs.append(sft)
                if reward and s.name not in before_reward and s.method != "constitution":  # it need not wait for the reward model
                    probe["reward"] = str(out / reward)
                    needs.append(reward)
        run = functools.partial(make, s, out, command, probe, recipe.evaluation)
        found.append(Node(s.name, list(dict.fromkeys(needs)), s.threads, run, s.budget, s.ranks))
    for s in stages if looked else []:
        if s.method in NO_POLICY:
            continue
        against = {"parent": s.parent} if s.parent and by[s.parent].method not in NO_POLICY else {}
        if sft and s.method != "pretrain" and s.name not in before_sft:
            against["sft"] = sft
            if reward:
                against["reward"] = reward
        needs = [s.name, *against.values(), *(f"evaluate {a}" for role, a in against.items() if role != "reward" and a != s.name)]
        how = {"eval_seed": recipe.seed, **(recipe.evaluation or {})}
        found.append(Node(f"evaluate {s.name}", list(dict.fromkeys(needs)), 1, functools.partial(evaluate, s.name, out, against, how, 1)))
    return found


def _upstream(by: Mapping[str, Stage], name: str | None) -> set[str]:
    """The stages that `name` needs, directly or not."""
    needs = by[name].needs if name else []
    return {*needs, *(above for need in needs for above in _upstream(by, need))}


def wanted(all_nodes: list[Node], only: str | None) -> list[Node]:
    """All nodes; or the stage `only` with its evaluation and everything they need. Raises UserError for a stage that is not there."""
    if only is None:
        return all_nodes
    by = {n.name: n for n in all_nodes}
    if only not in by:
        raise UserError(f"--only {only}: no such stage; there are {', '.join(n for n in by if not n.startswith('evaluate '))}")
    keep: set[str] = set()
    todo = [only, *([f"evaluate {only}"] if f"evaluate {only}" in by else [])]
    while todo:
        name = todo.pop()
        if name not in keep:
            keep.add(name)
            todo += by[name].needs
    return [n for n in all_nodes if n.name in keep]
