"""`temper run`: executes a recipe, shows where it stands, says what happened. Floor 7."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from temper.config import Settings, UserError, load_yaml, opt, parse
from temper.ladder.graph import nodes, wanted
from temper.ladder.processes import Node, Outcome, execute
from temper.ladder.recipe import Recipe, Stage, located, read_recipe, resolved
from temper.ladder.stage import absent
from temper.runs import Run, atomic_write

EXAMPLES = """
  temper run                                      the embedded ladder: recipes/harbour.yaml into runs/harbour
  temper run recipes/harbour.yaml --seed 1 --out runs/harbour-1
  temper run --only ppo                           only PPO and what it needs
"""
LINES = 30.0  # seconds between two lines where there is no terminal


class RunSettings(Settings):
    """Run a recipe of stages: everything that is stale, and nothing else."""

    recipe: str = opt("recipes/harbour.yaml", "the recipe, a YAML file", positional=True)
    out: str | None = opt(None, "folder of the run; default: runs/ and the recipe's name")
    only: str | None = opt(None, "run this stage and whatever stale stages it needs, no other")
    fresh: bool = opt(False, "start over: remove what temper wrote in --out")
    seed: int | None = opt(None, "instead of the recipe's seed", ge=0)
    cores: int | None = opt(None, "cores to use; default: all of them", ge=1)
    json_: bool = opt(False, "print report.json's figures at the end, nothing else")


def clock(seconds: float | None) -> str:
    """Minutes and seconds, m:ss."""
    return "" if seconds is None else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


class Board:
    """Where every node stands: a live table on a terminal, a line per event elsewhere."""

    def __init__(self, todo: list[Node], out: Path, quiet: bool) -> None:
        self.todo, self.out, self.quiet = todo, out, quiet
        self.console = Console(stderr=True)
        self.state: dict[str, Any] = {}
        self.began: dict[str, float] = {}
        self.told = time.monotonic()
        self.live = Live(self.table(), console=self.console, refresh_per_second=4) if self.console.is_terminal and not quiet else None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(self.table())
            self.live.stop()

    def tell(self, name: str, event: str, outcome: Outcome | None) -> None:
        if event == "started":
            self.began[name] = time.monotonic()
        self.state[name] = (event, outcome)
        if not self.live and not self.quiet and event not in ("started", "skipped"):
            budget = next((n.budget for n in self.todo if n.name == name), None)
            within = f" of {clock(budget)}" if budget else ""
            self.console.print(escape(f"{name}: {event} {clock(outcome.seconds if outcome else None)}{within}"), highlight=False)

    def tick(self) -> None:
        if self.live:
            self.live.update(self.table())
        elif not self.quiet and time.monotonic() - self.told >= LINES:
            self.told = time.monotonic()
            going = [(n.name, *self.progress(n)) for n in self.todo if self.state.get(n.name, ("",))[0] == "started"]
            lines = [f"{name}: {doing or 'at work'}{f', {left} left' if left else ''}" for name, doing, left in going]
            self.console.print(escape("   ".join(lines)), highlight=False)

    def progress(self, node: Node) -> tuple[str, str]:
        """(steps done, time left) of a node that runs."""
        status = Run(self.out / node.name).status if not node.name.startswith("evaluate ") else {}
        if status.get("updated", 0) < time.time() - (time.monotonic() - self.began[node.name]):
            return "", ""
        steps = f"{status.get('step', 0)}/{status['steps']}" if status.get("steps") else ""
        return f"{status.get('phase', '')} {steps}", clock(status.get("eta"))

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("stage", "", "progress"):
            table.add_column(column)
        for column in ("time", "budget", "left"):
            table.add_column(column, justify="right")
        for node in self.todo:
            event, outcome = self.state.get(node.name, ("waiting", None))
            progress, left = self.progress(node) if event == "started" else ("", "")
            seconds = outcome.seconds if outcome else time.monotonic() - self.began[node.name] if event == "started" else None
            style = {"waiting": "dim", "started": "bold", "failed": "red", "interrupted": "yellow"}.get(event, "")
            shown = {"started": "running", "skipped": "up to date"}.get(event, event)
            table.add_row(escape(node.name), shown, progress, clock(seconds), clock(node.budget), left, style=style)
        return table


class Plan(NamedTuple):
    """What a command line asks for: `todo` are those of `every` node that --only leaves."""

    settings: RunSettings
    recipe: Recipe
    stages: list[Stage]
    out: Path
    command: str
    every: list[Node]
    todo: list[Node]


def read(argv: list[str]) -> Plan:
    """Nothing is made or written. Raises UserError for wrong flags, a wrong recipe, inputs that are not there, a file in the way."""
    settings = parse(RunSettings, argv, "temper run", EXAMPLES)
    recipe, stages = read_recipe(settings.recipe, settings.seed)
    out = Path(settings.out or f"runs/{recipe.name}")
    command = shlex.join(
        ["temper", "run", settings.recipe, "--out", str(out), *(["--seed", str(settings.seed)] if settings.seed is not None else [])]
    )
    every = nodes(recipe, stages, out, command)
    todo = wanted(every, settings.only)
    for stage in stages:
        if stage.name in {n.name for n in todo} and (problem := absent(stage.values)):
            raise UserError(f"{settings.recipe}: {stage.name}: {problem}")
    spare(located(settings.recipe), out / "recipe.yaml", resolved(recipe, stages))
    return Plan(settings, recipe, stages, out, command, every, todo)


def main(argv: list[str]) -> int:
    """Run a recipe; exit code 0 done, 1 a stage failed, 2 the input was wrong, 130 interrupted."""
    began = time.time()
    settings, recipe, stages, out, command, every, todo = read(argv)
    cores = settings.cores or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else settings.cores or os.cpu_count() or 1
    claim(out, recipe.name, settings.fresh, [s.name for s in stages])
    atomic_write(out / "recipe.yaml", resolved(recipe, stages))
    outcomes: dict[str, Outcome] = {}

    def told(name: str, event: str, outcome: Outcome | None) -> None:
        """Whatever ends this run, ladder.json says what had ended before."""
        board.tell(name, event, outcome)
        if outcome:
            outcomes[name] = outcome
            made = any(o.status != "skipped" for o in outcomes.values())
            log = {
                "name": recipe.name,
                "seed": recipe.seed,
                "cores": cores,
                **effort(out, [n.name for n in every], (began, time.time()) if made else None),
                "command": command,
                "stages": {s.name: _line(s, out, outcomes.get(s.name)) for s in stages},
                "evaluations": {n.removeprefix("evaluate "): o.seconds for n, o in outcomes.items() if n.startswith("evaluate ")},
            }
            atomic_write(out / "ladder.json", json.dumps(log, indent=1) + "\n")

    with Board(todo, out, settings.json_) as board:
        execute(todo, cores, told, board.tick)
    worst = max((o for o in outcomes.values()), key=lambda o: o.code, default=Outcome("skipped"))
    for name, outcome in outcomes.items():
        if outcome.error:
            print(f"temper: {name}: {outcome.error}", file=sys.stderr)
    if worst.code == 130:
        print(f"stopped and saved; the same command goes on: {command}", file=sys.stderr)
    if not any(o.status in ("done", "skipped") for o in outcomes.values()):
        return worst.code
    report = subprocess.run([sys.executable, "-m", "temper", "report", str(out), *(["--json"] if settings.json_ else [])], check=False)
    return worst.code or report.returncode


def effort(out: Path, names: Sequence[str], now: tuple[float, float] | None) -> dict[str, float]:
    """What the run has cost: {"elapsed_s", "peak_mb"}, each node counted as it was last made.

    elapsed_s: seconds in which any of the nodes was at work, with those of this command (`now`, from and to; None: it made nothing).
    A node that was interrupted or killed is taken to have worked without a break.
    peak_mb: the most that nodes at work at one moment had in memory, each counted at its largest: an upper bound.
    """
    made = []
    for name in names:
        evaluated = name.removeprefix("evaluate ")
        found = _json(out / evaluated / "evaluation.json") if evaluated != name else Run(out / name).stage
        took = found if evaluated != name else found.get("summary", {})
        if "finished" in found and "seconds" in took:
            made.append((found["finished"] - took["seconds"], found["finished"], took.get("peak_mb") or 0.0))
    peak = max((sum(mb for start, end, mb in made if start <= at < end) for at, _, _ in made), default=0.0)
    total, until = 0.0, 0.0
    for start, end in sorted([(start, end) for start, end, _ in made] + ([now] if now else [])):
        total, until = total + max(0.0, end - max(start, until)), max(until, end)
    before = _json(out / "ladder.json").get("elapsed_s")
    return {"elapsed_s": round(total, 1) if now or before is None else before, "peak_mb": round(peak, 1)}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def spare(given: Path, target: Path, text: str) -> None:
    """Raises UserError where the run's recipe.yaml would replace the user's own file by another text."""
    if target.exists() and given.resolve() == target.resolve() and given.read_text() != text:
        raise UserError(f"{given}: the run would write its recipe.yaml, with every default, over this file; choose another --out")


def claim(out: Path, name: str, fresh: bool, stages: list[str]) -> None:
    """The run's folder: new, or of a run of the same recipe. Raises UserError when it holds something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another --out")
    marker = out / "recipe.yaml"
    foreign = sorted(p.name for p in out.iterdir() if not p.name.startswith(".tmp-")) if out.is_dir() else []
    if foreign and not marker.exists():
        raise UserError(f"{out} holds {foreign[0]} but no recipe.yaml: not written by temper; choose another --out")
    if marker.exists() and (found := load_yaml(marker).get("name")) != name:
        raise UserError(f"{out} belongs to another run: recipe {found} there, {name} here; choose another --out")
    if fresh:
        for stage in stages:
            run = Run(out / stage)
            if run.stage:
                Run.claim(run.folder, {}, fresh=True).abandon()
    out.mkdir(parents=True, exist_ok=True)


def _line(stage: Stage, out: Path, outcome: Outcome | None) -> dict[str, Any]:
    run = Run(out / stage.name).stage
    return {
        "method": stage.method,
        "status": outcome.status if outcome else run.get("status", "waiting"),
        "seconds": run.get("summary", {}).get("seconds"),
        "budget_s": stage.budget,
        "threads": stage.threads,
        "parent": stage.parent,
        "inputs": stage.needs,
        "command": by_hand(stage, out),
    }


def by_hand(stage: Stage, out: Path) -> str:
    """The command that makes this stage alone."""
    launch = ["torchrun", "--nproc-per-node", str(stage.ranks), "-m"] if stage.ranks > 1 else []
    words = [*launch, "temper", stage.method]
    for key, value in stage.resolved(out).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{key.replace('_', '-')}")
        else:
            each = value if isinstance(value, list) else ["none" if value is None else value]
            words += [f"--{key.replace('_', '-')}", *map(str, each)]
    words += ["--doctor", stage.doctor] if stage.doctor != "refuse" else []
    words += ["--evaluation-sets", *stage.evaluation_sets] if stage.evaluation_sets else []
    return shlex.join([*words, "--threads", str(stage.threads), "--out", str(out / stage.name)])
