"""From a stage to its findings. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from temper.checks import machine
from temper.checks.registry import CHECKS, Case, Finding, findings, run_checks
from temper.config import Settings, UserError, build, dump
from temper.data.sources import Kind, read
from temper.data.store import parts
from temper.methods import NAMES, load
from temper.methods.base import Prepared
from temper.runs import Run
from temper.train import ranks

KINDS: dict[str, Kind] = {  # what `data` holds, by the method's file; comparisons for the others
    "pretrain": "text",
    "sft": "chat",
    "unpaired": "rated",
    "process_reward": "steps",
}
INPUTS: dict[str, Kind] = {"prompts": "prompts", "red_team": "prompts", "helpful": "prompts", "helpful_pairs": "pairs"}
SAMPLES = ("collect", "constitution")  # methods whose preparation samples from the model: their rows are looked at, not what they make


def foresee(method: str, values: Mapping[str, Any], count: int) -> list[Finding]:
    """What can be known to be wrong before the model is loaded: that it does not fit. Raises UserError where there is no model."""
    return findings(CHECKS["memory"], machine.foresee(method, values, count))


def examine(method: str, values: Mapping[str, Any], prepared: Prepared, steps: int, sets: Sequence[str] = ()) -> list[Finding]:
    """What the quick checks find right before training, on what the method prepared."""
    return run_checks(_case(method, values, prepared, steps, sets, ranks.count(), thorough=False))


def _case(method: str, values: Mapping[str, Any], p: Prepared, steps: int, sets: Sequence[str], count: int, *, thorough: bool) -> Case:
    if thorough and p.whole:
        p = replace(p, corpus=p.whole, whole=None)
    return Case(method, values, p.corpus.read.spec, p.corpus.records, p.corpus.read.skipped, p, steps, thorough, sets, count)


def examine_stage(
    method: str,
    settings: Settings,
    folder: Path,
    sets: Sequence[str],
    names: Sequence[str] = (),
    waits: Sequence[str] = (),
    count: int = 1,
) -> list[Finding]:
    """What all checks find in a stage's data, model and settings; with nothing written but into `folder`.

    Rows that cannot be used are left out and found, where training would stop at the first. Where the model is not there or cannot
    be prepared, the rows are looked at by themselves. waits: stages that are to be made first; what they make is left out. count: ranks
    that are to train.
    """
    values = dump(settings)
    lenient = {**values, **{name: how for name, how in (("skip_bad", True), ("too_long", _lenient(values))) if name in values}}
    problem: list[Finding] = []
    if not waits:
        try:
            problem = foresee(method, values, count)
            if method not in SAMPLES and not problem:
                job = load(method).prepare(build(type(settings), lenient), Run(folder))
                assert job.prepared is not None
                return run_checks(_case(method, values, job.prepared, job.total, sets, count, thorough=True), names)
        except UserError as error:
            why = "training would stop here"
            problem = [Finding("prepare", "error", str(error), (), why, "correct this first: until then the rows alone can be looked at")]
    for name, kind in {"data": KINDS.get(NAMES[method], "comparisons"), **INPUTS}.items():
        for spec in parts(values[name]) if values.get(name) else ():
            if any(stage in Path(spec).parts for stage in waits):
                continue
            try:
                records, report = read(spec, kind, skip_bad=True)
            except UserError as error:
                if str(error) not in {f.what for f in problem}:
                    problem.append(Finding("unreadable-row", "error", str(error), (), "it cannot be trained on", "correct the file"))
                continue
            problem += run_checks(Case(method, values, spec, records, report.skipped, evaluation_sets=sets), names)
    return problem


def _lenient(values: Mapping[str, Any]) -> str:
    """What shows all long rows where `error` would stop at them."""
    return "drop" if values.get("too_long") == "error" else str(values.get("too_long"))
