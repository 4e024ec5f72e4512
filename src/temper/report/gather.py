"""Reads a run directory, whatever parts of it are there, into plain data for the report. Floor 7.

A missing or damaged part is never an error: it is left out and named in `missing`. Nothing here is computed that the run did not write.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from temper.config import UserError
from temper.evals.harbour import Evaluation
from temper.runs import read_lines

ORDER = ("base", "sft", "comparisons", "reward", "ppo", "dpo", "constitution")  # as people climb it; stages of other names come after
ROLES = {"pretrain": "base", "sft": "sft", "collect": "comparisons", "reward": "reward"}  # method -> what the rung is for
SCORED = ("held_out_accuracy", "expected_accuracy", "ceiling", "ceiling_gap")  # of held-out pairs, what a reward stage reports

Metric = dict[str, Any]  # {"mean", "low", "high", "n"}; low and high may be None


@dataclass
class Stage:
    """One rung: everything that its folder and ladder.json say about it."""

    name: str
    folder: Path
    method: str = ""
    status: str = "unknown"
    parent: str | None = None
    inputs: list[str] = field(default_factory=list)  # stages it reads, the parent among them
    seconds: float | None = None
    budget: float | None = None
    evaluation_seconds: float | None = None
    seed: int | None = None
    threads: int | None = None
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)  # inputs as they were named: model, data, reward, ...
    versions: dict[str, str] = field(default_factory=dict)
    code: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl: training
    looks: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl: {"step", metric: value}, evaluations along the way
    metrics: dict[str, Metric] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)  # the rest of evaluation.json
    curve: dict[str, Any] = field(default_factory=dict)  # of curve.json: what the best of n gives, for each n
    labels: list[float] = field(default_factory=list)  # of ai_pairs.jsonl: how sure Constitutional AI's judge was of each, 0.5 to 1
    error: str = ""

    @property
    def role(self) -> str:
        """base, sft, comparisons, reward, or the stage's method where it is none of these."""
        return ROLES.get(self.method, self.method or self.name)

    @property
    def side_by_side(self) -> list[dict[str, Any]]:
        return [x for x in listed(self.evaluation.get("side_by_side")) if isinstance(x, dict)]

    @property
    def frontier(self) -> list[dict[str, Any]]:
        return [x for x in listed(self.evaluation.get("frontier")) if isinstance(x, dict) and number(x.get("kl")) is not None]


@dataclass
class Ladder:
    """A run directory as read."""

    folder: Path
    name: str
    stages: list[Stage]
    seed: int | None = None
    elapsed: float | None = None
    peak_mb: float | None = None
    cores: int | None = None
    command: str = ""
    missing: list[str] = field(default_factory=list)  # in words

    def role(self, role: str) -> Stage | None:
        """The first stage of that role."""
        return next((s for s in self.stages if s.role == role), None)

    @property
    def evaluated(self) -> list[Stage]:
        return [s for s in self.stages if s.evaluation.get("metrics") is not None]

    @property
    def evaluation(self) -> dict[str, Any]:
        """The settings with which its stages were evaluated; {} where none was."""
        return next((found for s in self.stages if (found := mapped(s.evaluation.get("settings")))), {})

    @property
    def temperature(self) -> float | None:
        """At which the evaluated answers were sampled, where that is known."""
        return number(self.evaluation.get("temperature"))

    @property
    def policies(self) -> list[Stage]:
        """The stages that came from SFT and answer prompts: ppo, dpo, constitution, ..."""
        return [s for s in self.evaluated if s.role not in ("base", "sft", "comparisons", "reward")]


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def mapped(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, else None (JSON's null, text, NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def numbers(rows: Iterable[Any], key: str) -> list[float]:
    """The finite numbers that the rows hold under a key."""
    return [x for row in rows if (x := number(mapped(row).get(key))) is not None]


def metric(value: Any) -> Metric | None:
    """{"mean", "low", "high", "n"} with unknown ends as None; None where there is no mean."""
    mean = number(mapped(value).get("mean"))
    if mean is None:
        return None
    return {"mean": mean, "low": number(value.get("low")), "high": number(value.get("high")), "n": whole(value.get("n")) or 0}


def evaluated_at(folder: str | Path) -> float:
    """The temperature of the evaluation of the run or stage in a folder; the evaluation's default where there is none."""
    with contextlib.suppress(UserError):
        if (found := gather(folder).temperature) is not None:
            return found
    return Evaluation().temperature


def _read(path: Path, missing: list[str]) -> dict[str, Any]:
    """A JSON object; {} where there is none. One that cannot be read is named in `missing`."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        missing.append(f"{path.parent.name}/{path.name} cannot be read ({' '.join(str(error).split())[:80]})")
        return {}
    if not isinstance(value, dict):
        missing.append(f"{path.parent.name}/{path.name} does not hold what it should")
        return {}
    return value


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return mapped(yaml.safe_load(path.read_bytes()))
    except (OSError, yaml.YAMLError, ValueError):
        return {}


def _is_name(name: str) -> bool:
    """May a stage be called so: a folder's name that leads nowhere else?"""
    try:
        return name not in ("", ".", "..") and "/" not in name and "\0" not in name and bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def gather(folder: str | Path) -> Ladder:
    """Read a run: a folder of stages, with ladder.json or without, or the folder of a single stage.

    Raises UserError where there is no such folder, or no stage in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file' if folder.exists() else 'no such folder'}; give the folder of a run, such as runs/harbour")
    missing: list[str] = []
    ladder = _read(folder / "ladder.json", missing)
    planned = {k: mapped(v) for k, v in mapped(ladder.get("stages")).items() if _is_name(k)}
    if len(planned) < len(mapped(ladder.get("stages"))):
        missing.append("a stage of ladder.json whose name cannot be a folder's")
    recipe = _recipe(folder / "recipe.yaml")
    single = (folder / "stage.json").exists()
    if single:
        there = {folder.name or folder.resolve().name: folder}
    else:
        there = {
            p.name: p for p in sorted(folder.iterdir()) if p.is_dir() and ((p / "stage.json").exists() or (p / "evaluation.json").exists())
        }
    there |= {name: folder / name for name in planned if name not in there and (folder / name).is_dir()}
    if not there and not planned:
        raise UserError(f"{folder}: holds no stage of a run (a folder with stage.json); give the --out of `temper run` or of a stage")
    known = [*ORDER, *planned, *mapped(recipe.get("stages"))]
    names = sorted({*there, *planned}, key=lambda n: (known.index(n) if n in known else len(known), n))
    asked = mapped(recipe.get("stages"))
    took = mapped(ladder.get("evaluations"))
    stages = [_stage(n, there.get(n, folder / n), planned.get(n, {}), mapped(asked.get(n)), missing) for n in names]
    places = {s.folder.resolve(): s.name for s in stages}
    for s in stages:
        s.evaluation_seconds = number(took.get(s.name)) or number(s.evaluation.get("seconds"))
        _lineage(s, {stage.name for stage in stages}, places)
        _say_missing(s, missing)
    if not ladder and not single:
        missing.append("ladder.json, so the time of the whole run and the budgets are not known")
    seed = whole(ladder.get("seed"))
    seeds = {s.seed for s in stages if s.seed is not None}
    return Ladder(
        folder=folder,
        name=str(ladder.get("name") or recipe.get("name") or folder.resolve().name),
        stages=stages,
        seed=seed if seed is not None else seeds.pop() if len(seeds) == 1 else None,
        elapsed=number(ladder.get("elapsed_s")),
        peak_mb=number(ladder.get("peak_mb")),
        cores=whole(ladder.get("cores")),
        command=str(ladder.get("command") or ""),
        missing=missing,
    )


def _stage(name: str, folder: Path, plan: dict[str, Any], asked: dict[str, Any], missing: list[str]) -> Stage:
    stage = _read(folder / "stage.json", missing)
    evaluation = _read(folder / "evaluation.json", missing)
    identity, record = mapped(stage.get("identity")), mapped(stage.get("record"))

    def first(key: str, *places: dict[str, Any]) -> Any:
        return next((p[key] for p in places if p.get(key) is not None), None)

    summary = mapped(stage.get("summary"))
    rows = read_lines(folder / "metrics.jsonl") if folder.is_dir() else []
    rows = [r for r in rows if isinstance(r, dict) and number(r.get("step")) is not None]
    looks = [{"step": r["step"], **mapped(r["eval"])} for r in rows if "eval" in r]
    out = Stage(
        name=name,
        folder=folder,
        method=str(first("method", plan, stage, identity, asked) or ""),
        status=str(first("status", plan, stage) or "unknown"),
        parent=next((p["parent"] for p in (plan, record) if isinstance(p.get("parent"), str)), None),
        inputs=[str(i) for i in listed(plan.get("inputs"))],
        seconds=number(first("seconds", plan, summary)),
        budget=number(first("budget_s", plan) or asked.get("budget")),
        seed=whole(first("seed", record, stage, mapped(identity.get("settings")))),
        threads=whole(first("threads", record, stage, identity, plan)),
        command=str(first("command", plan, record, stage) or ""),
        settings=mapped(first("settings", identity, stage)),
        named={k: str(v) for k, v in mapped(record.get("named")).items()},
        versions={k: str(v) for k, v in mapped(stage.get("versions")).items()},
        code=str(stage.get("code") or "")[:12],
        card=mapped(stage.get("card")) or mapped(record.get("card")),
        summary=summary,
        rows=[r for r in rows if "eval" not in r],
        looks=looks,
        evaluation=evaluation,
        curve=_read(folder / "curve.json", missing),
        labels=numbers(read_lines(folder / "ai_pairs.jsonl"), "soft") if folder.is_dir() else [],
        error=str(first("error", plan, stage) or ""),
    )
    if not out.method and name in ORDER:
        out.method = {v: k for k, v in ROLES.items()}.get(name, name)
    if summary and not out.seconds:
        out.seconds = number(summary.get("seconds"))
    for key, value in mapped(evaluation.get("metrics")).items():
        if found := metric(value):
            out.metrics[str(key)] = found
    _held_out(out)
    return out


def _held_out(stage: Stage) -> None:
    """Adds the shares of held-out pairs as metrics: what a stage without a policy is measured by."""
    if stage.role != "reward":
        return
    last: dict[str, Any] = next((look for look in reversed(stage.looks) if SCORED[0] in look), {})
    places = [stage.summary, *(mapped(stage.summary.get(k)) for k in ("held_out", "eval", "last")), last, stage.card]

    def find(key: str) -> float | None:
        return next((v for place in places if (v := number(place.get(key))) is not None), None)

    n = whole(find("held_out_pairs")) or whole(number(stage.card.get("held_out"))) or 0
    for name in SCORED:
        share = find(name)
        if share is not None and name not in stage.metrics:
            stage.metrics[name] = {"mean": share, "low": find(f"{name}_low"), "high": find(f"{name}_high"), "n": n}


def _lineage(stage: Stage, names: set[str], places: dict[Path, str]) -> None:
    """Parent and inputs, from the folders that the stage was given where ladder.json does not say."""
    found: dict[str, str] = {}
    for key, value in stage.named.items():
        if not value.startswith("world:"):
            path = Path(value)
            with contextlib.suppress(ValueError, OSError):  # not a path
                near = (places.get(place.resolve()) for place in reversed((path, *path.parents[:3])))
                found.update((key, name) for name in near if name and name != stage.name)
    if not stage.inputs:
        stage.inputs = list(dict.fromkeys(found.values()))
    stage.inputs = [i for i in stage.inputs if i in names and i != stage.name]
    if stage.parent not in names:
        stage.parent = found.get("model")
    if stage.parent and stage.parent not in stage.inputs:
        stage.inputs.insert(0, stage.parent)


def _say_missing(stage: Stage, missing: list[str]) -> None:
    if not (stage.folder / "stage.json").exists():
        missing.append(f"{stage.name}: has not been run" if not stage.folder.is_dir() else f"{stage.name}: no stage.json")
        return
    if stage.status not in ("done", "skipped"):
        missing.append(f"{stage.name}: not finished ({stage.status})")
    if stage.role in ("best-of-n", "mix"):
        return
    if not stage.rows and stage.role != "comparisons":
        missing.append(f"{stage.name}: no metrics.jsonl, so no curves")
    if not stage.metrics and stage.role not in ("comparisons", "reward"):
        missing.append(f"{stage.name}: no evaluation, so it has no figures here (a recipe with an evaluation measures every rung)")
    elif not stage.metrics and stage.role == "reward":
        missing.append(f"{stage.name}: no held-out pairs, so its accuracy is not known")


def machine() -> dict[str, Any]:
    """Where this process runs: what timings depend on."""
    out: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count()}
    try:
        out["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        cpu = Path("/proc/cpuinfo").read_text(errors="replace")
        out["processor"] = next((line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")), None)
    except (OSError, ValueError, AttributeError):
        pass
    return {k: v for k, v in out.items() if v is not None}
