"""An experiment as a file: its arms, what is measured of them, and the trials that it comes to. Floor 8.

A trial is an arm with a seed, and perhaps with one setting changed: an ordinary stage in a folder of its own. `@NAME` in its settings is
another arm's trial of the same seed, or a stage of the run that the experiment starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from temper.config import UserError, build, dump, leaves, load_yaml
from temper.ladder.recipe import PACKAGED, Recipe, Stage, ordered, stage_of
from temper.methods import load
from temper.runs import Run

if TYPE_CHECKING:
    from temper.evals.harbour import Evaluation

OWN = ("of", "measure", "vary", "note")  # what an arm says beside its method and the method's settings


class Experiment(pydantic.BaseModel):
    """The file. arms: settings of a method, or `of: "@STAGE"`, a stage that is measured as it is; shared: for YAML's own anchors."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str
    title: str
    columns: dict[str, str]  # metric -> heading
    measure: str = "policy"
    better: str = ""  # the metric whose interval must lie above `above` for an arm to pass
    above: float = 0.5
    against: str = ""  # an arm from which the others' `better` is counted, as the metric `gained`
    shared: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)


@dataclass(frozen=True)
class Trial:
    """One training, or one stage as it is (`stage` None)."""

    name: str
    arm: str
    seed: int
    folder: Path  # of what is measured
    measure: str
    stage: Stage | None = None
    changed: tuple[str, Any, float] | None = None  # setting, its value, and by what factor it differs from the arm's
    note: str = ""


def read_experiment(name: str) -> tuple[str, Experiment]:
    """(its file, what it says): one of those that come with Temper by its name, or a file. Raises UserError."""
    known = sorted(p.stem for p in (PACKAGED / "bench").glob("*.yaml"))
    path = str(PACKAGED / "bench" / f"{name}.yaml") if name in known else name
    if name not in known and not Path(name).exists():
        raise UserError(f"no experiment {name!r}; there are {', '.join(known)}, or give a YAML file")
    try:
        plan = Experiment.model_validate(load_yaml(path))
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
    if plan.against and plan.against not in plan.arms:
        raise UserError(f"{path}: against: {plan.against!r} is no arm; there are {', '.join(plan.arms)}")
    return path, plan


def evaluated_as(run: Path) -> Evaluation:
    """How a run evaluates its stages, without the exact frontier. Raises UserError where it does not, or has not evaluated its SFT."""
    from temper.evals.harbour import Evaluation

    recipe = load_yaml(run / "recipe.yaml")
    if not recipe.get("evaluation") or not (run / "sft" / "evaluation.json").exists():
        raise UserError(f"{run}: its stage sft was not evaluated, which trials are compared with; run a recipe with `evaluation:`")
    return build(Evaluation, {"eval_seed": recipe.get("seed", 0), **recipe["evaluation"], "enumerable": 0}, f"{run / 'recipe.yaml'}")


def trials(path: str, plan: Experiment, run: Path, out: Path, seeds: Sequence[int], vary: bool = True) -> list[Trial]:
    """All trials, each after those that it needs: every arm on every seed; on the first seed also each setting of `vary` times its factors.

    Raises UserError naming the file and the arm for what is wrong, and for a stage that the run does not have.
    """
    found: dict[str, Trial] = {}
    for arm, given in plan.arms.items():
        measure, note = given.get("measure", plan.measure), str(given.get("note", ""))
        if "of" in given:
            if set(given) - {*OWN} or not str(given["of"]).startswith("@"):
                raise UserError(f'{path}: {arm}: `of: "@STAGE"` names a stage of the run and takes no settings')
            where = _of_run(path, arm, str(given["of"])[1:], run)
            found[arm] = Trial(arm, arm, 0, where, measure, note=note)
            continue
        values = {k: v for k, v in given.items() if k not in OWN}
        for seed in seeds:
            stages: list[tuple[Stage, tuple[str, Any, float] | None]] = [(_stage(path, plan, f"{arm}-{seed}", values, seed, run), None)]
            for setting, factors in given.get("vary", {}).items() if vary and seed == seeds[0] else ():
                for changed in (_times(path, arm, values, setting, factor) for factor in factors):
                    name = f"{arm}-{setting}-x{changed[2]:g}-{seed}".replace(".", "_")
                    stages.append((_stage(path, plan, name, {**values, setting: changed[1]}, seed, run), changed))
            for stage, change in stages:
                found[stage.name] = Trial(stage.name, arm, seed, out / stage.name, measure, stage, change, note)
    order = ordered(path, [t.stage for t in found.values() if t.stage])
    return [*(t for t in found.values() if not t.stage), *(found[stage.name] for stage in order)]


def _stage(path: str, plan: Experiment, name: str, values: dict[str, Any], seed: int, run: Path) -> Stage:
    def resolved(value: Any) -> Any:
        if not (isinstance(value, str) and value.startswith("@")):
            return value
        target, slash, rest = value[1:].partition("/")
        if target in plan.arms and "of" not in plan.arms[target]:
            return f"@{target}-{seed}{slash}{rest}"
        return f"{_of_run(path, name, target, run)}{slash}{rest}"

    recipe = Recipe(name=plan.name, seed=seed, stages={name: values})
    return stage_of(path, name, {k: resolved(v) for k, v in values.items()}, recipe)


def _of_run(path: str, arm: str, name: str, run: Path) -> Path:
    if not Run(run / name).done:
        raise UserError(f"{path}: {arm} needs {run / name}, which is no finished stage; make the run first: temper run --out {run}")
    return run / name


def _times(path: str, arm: str, values: dict[str, Any], setting: str, factor: float) -> tuple[str, Any, float]:
    """A setting, its value times a factor (whole numbers stay whole), and the factor."""
    kind = load(values["method"]).settings(values["method"])
    value = dump(build(kind, {k: v for k, v in values.items() if k in leaves(kind)}, f"{path}: {arm}")).get(setting)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{path}: {arm}: vary: {setting!r} is {value!r}, no number that could be changed")
    return setting, max(1, round(value * factor)) if isinstance(value, int) else value * factor, factor
