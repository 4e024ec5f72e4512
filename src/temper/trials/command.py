"""`temper bench NAME`: the trials of an experiment, then its table. Floor 8.

A trial that is done is skipped, one that was interrupted goes on, as in a recipe: the same command resumes. One that a check stopped
(a loss that is no number, no answer that ends) is a result, and the others go on.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from temper.config import Settings, UserError, dump, opt, parse
from temper.ladder.graph import make
from temper.ladder.processes import Node, Outcome, execute
from temper.ladder.run import Board, claim
from temper.ladder.stage import absent, input_fingerprint
from temper.runs import Run, atomic_write, code_version, fingerprint
from temper.train import machine
from temper.trials.figures import gathered, stopped, table
from temper.trials.measures import MEASURES, Subject
from temper.trials.plan import Experiment, Trial, evaluated_as, read_experiment, trials

EXAMPLES = """
  temper bench methods                                all methods from one run's stages, three seeds, and docs' table
  temper bench methods --only dpo kto --seeds 1 --no-vary
  temper bench arithmetic --run runs/harbour --docs docs/methods.md
  temper bench mine.yaml --out runs/mine
"""


class BenchSettings(Settings):
    """Train the arms of an experiment on several seeds and lay them side by side: equal start, data and compute.

    There are methods (every method), stages (what each stage is needed for), arithmetic (verifiable rewards), process (process against
    outcome reward models), adapters (LoRA against full fine-tuning); or give a file of your own.
    """

    name: str = opt(..., "the experiment: a name, or a YAML file", positional=True)
    run: str = opt("runs/harbour", "the run whose stages the arms start from")
    out: str | None = opt(None, "folder of the trials; default: runs/bench/NAME")
    seeds: int = opt(3, "trainings of each arm", ge=1)
    only: list[str] = opt([], "these arms and what they need, no others")
    vary: bool = opt(True, "also train with settings halved, doubled, ..., on one seed, as the file says")
    cores: int | None = opt(None, "cores to use, a trial each; default: all of them", ge=1)
    docs: str | None = opt(None, "file whose section between <!-- NAME --> and <!-- /NAME --> becomes the table")
    table: bool = opt(False, "train nothing: the table of what is there")
    json_: bool = opt(False, "print the results as JSON, nothing else")


class Plan(NamedTuple):
    """What a command line asks for."""

    settings: BenchSettings
    path: str
    experiment: Experiment
    run: Path
    out: Path
    every: list[Trial]
    wanted: list[Trial]


def read(argv: list[str]) -> Plan:
    """Nothing is made or written. Raises UserError for wrong flags, a wrong file, a run without the stages that the arms start from."""
    s = parse(BenchSettings, argv, "temper bench", EXAMPLES)
    path, plan = read_experiment(s.name)
    run, out = Path(s.run), Path(s.out or f"runs/bench/{plan.name}")
    for arm in s.only:
        if arm not in plan.arms:
            raise UserError(f"--only {arm}: no such arm; there are {', '.join(plan.arms)}")
    every = trials(path, plan, run, out, range(s.seeds), s.vary)
    evaluated_as(run)
    for t in every:
        if t.stage and (problem := absent(t.stage.values)):
            raise UserError(f"{path}: {t.arm}: {problem}")
    if s.docs:
        section(Path(s.docs), plan.name, "")
    return Plan(s, path, plan, run, out, every, wanted(every, s.only))


def wanted(every: Sequence[Trial], only: Sequence[str]) -> list[Trial]:
    """The trials of these arms with those that they need; all where none is named."""
    by = {t.name: t for t in every}
    keep = {t.name for t in every if not only or t.arm in only}
    todo = list(keep)
    while todo:
        stage = by[todo.pop()].stage
        for need in stage.needs if stage else ():
            if need not in keep:
                keep.add(need)
                todo.append(need)
    return [t for t in every if t.name in keep]


def attempt(trial: Trial, run: Path, out: Path, command: str) -> dict[str, Any]:
    """Train a trial where it is stale, and measure it where it was not. Returns {"status", "seconds"}."""
    told = stopped(trial, out)
    done = {"status": "skipped", "seconds": 0.0}
    if trial.stage:
        try:
            done = make(trial.stage, out, command, None, None)
        except UserError as error:
            if error.code != 1:
                raise
            atomic_write(told, json.dumps({"why": str(error)}) + "\n")
            return {"status": "done", "seconds": 0.0}
        told.unlink(missing_ok=True)
    return done if not measured(trial, run, out) else {**done, "status": "done"}


def measured(trial: Trial, run: Path, out: Path) -> bool:
    """Writes evaluation.json, unless the one there is of the same content, settings and code; whether it did."""
    machine.use(1)
    began, how, target = time.monotonic(), evaluated_as(run), out / trial.name / "evaluation.json"
    what = trial.folder / "model" if (trial.folder / "model").is_dir() else trial.folder / Run(trial.folder).stage.get("artefact", "model")
    content = input_fingerprint("model", str(trial.folder)) if what.is_dir() else fingerprint(what)
    start = [input_fingerprint("model", str(run / name)) for name in ("sft", "reward") if (run / name).exists()]
    key = fingerprint([trial.measure, content, start, dump(how), trial.seed, code_version("temper.trials.measures")])
    if target.exists() and json.loads(target.read_bytes()).get("key") == key:
        return False
    found = MEASURES[trial.measure](Subject(trial.folder, run, how, trial.seed))
    target.parent.mkdir(parents=True, exist_ok=True)
    spent = {"key": key, "seconds": round(time.monotonic() - began, 3), "finished": time.time(), "settings": dump(how)}
    atomic_write(target, json.dumps({**spent, "measure": trial.measure, **found}, indent=1) + "\n")
    return True


def section(path: Path, name: str, text: str) -> str:
    """The file with the text between its marks of that name. Raises UserError where they are not there."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        whole = path.read_text("utf-8")
        head, rest = whole.split(first)
        tail = rest.split(last)[1]
    except (OSError, ValueError, IndexError):
        raise UserError(f"{path}: no place for the table; write {first} and {last} where it belongs, each once") from None
    return f"{head}{first}\n{text}{last}{tail}"


def main(argv: list[str]) -> int:
    """Exit code 0 done, 1 a trial failed, 2 the input was wrong, 130 interrupted."""
    s, _, plan, run, out, every, todo = read(argv)
    command = shlex.join(["temper", "bench", *argv])
    code = 0
    if not s.table:
        claim(out, plan.name, False, [])
        atomic_write(out / "recipe.yaml", _written(plan, run, every))
        code = _train(s, todo, run, out, command)
    results = {"command": command, "run": str(run), **gathered(plan, every, out)}
    text = table(results)
    if out.is_dir():
        atomic_write(out / "bench.json", json.dumps(results, indent=1) + "\n")
        atomic_write(out / "bench.md", text)
    if s.docs and not code:
        atomic_write(Path(s.docs), section(Path(s.docs), plan.name, text))
    print(json.dumps(results, indent=1) if s.json_ else text, end="\n" if s.json_ else "")
    return code


def _train(s: BenchSettings, todo: Sequence[Trial], run: Path, out: Path, command: str) -> int:
    names = {t.name for t in todo}
    nodes = [
        Node(
            t.name,
            [n for n in t.stage.needs if n in names] if t.stage else [],
            t.stage.threads if t.stage else 1,
            functools.partial(attempt, t, run, out, command),
        )
        for t in todo
    ]
    cores = s.cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    worst = Outcome("skipped")

    def tell(name: str, event: str, outcome: Outcome | None) -> None:
        nonlocal worst
        board.tell(name, event, outcome)
        worst = max((worst, outcome or worst), key=lambda o: o.code)

    with Board(nodes, out, s.json_) as board:
        found = execute(nodes, cores, tell, board.tick)
    for name, outcome in found.items():
        if outcome.error:
            print(f"temper: {name}: {outcome.error}", file=sys.stderr)
    if worst.code == 130:
        print(f"stopped and saved; the same command goes on: {command}", file=sys.stderr)
    return worst.code


def _written(plan: Experiment, run: Path, every: Sequence[Trial]) -> str:
    """The trials as a recipe: what each was trained with."""
    import yaml

    stages = {t.name: {"method": t.stage.method, **t.stage.values} for t in every if t.stage}
    return yaml.safe_dump({"name": plan.name, "run": str(run), "stages": stages}, sort_keys=False, width=120)
