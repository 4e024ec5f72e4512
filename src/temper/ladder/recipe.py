"""A recipe: its stages, their settings, and which stage needs which. Floor 7.

A setting that begins with @ names another stage (`@sft`, `@comparisons/pairs.jsonl`): that is an edge.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from temper.config import Settings, UserError, build, dump, leaves, load_yaml, opt
from temper.methods import NAMES, load

PACKAGED = Path(__file__).parents[1] / "recipes"  # where those that come with Temper are installed


class Recipe(pydantic.BaseModel):
    """A recipe file: a name, a seed, the stages with their method, budget and settings, and how the policies are evaluated.

    evaluation_sets: files of test questions that no stage may train on.
    """

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str
    seed: int = 0
    evaluation: dict[str, Any] | None = None
    evaluation_sets: list[str] = []
    stages: dict[str, dict[str, Any]] = pydantic.Field(min_length=1)


class Entry(Settings):
    """What a stage of a recipe says beside its method's own settings."""

    method: str = opt(..., "how it is made")
    threads: int = opt(1, "CPU threads", ge=1)
    ranks: int = opt(1, "processes that train it together, each with its threads", ge=1)
    budget: float | None = opt(None, "seconds it may take; shown, not enforced", gt=0)
    doctor: Literal["refuse", "warn", "off"] = opt("refuse", "checks before the first step")


@dataclass
class Stage:
    """One entry of a recipe: its method, its settings as written (with @), its budget in seconds."""

    name: str
    method: str
    values: dict[str, Any]
    threads: int
    ranks: int
    budget: float | None
    doctor: Literal["refuse", "warn", "off"] = "refuse"
    evaluation_sets: Sequence[str] = ()

    @property
    def needs(self) -> list[str]:
        """The stages that its settings name, in the order of the settings."""
        named = [v[1:].split("/")[0] for v in self.values.values() if isinstance(v, str) and v.startswith("@")]
        return list(dict.fromkeys(named))

    @property
    def parent(self) -> str | None:
        """The stage whose model this one starts from."""
        model = self.values.get("model", "")
        return model[1:].split("/")[0] if model.startswith("@") else None

    def resolved(self, out: Path) -> dict[str, Any]:
        """The settings with every @ turned into a path."""
        return {k: str(out / v[1:]) if isinstance(v, str) and v.startswith("@") else v for k, v in self.values.items()}


def located(path: str) -> Path:
    """The recipe's file; recipes/NAME that is not in the current folder is the one that comes with Temper."""
    own = PACKAGED / Path(path).name
    return own if not Path(path).exists() and Path(path).parent == Path("recipes") and own.exists() else Path(path)


def read_recipe(path: str, seed: int | None) -> tuple[Recipe, list[Stage]]:
    """The recipe and its stages in an order in which each comes after what it needs.

    Raises UserError: no such file, an unknown method or setting, a stage that is not there, a cycle.
    """
    raw = load_yaml(str(located(path)))
    try:
        recipe = Recipe.model_validate(raw)
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    if recipe.evaluation is not None:
        from temper.evals.harbour import Evaluation

        build(Evaluation, recipe.evaluation, where=f"{path}: evaluation")
    stages = [stage_of(path, name, dict(values), recipe) for name, values in recipe.stages.items()]
    known = [s.name for s in stages]
    for stage in stages:
        for need in stage.needs:
            if need not in known:
                raise UserError(f"{path}: {stage.name} needs @{need}, which is no stage; there are {', '.join(known)}")
    return recipe, ordered(path, stages)


def stage_of(path: str, name: str, values: dict[str, Any], recipe: Recipe) -> Stage:
    """An entry of a recipe, checked; its seed is the recipe's unless it says one. Raises UserError naming the file and the entry."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise UserError(f"{path}: a stage called {name!r}; its name is its folder: give letters, digits, - and _")
    method = values.get("method")
    if not isinstance(method, str) or method not in NAMES:
        raise UserError(f"{path}: {name}: method {method!r}; there are {', '.join(NAMES)}")
    kind = load(method).settings(method)
    if "seed" in leaves(kind):
        values.setdefault("seed", recipe.seed)
    whole: Any = pydantic.create_model(kind.__name__, __base__=Settings, own=(kind, ...), entry=(Entry, ...))
    entry = build(whole, values, where=f"{path}: {name}").entry
    return Stage(
        name,
        method,
        {k: v for k, v in values.items() if k not in Entry.model_fields},
        entry.threads,
        entry.ranks,
        entry.budget,
        entry.doctor,
        recipe.evaluation_sets,
    )


def ordered(path: str, stages: list[Stage]) -> list[Stage]:
    """Each stage after what it needs. Raises UserError for a cycle."""
    done: list[Stage] = []
    left = list(stages)
    while left:
        ready = [s for s in left if all(n in {d.name for d in done} for n in s.needs)]
        if not ready:
            around = " -> ".join([*(s.name for s in left), left[0].name])
            raise UserError(f"{path}: the stages need each other in a cycle: {around}; take one of the @ away")
        done += ready
        left = [s for s in left if s not in ready]
    return done


def resolved(recipe: Recipe, stages: list[Stage]) -> str:
    """The run's recipe.yaml: every default written out."""
    full = {
        s.name: {"method": s.method, "threads": s.threads, "ranks": s.ranks, "budget": s.budget, "doctor": s.doctor, **_flat(s)}
        for s in stages
    }
    whole = {**recipe.model_dump(exclude={"stages"}), "stages": full}
    return yaml.safe_dump(whole, sort_keys=False, width=120)


def _flat(stage: Stage) -> dict[str, Any]:
    return dump(build(load(stage.method).settings(stage.method), stage.values))
