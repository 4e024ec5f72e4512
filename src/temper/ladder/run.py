"""`temper run`: executes a recipe, shows where it stands, says what happened. Floor 7."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from temper.config import Settings, UserError, load_yaml, opt, parse
from temper.ladder.graph import nodes, wanted
from temper.ladder.processes import Node, Outcome, execute
from temper.ladder.recipe import read_recipe, write_resolved
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
        for column, justify in (
            ("stage", "left"),
            ("", "left"),
            ("progress", "left"),
            ("time", "right"),
            ("budget", "right"),
            ("left", "right"),
        ):
            table.add_column(column, justify=justify)  # type: ignore[arg-type]
        for node in self.todo:
            event, outcome = self.state.get(node.name, ("waiting", None))
            progress, left = self.progress(node) if event == "started" else ("", "")
            seconds = outcome.seconds if outcome else time.monotonic() - self.began[node.name] if event == "started" else None
            style = {"waiting": "dim", "started": "bold", "failed": "red", "interrupted": "yellow"}.get(event, "")
            shown = {"started": "running", "skipped": "up to date"}.get(event, event)
            table.add_row(escape(node.name), shown, progress, clock(seconds), clock(node.budget), left, style=style)
        return table


def main(argv: list[str]) -> int:
    """Run a recipe; exit code 0 done, 1 a stage failed, 2 the input was wrong, 130 interrupted."""
    began = time.monotonic()
    settings = parse(RunSettings, argv, "temper run", EXAMPLES)
    recipe, stages = read_recipe(settings.recipe, settings.seed)
    out = Path(settings.out or f"runs/{recipe.name}")
    cores = settings.cores or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else settings.cores or os.cpu_count() or 1
    command = shlex.join(
        ["temper", "run", settings.recipe, "--out", str(out), *(["--seed", str(settings.seed)] if settings.seed is not None else [])]
    )
    todo = wanted(nodes(recipe, stages, out, command), settings.only)
    claim(out, recipe.name, settings.fresh, [s.name for s in stages])
    write_resolved(recipe, stages, out)
    with Board(todo, out, settings.json_) as board:
        outcomes = execute(todo, cores, board.tell, board.tick)
    log = {
        "name": recipe.name,
        "seed": recipe.seed,
        "cores": cores,
        "elapsed_s": elapsed(out, outcomes, time.monotonic() - began),
        "command": command,
        "stages": {s.name: _line(s, out, outcomes.get(s.name)) for s in stages},
        "evaluations": {
            n.name.split(" ", 1)[1]: outcomes[n.name].seconds for n in todo if n.name.startswith("evaluate ") and n.name in outcomes
        },
    }
    atomic_write(out / "ladder.json", json.dumps(log, indent=1) + "\n")
    worst = max((o for o in outcomes.values()), key=lambda o: o.code, default=Outcome("skipped"))
    for name, outcome in outcomes.items():
        if outcome.error:
            print(f"{name}: {outcome.error}", file=sys.stderr)
    if worst.code == 130:
        print(f"stopped and saved; the same command goes on: {command}", file=sys.stderr)
    if not any(o.status in ("done", "skipped") for o in outcomes.values()):
        return worst.code
    report = subprocess.run([sys.executable, "-m", "temper", "report", str(out), *(["--json"] if settings.json_ else [])], check=False)
    return worst.code or report.returncode


def elapsed(out: Path, outcomes: dict[str, Outcome], seconds: float) -> float:
    """Seconds of the whole run: of a run that goes on, those of its earlier parts too; of one that had nothing to do, those of before."""
    there = out / "ladder.json"
    before = json.loads(there.read_bytes())["elapsed_s"] if there.exists() else 0.0
    skipped = [o.status == "skipped" for o in outcomes.values()]
    return round(before if before and all(skipped) else before + seconds if any(skipped) else seconds, 1)


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


def _line(stage, out: Path, outcome: Outcome | None) -> dict[str, Any]:
    run = Run(out / stage.name).stage
    return {
        "method": stage.method,
        "status": outcome.status if outcome else "done" if run.get("status") == "done" else "waiting",
        "seconds": run.get("summary", {}).get("seconds"),
        "budget_s": stage.budget,
        "threads": stage.threads,
        "parent": stage.parent,
        "inputs": stage.needs,
        "command": by_hand(stage, out),
    }


def by_hand(stage, out: Path) -> str:
    """The command that makes this stage alone."""
    words = ["temper", stage.method]
    for key, value in stage.resolved(out).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{key.replace('_', '-')}")
        else:
            each = value if isinstance(value, list) else ["none" if value is None else value]
            words += [f"--{key.replace('_', '-')}", *map(str, each)]
    return shlex.join([*words, "--threads", str(stage.threads), "--out", str(out / stage.name)])
