"""`temper sft`, `temper dpo` and the other methods as commands of their own. Floor 7."""

import json
import shlex
from typing import Any

import pydantic

from temper.config import Settings, UserError, dump, opt, parse
from temper.ladder.stage import Context, Place, absent, run_stage
from temper.methods import examples, load
from temper.runs import Run
from temper.train import ranks


class Output(Settings):
    """What is printed at the end."""

    json_: bool = opt(False, "print the summary as JSON")


def command_of(method: str) -> type[Settings]:
    """The settings of a command: the method's own, where it writes, what it prints."""
    own = load(method).settings(method)
    return pydantic.create_model(
        own.__name__, __base__=Settings, __doc__=own.__doc__, method=(own, ...), place=(Place, ...), output=(Output, Output())
    )


def read(argv: list[str]) -> Any:
    """The settings of the method that argv begins with. Raises UserError for wrong ones, and for inputs that are not there."""
    method, *flags = argv
    settings: Any = parse(command_of(method), flags, f"temper {method}", examples(method))
    if problem := absent(dump(settings.method)):
        raise UserError(problem)
    return settings


def main(argv: list[str]) -> int:
    """Train one stage on the user's model and data; exit code 0."""
    method, settings = argv[0], read(argv)
    ranks.join_torchrun()
    summary = run_stage(method, settings.method, settings.place, Context(command=shlex.join(["temper", *argv])))
    if ranks.rank():
        return 0
    run = Run(settings.place.out)
    if settings.output.json_:
        print(json.dumps({"out": settings.place.out, "card": run.stage["card"], "summary": summary}))
        return 0
    for line in story(method, run, summary):
        print(line)
    return 0


def story(method: str, run: Run, summary: dict[str, Any]) -> list[str]:
    """What happened and what to do next, a line each."""
    what = load(method).METRICS
    lines = [
        f"{method}: {summary['steps']} steps, {summary.get('tokens', 0):,} tokens, {summary['seconds']:.0f} s"
        if summary["steps"]
        else method
    ]
    told = ("doctor",)  # at the start
    card = {name: value for name, value in run.stage["card"].items() if value not in (None, "", []) and name not in told}
    lines += [f"  {name}: {value}" for name, value in card.items() if not _table(value)]
    for name, value in {**summary.get("last", {}), **summary}.items():
        if name in what and isinstance(value, (int, float)):
            lines.append(f"  {name} {value:.4g}  ({what[name]})")
    if (run.folder / "model").is_dir():
        after = {"reward": f"; next: temper ppo --reward {run.folder} ...", "process-reward": ""}
        lines.append(f"model in {run.model}{after.get(method, f'; next: temper chat {run.folder}')}")
    else:
        lines.append(f"written: {run.folder / run.stage['artefact']}")
    return lines


def _table(value: Any) -> bool:
    """Whether it is figures for programs rather than a line to read."""
    return isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))
