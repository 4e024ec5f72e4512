"""A recipe of stages as an artefact graph: runs what is stale, skips what is not, independent branches side by side. Floor 7.

A setting that begins with @ names another stage (`@sft`, `@comparisons/pairs.jsonl`): that is an edge. A stage is stale when its
settings, the content of its inputs, the thread count or Temper's code changed since it was made. Every stage and every evaluation
runs in a process of its own; what runs side by side is decided by their threads and the machine's cores and never changes a figure.
"""

import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pydantic
import yaml

from temper.config import Settings, UserError, build, dump, leaves, load_yaml, opt
from temper.ladder.stage import Context, Place, code_of, identity, input_fingerprint, run_stage
from temper.methods import NAMES, load
from temper.runs import Run, atomic_write, code_version, fingerprint
from temper.train import machine, ranks

NO_POLICY = ("collect", "reward")  # methods whose stages cannot be asked anything


class RunSettings(Settings):
    """Run a recipe of stages: everything that is stale, and nothing else."""

    recipe: str = opt("recipes/harbour.yaml", "the recipe, a YAML file", positional=True)
    out: str | None = opt(None, "folder of the run; default: runs/ and the recipe's name")
    only: str | None = opt(None, "run this stage and whatever stale stages it needs, no other")
    fresh: bool = opt(False, "start over: remove what temper wrote in --out")
    seed: int | None = opt(None, "instead of the recipe's seed", ge=0)
    cores: int | None = opt(None, "cores to use; default: all of them", ge=1)
    json_: bool = opt(False, "print report.json's figures at the end, nothing else")


class Recipe(pydantic.BaseModel):
    """A recipe file: a name, a seed, the stages with their method, budget and settings, and how the policies are evaluated."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str
    seed: int = 0
    evaluation: dict[str, Any] | None = None
    stages: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)


class Entry(Settings):
    """What a stage of a recipe says beside its method's own settings."""

    method: str = opt(..., "how it is made")
    threads: int = opt(1, "CPU threads", ge=1)
    ranks: int = opt(1, "processes that train it together, each with its threads", ge=1)
    budget: float | None = opt(None, "seconds it may take; shown, not enforced", gt=0)


@dataclass
class Node:
    """A stage, or the evaluation of one."""

    name: str
    needs: list[str]
    threads: int
    run: Callable[[], Any] = field(repr=False, default=lambda: None)
    budget: float | None = None
    ranks: int = 1

    @property
    def cores(self) -> int:
        return self.threads * self.ranks


@dataclass
class Stage:
    """One entry of a recipe: its method, its settings as written (with @), its budget in seconds."""

    name: str
    method: str
    values: dict[str, Any]
    threads: int
    ranks: int
    budget: float | None

    @property
    def needs(self) -> list[str]:
        """The stages that its settings name, in the order of the settings."""
        named = [v[1:].split("/")[0] for v in self.values.values() if isinstance(v, str) and v.startswith("@")]
        return list(dict.fromkeys(named))

    @property
    def parent(self) -> str | None:
        """The stage whose model this one starts from."""
        model = self.values.get("model", "")
        return model[1:].split("/")[0] if model.startswith("@") else None

    def resolved(self, out: Path) -> dict[str, Any]:
        """The settings with every @ turned into a path."""
        return {k: str(out / v[1:]) if isinstance(v, str) and v.startswith("@") else v for k, v in self.values.items()}


def read_recipe(path: str, seed: int | None) -> tuple[Recipe, list[Stage]]:
    """The recipe and its stages in an order in which each comes after what it needs.

    Raises UserError: no such file, an unknown method or setting, a stage that is not there, a cycle.
    """
    raw = load_yaml(path)
    try:
        recipe = Recipe.model_validate(raw)
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    if recipe.evaluation is not None:
        from temper.evals.harbour import Evaluation

        build(Evaluation, recipe.evaluation, where=f"{path}: evaluation")
    stages = [_stage(path, name, dict(values), recipe.seed) for name, values in recipe.stages.items()]
    known = [s.name for s in stages]
    for stage in stages:
        for need in stage.needs:
            if need not in known:
                raise UserError(f"{path}: {stage.name} needs @{need}, which is no stage; there are {', '.join(known)}")
    return recipe, _ordered(path, stages)


def _stage(path: str, name: str, values: dict[str, Any], seed: int) -> Stage:
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UserError(f"{path}: a stage called {name!r}; its name is its folder: give letters, digits, - and _")
    method = values.get("method")
    if not isinstance(method, str) or method not in NAMES:
        raise UserError(f"{path}: {name}: method {method!r}; there are {', '.join(NAMES)}")
    kind = load(method).settings(method)
    if "seed" in leaves(kind):
        values.setdefault("seed", seed)
    whole: Any = pydantic.create_model(kind.__name__, __base__=Settings, own=(kind, ...), entry=(Entry, ...))
    entry = build(whole, values, where=f"{path}: {name}").entry
    return Stage(name, method, {k: v for k, v in values.items() if k not in Entry.model_fields}, entry.threads, entry.ranks, entry.budget)


def _ordered(path: str, stages: list[Stage]) -> list[Stage]:
    done: list[Stage] = []
    left = list(stages)
    while left:
        ready = [s for s in left if all(n in {d.name for d in done} for n in s.needs)]
        if not ready:
            around = " -> ".join([*(s.name for s in left), left[0].name])
            raise UserError(f"{path}: the stages need each other in a cycle: {around}; take one of the @ away")
        done += ready
        left = [s for s in left if s not in ready]
    return done


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
    place = Place(out=str(out / stage.name), threads=stage.threads, quiet=True)
    why = ranks.led(stale(stage, settings, place) if ranks.rank() == 0 else None)
    if why is None:
        return {"status": "skipped", "seconds": Run(place.out).stage["summary"]["seconds"]}
    place = place.model_copy(update={"fresh": why not in ("new", "unfinished")})
    summary = run_stage(stage.method, settings, place, Context(parent=stage.parent, command=command, probe=probe, evaluation=evaluation))
    return {"status": "done", "seconds": summary.get("seconds", 0.0)}


def evaluate(name: str, out: Path, against: dict[str, str], how: dict[str, Any], threads: int) -> dict[str, Any]:
    """Evaluate one stage into its evaluation.json, unless the one there is of the same models, settings and code."""
    from temper.evals.harbour import Evaluation, measure

    machine.use(threads)
    began = time.monotonic()
    folder = out / name
    stages = {role: out / other for role, other in against.items()}
    models = {role: input_fingerprint(str(path)) for role, path in {"own": folder, **stages}.items()}
    key = fingerprint([models, how, threads, code_version("temper.evals.harbour")])
    target = folder / "evaluation.json"
    if target.exists() and json.loads(target.read_bytes()).get("key") == key:
        return {"status": "skipped", "seconds": json.loads(target.read_bytes())["seconds"]}
    found = measure(folder, stages=stages, how=build(Evaluation, how))
    seconds = round(time.monotonic() - began, 3)
    atomic_write(target, json.dumps({"key": key, "seconds": seconds, "settings": how, "against": against, **found}, indent=1) + "\n")
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
        if looked and s.method not in NO_POLICY:
            probe = {}
            if s.method not in ("pretrain", "sft") and sft and s.name not in before_sft:
                probe["reference"] = str(out / sft)
                needs.append(sft)
                if reward and s.name not in before_reward and s.method != "constitution":  # it need not wait for the reward model
                    probe["reward"] = str(out / reward)
                    needs.append(reward)
        run = _later(make, s, out, command, probe, recipe.evaluation)
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
        found.append(Node(f"evaluate {s.name}", list(dict.fromkeys(needs)), 1, _later(evaluate, s.name, out, against, how, 1)))
    return found


def _upstream(by: Mapping[str, Stage], name: str | None) -> set[str]:
    """The stages that `name` needs, directly or not."""
    needs = by[name].needs if name else []
    return {*needs, *(above for need in needs for above in _upstream(by, need))}


def _later(function: Callable, *args: Any) -> Callable[[], Any]:
    import functools

    return functools.partial(function, *args)


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


@dataclass
class Outcome:
    """How a node ended."""

    status: str  # done, skipped, failed, interrupted
    seconds: float = 0.0
    error: str = ""
    code: int = 0  # exit code that the whole run ends with


def execute(todo: list[Node], cores: int, tell: Callable[[str, str, Outcome | None], None], tick: Callable[[], None]) -> dict[str, Outcome]:
    """Run nodes as their needs are met and cores are free; after a failure nothing new is started. tell(name, event, outcome)."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["temper.ladder.worker"])  # torch and transformers are imported once
    outcomes: dict[str, Outcome] = {}
    running: dict[str, tuple[Node, Any, Connection]] = {}
    followers: dict[str, list[Any]] = {}  # the ranks beside a node's first process
    left = list(todo)
    names = {n.name for n in todo}
    try:
        while left or running:
            healthy = all(o.status in ("done", "skipped") for o in outcomes.values())
            busy = sum(n.cores for n, _, _ in running.values())
            ready = [n for n in left if all(d not in names or d in outcomes for d in n.needs)] if healthy else []
            for node in ready:
                if running and busy + node.cores > cores:
                    break  # in order: a stage with many threads is not starved by later small ones
                here, there = processes.Pipe(duplex=False)
                meeting = tempfile.mkdtemp(prefix="temper-") if node.ranks > 1 else None
                members = [(rank, node.ranks, f"file://{meeting}/ranks") for rank in range(node.ranks)] if meeting else [None]
                group = [processes.Process(target=_child, args=(node.run, there, member), name=node.name) for member in members]
                running[node.name], followers[node.name] = (node, group[0], here), group[1:]
                for process in group:
                    process.start()
                there.close()
                left.remove(node)
                busy += node.cores
                tell(node.name, "started", None)
            if not running:
                if healthy and left:
                    raise RuntimeError(f"nothing can run: {', '.join(n.name for n in left)} wait for each other")
                break
            multiprocessing.connection.wait([c for _, _, c in running.values()], timeout=0.25)
            tick()
            for name, (_, process, here) in list(running.items()):
                if here.poll() or not process.is_alive():
                    outcomes[name] = _ended(process, here)
                    _end(followers[name], 10.0 if outcomes[name].status == "done" else 0.0)
                    del running[name]
                    tell(name, outcomes[name].status, outcomes[name])
    except KeyboardInterrupt:  # the children got the signal too: they save and end
        for _, process, _ in running.values():
            process.terminate()  # again for those that got it; the only word to them where this process alone was signalled
        for name, (_, process, _) in running.items():
            process.join()
            _end(followers[name], 0.0)
            outcomes[name] = Outcome("interrupted", code=130)
            tell(name, "interrupted", outcomes[name])
    finally:
        _end([process for name, (_, process, _) in running.items() for process in (process, *followers[name])], 0.0)
    return outcomes


def _end(processes: Sequence[Any], patience: float) -> None:
    """Wait so long, together, for processes to end; then end them."""
    until = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _ended(process: Any, here: Connection) -> Outcome:
    try:
        result = here.recv() if here.poll() else None
    except EOFError:
        result = None
    process.join()
    if result is None:
        if process.exitcode == 130:
            return Outcome("interrupted", code=130)
        return Outcome("failed", error=f"its process ended with exit code {process.exitcode}; out of memory?", code=1)
    return Outcome(**result)


def _end_with_parent() -> None:
    """A stage does not go on in the background when `temper run` was killed: the same command would find it writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _child(run: Callable[[], dict[str, Any]], there: Connection, member: tuple[int, int, str] | None) -> None:
    import traceback

    threading.Thread(target=_end_with_parent, daemon=True).start()
    if member:
        ranks.join(*member)
    if ranks.rank():
        there.close()
        try:
            run()
        except RuntimeError as e:
            if "clos" not in str(e) and "reset" not in str(e):  # the leader ended; it says why
                raise
        return
    try:
        there.send(run())
    except UserError as e:
        there.send({"status": "failed", "error": str(e), "code": e.code})
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        there.send({"status": "failed", "error": traceback.format_exc(), "code": 1})


def write_resolved(recipe: Recipe, stages: list[Stage], out: Path) -> None:
    """recipe.yaml in the run: every default written out."""
    full = {s.name: {"method": s.method, "threads": s.threads, "ranks": s.ranks, "budget": s.budget, **_flat(s)} for s in stages}
    text = yaml.safe_dump(
        {"name": recipe.name, "seed": recipe.seed, "evaluation": recipe.evaluation, "stages": full}, sort_keys=False, width=120
    )
    atomic_write(out / "recipe.yaml", text)


def _flat(stage: Stage) -> dict[str, Any]:
    return dump(build(load(stage.method).settings(stage.method), stage.values))
