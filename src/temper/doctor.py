"""`temper doctor`: everything that can be known to be wrong before a minute of compute is spent. Floor 8."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from temper.config import Settings, UserError, build, dump, opt, parse
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


class Stage(NamedTuple):
    """What is looked at. waits: stages that it reads and that are not made yet."""

    name: str
    method: str
    settings: Settings
    waits: Sequence[str] = ()
    ranks: int = 1
    sets: Sequence[str] = ()  # of the recipe


def read(argv: list[str]) -> tuple[Look, list[Stage]]:
    """What a command line asks for. Raises UserError for wrong flags or recipes, unknown checks, and inputs that are not there."""
    look, stages = _method(argv[0], argv[1:]) if argv and argv[0] in NAMES else _recipe(argv)
    from temper.checks import CHECKS
    from temper.ladder.stage import absent

    if unknown := [name for name in look.checks if name not in CHECKS]:
        raise UserError(f"--checks {unknown[0]}: no such check; there are {', '.join(CHECKS)}")
    for stage in stages:
        if not stage.waits and (problem := absent(dump(stage.settings))):
            raise UserError(f"{stage.name}: {problem}")
    return look, stages


def _method(method: str, argv: Sequence[str]) -> tuple[Look, list[Stage]]:
    from temper.methods import load

    own = load(method).settings(method)
    whole: Any = pydantic.create_model(own.__name__, __base__=Settings, __doc__=own.__doc__, method=(own, ...), look=(Look, Look()))
    settings: Any = parse(whole, argv, f"temper doctor {method}", EXAMPLES)
    return settings.look, [Stage(method, method, settings.method)]


def _recipe(argv: Sequence[str]) -> tuple[Look, list[Stage]]:
    settings = parse(RecipeLook, argv, "temper doctor", EXAMPLES)
    if not Path(settings.recipe).suffix and not Path(settings.recipe).exists():
        raise UserError(f"{settings.recipe}: neither a recipe nor a method; methods are {', '.join(NAMES)}")
    from temper.ladder.recipe import read_recipe
    from temper.methods import load
    from temper.runs import Run

    recipe, stages = read_recipe(settings.recipe, None)
    out = Path(settings.out or f"runs/{recipe.name}")
    if settings.only and settings.only not in (names := [s.name for s in stages]):
        raise UserError(f"--only {settings.only}: no such stage; there are {', '.join(names)}")
    return settings.look, [
        Stage(
            s.name,
            s.method,
            build(load(s.method).settings(s.method), s.resolved(out)),
            [need for need in s.needs if not Run(out / need).done],
            s.ranks,
            s.evaluation_sets,
        )
        for s in stages
        if settings.only in (None, s.name)
    ]


def main(argv: list[str]) -> int:
    """Print what the checks find; exit code 1 where there are errors."""
    from temper.train import machine

    look, stages = read(argv)
    machine.use(look.threads)
    found = {stage.name: _examined(stage, look) for stage in stages}
    if look.json_:
        print(json.dumps([{"stage": stage, **vars(f)} for stage, each in found.items() for f in each]))
    else:
        _show(found)
    return int(any(f.severity == "error" for each in found.values() for f in each))


def _examined(stage: Stage, look: Look) -> list[Any]:
    """Findings of a stage. One that waits for others is looked at as far as its files go."""
    from temper.checks import Finding, examine_stage

    print(f"{stage.name}: looking", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="temper-doctor-") as folder:
        own, sets = Path(folder) / "stage", [*look.evaluation_sets, *stage.sets]
        found = examine_stage(stage.method, stage.settings, own, sets, look.checks, stage.waits, stage.ranks)
    if stage.waits:
        what = f"waits for {', '.join(stage.waits)}, not made yet: what can be read without is looked at"
        found.append(Finding("prepare", "note", what))
    return found


def _show(found: dict[str, list[Any]]) -> None:
    from temper.checks import counted

    for stage, each in found.items():
        print(f"{stage}: {counted(each)}")
        for finding in each:
            for line in finding.lines():
                print(f"  {line}")
