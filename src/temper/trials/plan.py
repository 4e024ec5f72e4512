"""An experiment as a file: its arms, what is measured of them, and the trials that it comes to. Floor 8.

A trial is an arm with a seed, and perhaps with one setting changed: an ordinary stage in a folder of its own. `@NAME` in its settings is
another arm's trial of the same seed, or a stage of the run that the experiment starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from temper.config import UserError, build, dump, leaves, load_yaml
from temper.ladder.recipe import PACKAGED, Recipe, Stage, ordered, stage_of
from temper.methods import load
from temper.runs import Run

if TYPE_CHECKING:
    from temper.evals.harbour import Evaluation

Measure = Literal["policy", "chosen", "sums", "selection", "memory"]  # functions of trials/measures.py


class Own(pydantic.BaseModel):
    """What an arm says beside its method and the method's settings. vary: setting -> factors that it is multiplied by, one at a time."""

    of: str = ""
    measure: Measure | None = None
    vary: dict[str, list[float]] = {}
    note: str = ""


class Experiment(pydantic.BaseModel):
    """The file. arms: settings of a method, or `of: "@STAGE"`, a stage that is measured as it is; shared: for YAML's own anchors."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str
    title: str
    columns: dict[str, str]  # metric -> heading
    measure: Measure = "policy"
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
    measure: Measure
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
        raise _wrong(path, "", e) from None
    if plan.against and plan.against not in plan.arms:
        raise UserError(f"{path}: against: {plan.against!r} is no arm; there are {', '.join(plan.arms)}")
    return path, plan


def _wrong(path: str, where: str, error: pydantic.ValidationError) -> UserError:
    first = error.errors()[0]
    return UserError(f"{path}: {where}{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}")


def evaluated_as(run: Path) -> Evaluation:
    """How a run evaluates its stages, without the exact frontier. Raises UserError where it does not, or has not evaluated its SFT."""
    from temper.evals.harbour import Evaluation

    recipe = load_yaml(run / "recipe.yaml")
    if not recipe.get("evaluation") or not (run / "sft" / "evaluation.json").exists():
        raise UserError(f"{run}: its stage sft was not evaluated, which trials are compared with; run a recipe with `evaluation:`")
    return build(Evaluation, {"eval_seed": recipe.get("seed", 0), **recipe["evaluation"], "enumerable": 0}, f"{run / 'recipe.yaml'}")


def trials(path: str, plan: Experiment, run: Path, out: Path, seeds: Sequence[int], vary: bool = True) -> list[Trial]:
    """Every arm on every seed; on the first seed also each setting of `vary` times its factors. In the order in which they are run, each
    after those that it needs: all arms on one seed, then on the next, the changed settings last.

    Raises UserError naming the file and the arm for what is wrong, and for a stage that the run does not have.
    """
    found: list[Trial] = []
    for arm, given in plan.arms.items():
        try:
            own = Own.model_validate(given)
        except pydantic.ValidationError as e:
            raise _wrong(path, f"{arm}: ", e) from None
        values, measure = {k: v for k, v in given.items() if k not in Own.model_fields}, own.measure or plan.measure
        if own.of:
            if values or not own.of.startswith("@"):
                raise UserError(f'{path}: {arm}: `of: "@STAGE"` names a stage of the run and takes no settings')
            found.append(Trial(arm, arm, 0, _of_run(path, arm, own.of[1:], run), measure, note=own.note))
            continue
        for seed in seeds:
            stage = _stage(path, plan, f"{arm}-{seed}", values, seed, run)
            found.append(Trial(stage.name, arm, seed, out / stage.name, measure, stage, note=own.note))
        for setting, factor in ((s, f) for s, factors in own.vary.items() for f in factors) if vary else ():
            changed = _times(path, arm, values, setting, factor)
            name = f"{arm}-{setting}-x{factor:g}-{seeds[0]}".replace(".", "_")
            stage = _stage(path, plan, name, {**values, setting: changed[1]}, seeds[0], run)
            found.append(Trial(name, arm, seeds[0], out / name, measure, stage, changed))
    by = {t.name: t for t in found}
    order = ordered(path, [t.stage for t in sorted(found, key=lambda t: (bool(t.changed), t.seed)) if t.stage])
    return [*(t for t in found if not t.stage), *(by[stage.name] for stage in order)]


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
