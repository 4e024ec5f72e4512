"""`temper doctor`: everything that can be known to be wrong before a minute of compute is spent. Floor 8."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from temper.config import Settings, UserError, opt, parse
from temper.methods import NAMES

EXAMPLES = """
  temper doctor recipes/harbour.yaml
  temper doctor sft --model Qwen/Qwen2.5-0.5B --data chats.jsonl --evaluation-sets mt_bench.jsonl
  temper doctor dpo --model runs/sft --data pairs.jsonl --checks contradiction shifted-column
"""


class Look(Settings):
    """What is looked at and how it is shown."""

    evaluation_sets: list[str] = opt([], "files of test questions that no row may hold")
    checks: list[str] = opt([], "only these checks; default: all")
    threads: int = opt(2, "CPU threads", ge=1)
    json_: bool = opt(False, "print the findings as JSON")


class RecipeLook(Settings):
    """Check a recipe's data, models and settings before training; or a stage by its flags: temper doctor METHOD --model ... --data ...

    Exit code 0: no error; 1: errors were found; 2: the command or recipe is wrong.
    """

    recipe: str = opt(..., "the recipe, a YAML file; or a method and its flags", positional=True)
    out: str | None = opt(None, "folder of the run, where stages may stand already; default: runs/ and the recipe's name")
    only: str | None = opt(None, "only this stage")
    look: Look = Look()


def main(argv: list[str]) -> int:
    """Print what the checks find; exit code 1 where there are errors."""
    look, found = _method(argv[0], argv[1:]) if argv and argv[0] in NAMES else _recipe(argv)
    if look.json_:
        print(json.dumps([{"stage": stage, **vars(f)} for stage, each in found.items() for f in each]))
    else:
        _show(found)
    return int(any(f.severity == "error" for each in found.values() for f in each))


def _method(method: str, argv: Sequence[str]) -> tuple[Look, dict[str, list[Any]]]:
    from temper.methods import load

    own = load(method).settings(method)
    whole: Any = pydantic.create_model(own.__name__, __base__=Settings, __doc__=own.__doc__, method=(own, ...), look=(Look, Look()))
    settings: Any = parse(whole, argv, f"temper doctor {method}", EXAMPLES)
    return settings.look, _examined([(method, method, settings.method)], settings.look)


def _recipe(argv: Sequence[str]) -> tuple[Look, dict[str, list[Any]]]:
    settings = parse(RecipeLook, argv, "temper doctor", EXAMPLES)
    if not Path(settings.recipe).suffix and not Path(settings.recipe).exists():
        raise UserError(f"{settings.recipe}: neither a recipe nor a method; methods are {', '.join(NAMES)}")
    from temper.config import build
    from temper.ladder.recipe import read_recipe
    from temper.methods import load

    recipe, stages = read_recipe(settings.recipe, None)
    out = Path(settings.out or f"runs/{recipe.name}")
    if settings.only and settings.only not in (names := [s.name for s in stages]):
        raise UserError(f"--only {settings.only}: no such stage; there are {', '.join(names)}")
    chosen = [s for s in stages if settings.only in (None, s.name)]
    each = [(s.name, s.method, build(load(s.method).settings(s.method), s.resolved(out))) for s in chosen]
    waits = {s.name: [need for need in s.needs if not _made(out / need)] for s in chosen}
    return settings.look, _examined(each, settings.look, waits)


def _made(folder: Path) -> bool:
    from temper.runs import Run

    return Run(folder).done


def _examined(each: Sequence[tuple[str, str, Settings]], look: Look, waits: dict[str, list[str]] | None = None) -> dict[str, list[Any]]:
    """Findings by stage. A stage that waits for others is looked at as far as its files go."""
    from temper.checks import CHECKS, Finding, examine_stage
    from temper.train import machine

    if unknown := [name for name in look.checks if name not in CHECKS]:
        raise UserError(f"--checks {unknown[0]}: no such check; there are {', '.join(CHECKS)}")
    machine.use(look.threads)
    found = {}
    for name, method, settings in each:
        missing = (waits or {}).get(name, [])
        with tempfile.TemporaryDirectory(prefix="temper-doctor-") as folder:
            print(f"{name}: looking", file=sys.stderr)
            found[name] = examine_stage(method, settings, Path(folder) / "stage", look.evaluation_sets, look.checks, waits=missing)
        if missing:
            what = f"waits for {', '.join(missing)}, not made yet: what can be read without is looked at"
            found[name].append(Finding("prepare", "note", what))
    return found


def _show(found: dict[str, list[Any]]) -> None:
    from temper.checks import counted

    for stage, each in found.items():
        print(f"{stage}: {counted(each)}")
        for finding in each:
            for line in finding.lines():
                print(f"  {line}")
