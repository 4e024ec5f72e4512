"""`temper report DIR`: report.html and report.json of a run. Floor 7."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from temper.config import Settings, opt, parse
from temper.report.gather import Ladder, gather, machine, number
from temper.report.page import page
from temper.report.terminal import summary
from temper.report.words import expectations, paragraph, remarks
from temper.runs import atomic_write

EXAMPLES = """
  temper report runs/harbour
  temper report runs/harbour --json
"""


class Report(Settings):
    """Write report.html and report.json of a run, from whatever stages it holds."""

    dir: str = opt(..., "the run: a folder of stages, or one stage", positional=True)
    json_: bool = opt(False, "print report.json instead of the summary")


def figures(run: Ladder, where: dict[str, Any]) -> dict[str, Any]:
    """What report.json holds: `stages.<stage>.<metric>.{mean,low,high,n}`, `wall_s.<stage>`, `elapsed_s`, and where all of it comes from.

    An end of an interval that is not known is null; a metric that a stage lacks is absent.
    """
    points = [{"stage": s.name, **p} for s in run.policies for p in s.frontier]
    return {
        "recipe": run.name,
        "seed": run.seed,
        "elapsed_s": run.elapsed,
        "peak_mb": run.peak_mb,
        "cores": run.cores,
        "command": run.command,
        "paragraph": " ".join(paragraph(run)),
        "remarks": remarks(run),
        "stages": {s.name: s.metrics for s in run.stages},
        "wall_s": {s.name: s.seconds for s in run.stages if s.seconds is not None},
        "budget_s": {s.name: s.budget for s in run.stages if s.budget is not None},
        "evaluation_s": {s.name: s.evaluation_seconds for s in run.stages if s.evaluation_seconds is not None},
        "expectations": [e._asdict() for e in expectations(run)],
        "frontier": {
            "points": points,
            "checked": len(points),
            "above": sum((number(p.get("above")) or 0) > 1e-6 for p in points),
        },
        "runs": {
            s.name: {
                "method": s.method,
                "status": s.status,
                "parent": s.parent,
                "inputs": s.inputs,
                "seed": s.seed,
                "threads": s.threads,
                "command": s.command,
                "settings": s.settings,
                "versions": s.versions,
                "code": s.code,
                "card": s.card,
                "summary": s.summary,
            }
            for s in run.stages
        },
        "missing": run.missing,
        "machine": where,
    }


def build(folder: str | Path) -> dict[str, Any]:
    """Write report.json and report.html into the run's folder, each as a whole; returns what report.json holds.

    Raises UserError where there is no run, or no room on the disk.
    """
    run, where = gather(folder), machine()
    found = figures(run, where)
    text = json.dumps(found, indent=1, ensure_ascii=True, allow_nan=False)
    atomic_write(run.folder / "report.json", text + "\n")
    atomic_write(run.folder / "report.html", page(run, where))
    return found


def read(argv: list[str]) -> Report:
    """What is asked for. Raises UserError for wrong flags, and for a folder that is no run."""
    s = parse(Report, argv, "temper report", EXAMPLES)
    gather(s.dir)
    return s


def main(argv: list[str]) -> int:
    s = read(argv)
    found = build(s.dir)
    if s.json_:
        print(json.dumps(found, indent=1))
    else:
        summary(s.dir)
    return 0
