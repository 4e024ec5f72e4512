"""`temper data clean RECIPE`, and a step as a command of its own: rows in, rows out, and every removed row with its reason. Floor 2.

Beside OUT.jsonl stand OUT.removed.jsonl (a line per removed row: at, step, why, the row itself), OUT.flagged.jsonl where rows were
flagged, and OUT.report.json. All of them appear as a whole, or none does. Rows are written as they stood, in their order.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from temper.config import Settings, UserError, build, dump, load_yaml, opt, parse
from temper.data.quality import steps
from temper.data.quality.rows import Report, Rows, Verdict, best, named, prompt
from temper.records import atomic

SHOWN = 3  # removed rows of each step that the terminal shows
EXAMPLES = """
  temper data clean recipes/clean.yaml
  temper data clean recipes/clean.yaml --out elsewhere.jsonl --json
"""


class Output(Settings):
    """Where the rows go and what is printed."""

    out: str | None = opt(None, "the rows that stay, a .jsonl file; what was removed stands beside it; none: only look")
    skip_bad: bool = opt(False, "remove rows that cannot be used instead of stopping at the first")
    json_: bool = opt(False, "print the report as JSON")


class Recipe(Settings):
    """Data, and the steps that clean it, in order."""

    data: dict[str, str] | list[str] = opt(..., "files, folders or world:NAME; as `name: file` where steps speak of them by name")
    steps: list[dict[str, Any] | str] = opt(..., "each a name, or `name: {its settings}`")
    out: str | None = opt(None, "the rows that stay, a .jsonl file; none: only look")
    skip_bad: bool = opt(False, "remove rows that cannot be used instead of stopping at the first")

    @pydantic.field_validator("steps")
    @classmethod
    def _some(cls, value: list) -> list:
        if not value:
            raise ValueError("name at least one step")
        return value


class Planned(NamedTuple):
    """A step and its settings."""

    name: str
    options: Settings


class Result(NamedTuple):
    """What became of the rows: a report of each step, the verdict and step of each removed row, the flags by row."""

    rows: Rows
    reports: list[Report]
    removed: dict[int, tuple[str, Verdict]]
    flagged: dict[int, list[tuple[str, Verdict]]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "data": self.rows.data,
            "rows_in": len(self.rows.alive),
            "rows_out": len(self.rows),
            "removed": len(self.removed),
            "flagged": len(self.flagged),
            "steps": [dataclasses.asdict(report) for report in self.reports],
        }


def plan(recipe: Mapping[str, Any], where: str) -> tuple[Recipe, list[Planned]]:
    """The steps of a recipe with their settings, all of it checked before a row is read. Raises UserError naming the step."""
    settings = build(Recipe, dict(recipe), where)
    planned = []
    for k, entry in enumerate(settings.steps, 1):
        (name, values), *more = entry.items() if isinstance(entry, dict) and entry else [(entry, {})]
        at = f"{where}: step {k}"
        if more or not isinstance(name, str) or name not in steps():
            raise UserError(f"{at}: got {entry!r}, should be one of {', '.join(steps())}, as `- dedup` or `- dedup: {{near: 0.8}}`")
        planned.append(Planned(name, build(steps()[name].Options, values or {}, f"{at}, {name}")))
    return settings, planned


def clean(rows: Rows, planned: Sequence[Planned]) -> Result:
    """Take each step's verdicts on the rows that the steps before it left."""
    removed = {index: ("read", verdict) for index, verdict in rows.bad.items()}
    flagged: dict[int, list[tuple[str, Verdict]]] = {}
    reports: list[Report] = []
    for name, options in planned:
        report = Report(name, dump(options), rows_in=len(rows))
        verdicts = steps()[name].run(options, rows, report)
        for index, verdict in verdicts.items():
            report.reasons[verdict.reason] = report.reasons.get(verdict.reason, 0) + 1
            if verdict.flag:
                flagged.setdefault(index, []).append((name, verdict))
            else:
                removed[index] = name, verdict
                rows.alive[index] = False
        report.flagged = sum(v.flag for v in verdicts.values())
        report.removed = len(verdicts) - report.flagged
        report.rows_out = len(rows)
        if report.rows_out != report.rows_in - report.removed:
            raise RuntimeError(f"{name}: {report.rows_in} rows in, {report.rows_out} out, {report.removed} removed: one was removed twice")
        reports.append(report)
    return Result(rows, reports, removed, flagged)


def _line(value: Any) -> bytes:
    """A row with its fields in the order in which they stood."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair
        return json.dumps(value).encode() + b"\n"


def beside(out: Path, what: str) -> Path:
    """OUT.jsonl -> OUT.what"""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{what}")


def write(result: Result, out: Path) -> list[Path]:
    """Write the rows, the removed ones, the flags and the report; returns the files. Raises RuntimeError where the rows do not add up."""
    counts: Counter[str] = Counter()
    paths = [out, beside(out, "removed.jsonl"), beside(out, "report.json")] + [beside(out, "flagged.jsonl")] * bool(result.flagged)
    with ExitStack() as stack:
        kept, gone, report, *flags = (stack.enter_context(atomic(path)) for path in paths)
        for index, (source, at, row) in enumerate(result.rows.raw()):
            if index in result.removed:
                step, verdict = result.removed[index]
                more = {"of": verdict.of, "like": verdict.like, "score": verdict.score}
                told = {"at": at, "data": source, "step": step, "why": verdict.why}
                gone.write(_line({**told, **{k: v for k, v in more.items() if v not in ("", None)}, "row": row.value}))
                counts["removed"] += 1
                continue
            kept.write(_line(row.value))
            counts["kept"] += 1
            for step, verdict in result.flagged.get(index, ()):
                flags[0].write(_line({"at": at, "line": counts["kept"], "step": step, "why": verdict.why}))
        if counts["kept"] != len(result.rows) or counts["removed"] != len(result.removed):
            raise RuntimeError(f"{counts} rows written of {len(result.rows)} and {len(result.removed)} removed: did a file change?")
        report.write(json.dumps(result.to_dict(), indent=1).encode() + b"\n")
    if not result.flagged:
        beside(out, "flagged.jsonl").unlink(missing_ok=True)  # of an older cleaning
    return paths


# ---------------------------------------------------------------- what people see


def _excerpt(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def story(result: Result) -> list[str]:
    """What each step did, with its first removed rows beside what they are like."""
    lines: list[str] = []
    if result.rows.bad:
        lines.append(f"read: {len(result.rows.bad)} unusable rows of {len(result.rows.alive)} removed")
    show: dict[int, int] = {}  # row -> its place in lines
    for report in result.reports:
        lines.append(f"{report.step}: {report.rows_in} rows -> {report.rows_out}")
        lines += [f"  {n} {reason}" for reason, n in sorted(report.reasons.items(), key=lambda entry: -entry[1])]
        if len(report.sources) > 1:
            width = max(map(len, report.sources))
            lines += [f"  {name:<{width}}  " + ", ".join(f"{k} {v}" for k, v in of.items()) for name, of in report.sources.items()]
        lines += [f"  {note}" for note in report.notes]
        for index in sorted(i for i, (step, _) in result.removed.items() if step == report.step)[:SHOWN]:
            show[index] = len(lines)
            lines.append("")
    last = max(show, default=-1)
    removed = Rows.__new__(Rows)
    removed.data, removed.alive = result.rows.data, bytearray(i in show for i in range(len(result.rows.alive)))
    for item in removed if show else ():
        verdict = result.removed[item.id][1]
        said = [_excerpt(" | ".join([*prompt(item.record)[-1:], best(item.record)]))] + [_excerpt(verdict.like)] * bool(verdict.like)
        lines[show[item.id]] = "\n".join([f"    {item.at}: {verdict.why}", *(f"      {line}" for line in said)])
        if item.id == last:
            break
    return lines


def _done(result: Result, out: str | None, as_json: bool) -> int:
    files = write(result, Path(out)) if out else []
    if as_json:
        print(json.dumps({**result.to_dict(), "files": [str(path) for path in files]}))
        return 0
    print("\n".join(story(result)))
    total = f"{len(result.rows.alive)} rows in, {len(result.rows)} out, {len(result.removed)} removed"
    print(f"{total}; {', '.join(map(str, files)) if files else 'nothing written (give --out FILE.jsonl)'}")
    return 0


def _check_out(out: str | None, data: Mapping[str, str]) -> None:
    """Before any work: OUT is a .jsonl file and overwrites no input."""
    if out is None:
        return
    path = Path(out)
    if path.suffix != ".jsonl":
        raise UserError(f"--out {out}: rows are written as JSON lines; give a file that ends in .jsonl")
    if path.is_dir():
        raise UserError(f"--out {out}: is a folder; give a file")
    for spec in data.values():
        given = Path(spec).resolve()
        if path.resolve() == given or (given.is_dir() and path.resolve().parent == given):
            raise UserError(f"--out {out}: would stand among the data it is made from ({spec}); give another folder")


def command(name: str, argv: list[str]) -> int:
    """A step as a command of its own."""
    module = steps()[name]

    class Input(Settings):
        """What is read."""

        data: list[str] = opt(..., "files, folders or world:NAME, as NAME=FILE where they need a name", positional=True)

    cls: Any = pydantic.create_model(
        "Command",
        __base__=Settings,
        __doc__=module.Options.__doc__,
        input=(Input, ...),
        step=(module.Options, ...),
        output=(Output, Output()),
    )
    settings: Any = parse(cls, argv, f"temper data {name}", module.EXAMPLES)
    data = named(settings.input.data)
    _check_out(settings.output.out, data)
    result = clean(Rows(data, settings.output.skip_bad), [Planned(name, settings.step)])
    return _done(result, settings.output.out, settings.output.json_)


class Clean(Settings):
    """Clean data by a recipe: a YAML file with `data`, `steps` and `out`."""

    recipe: str = opt(..., "the recipe, a YAML file", positional=True)
    out: str | None = opt(None, "instead of the recipe's `out`")
    json_: bool = opt(False, "print the report as JSON")


def main(argv: list[str]) -> int:
    """`temper data clean`."""
    settings = parse(Clean, argv, "temper data clean", EXAMPLES)
    recipe, planned = plan(load_yaml(settings.recipe), settings.recipe)
    data = recipe.data if isinstance(recipe.data, dict) else named(recipe.data)
    out = settings.out or recipe.out
    _check_out(out, data)
    return _done(clean(Rows(data, recipe.skip_bad), planned), out, settings.json_)
