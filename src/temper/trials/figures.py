"""What the trials of an experiment came to: each arm over its seeds, each changed setting beside it; as JSON and as a table. Floor 8.

With several seeds an interval is the t interval of their means, so its unit is the training; with one seed it is that trial's own,
over prompts. An arm passes where the interval over seeds lies above the line, and every trial's own interval over prompts does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.methods import NAMES
from temper.runs import Run
from temper.stats.intervals import mean_interval, paired_difference
from temper.trials.plan import Experiment, Trial

COSTS = ("seconds", "cpu_seconds", "peak_mb", "tokens", "steps")  # of a training, beside what was measured
HOLDS = {  # file of a method -> the models that training holds at once, and what it learns from
    "sft": ("policy", "demonstrations"),
    "preference": ("policy", "pairs"),
    "unpaired": ("policy", "thumbs"),
    "online": ("policy, reference, reward", "prompts, reward"),
    "ppo": ("policy, value, reference, reward", "prompts, reward"),
    "grpo": ("policy, reference, reward", "prompts, reward"),
    "best_of_n": ("policy, reward", "prompts, reward"),
    "rejection": ("policy, reward", "prompts, reward"),
    "constitution": ("policy", "prompts, principles, pairs"),
    "process_reward": ("policy", "solutions"),
    "reward": ("reward", "pairs"),
}
SAMPLES = ("online", "ppo", "grpo", "best_of_n", "rejection", "constitution")
Row = dict[str, Any]


def stopped(trial: Trial, out: Path) -> Path:
    """The file that says why a check stopped a trial; beside its folder, which is its method's alone."""
    return out / f"{trial.name}.stopped.json"


def outcome(trial: Trial, out: Path) -> Row | None:
    """What a trial came to: its metrics, what it cost, or why it stopped; None where it is not done."""
    folder, why = out / trial.name, _json(stopped(trial, out))
    if why:
        return {"stopped": why["why"]}
    found = _json(folder / "evaluation.json")
    if "metrics" not in found:
        return None
    spent = Run(folder).stage.get("summary", {}) if trial.stage else {}
    return {"metrics": found["metrics"], "items": found.get("items", {}), "costs": {name: spent[name] for name in COSTS if name in spent}}


def _json(path: Path) -> Row:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def over_seeds(outcomes: Sequence[Row]) -> Row:
    """Metrics and costs of an arm's trials: {name: {mean, low, high, n, each: [...]}}; a trial that has no such figure is left out."""
    rows = [{**o["metrics"], **{name: {"mean": x, "low": None, "high": None, "n": 1} for name, x in o["costs"].items()}} for o in outcomes]
    found: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        each = [row[name] for row in rows if name in row]
        whole = mean_interval([x["mean"] for x in each]).to_dict() if len(each) > 1 else each[0]
        found[name] = {**whole, "each": each}
    return found


def gained(own: Row, other: Row, name: str) -> Row:
    """A metric above that of another trial: paired by prompt where both have its items, else the difference alone."""
    mine, theirs = (o["items"].get(name) for o in (own, other))
    if mine and theirs:
        return paired_difference(mine, theirs).to_dict()
    return {"mean": own["metrics"][name]["mean"] - other["metrics"][name]["mean"], "low": None, "high": None, "n": 1}


def passes(plan: Experiment, metrics: Mapping[str, Row]) -> bool | None:
    """Whether the interval over seeds and every trial's own lie above the line; None where the experiment draws none."""
    found = metrics.get("gained" if plan.against else plan.better)
    if not plan.better or not found:
        return None
    lows = [low for low in (found["low"], *(x["low"] for x in found["each"])) if low is not None]
    return bool(lows) and min(lows) > plan.above


def gathered(plan: Experiment, found: Sequence[Trial], out: Path) -> Row:
    """The experiment's results: a row per arm, in the file's order; trials that are missing or stopped are named."""
    done = {t.name: o for t in found if (o := outcome(t, out))}
    measured = {t.name: done[t.name] for t in found if "metrics" in done.get(t.name, {})}
    base = {t.seed: measured[t.name] for t in found if t.arm == plan.against and not t.changed and t.name in measured}
    for t in found:
        other = base.get(t.seed, base.get(0))  # a stage as it is has no seed
        if other and t.arm != plan.against and plan.better in measured.get(t.name, {}).get("metrics", {}):
            measured[t.name]["metrics"]["gained"] = gained(measured[t.name], other, plan.better)
    rows = [_row(plan, arm, [t for t in found if t.arm == arm], done) for arm in plan.arms]
    line = {"better": "gained" if plan.against else plan.better, "above": plan.above}
    return {"name": plan.name, "title": plan.title, "columns": plan.columns, **line, "rows": rows}


def _row(plan: Experiment, arm: str, own: Sequence[Trial], done: Mapping[str, Row]) -> Row:
    plain = [t for t in own if not t.changed]
    stage = plain[0].stage
    metrics = over_seeds([done[t.name] for t in plain if "metrics" in done.get(t.name, {})])
    return {
        "arm": arm,
        "method": stage.method if stage else None,
        "settings": stage.values if stage else {},
        "seeds": [t.seed for t in plain if t.name in done],
        "metrics": metrics,
        "passes": passes(plan, metrics) if stage else None,
        "varied": [
            {**dict(zip(("setting", "value", "factor"), t.changed, strict=True)), **done[t.name]}
            for t in own
            if t.changed and t.name in done
        ],
        "missing": [t.name for t in own if t.name not in done],
        "stopped": {t.name: done[t.name]["stopped"] for t in own if "stopped" in done.get(t.name, {})},
        "note": plain[0].note,
    }


# ---------------------------------------------------------------- the table


def number(x: float | None) -> str:
    """Three significant digits, and no more than three decimals."""
    if x is None or not math.isfinite(x):
        return "?"
    digits = 3 if x == 0 else max(0, min(3, 2 - math.floor(math.log10(abs(x)))))
    return f"{x:.{digits}f}".replace("-", "−")


def told(m: Row) -> str:
    """A mean with its interval, where it has one."""
    return number(m["mean"]) if m["low"] is None else f"{number(m['mean'])} ({number(m['low'])} to {number(m['high'])})"


def table(results: Row) -> str:
    """Markdown: a row per arm, notes, and what the changed settings did to the metric that counts, or to the first column's."""
    columns, rows = results["columns"], results["rows"]
    facts = {title: [_facts(r)[k] for r in rows] for k, title in enumerate(("models held", "learns from", "samples"))}
    facts = {title: cells for title, cells in facts.items() if len({*cells} - {""}) > 1}  # those in which the arms differ
    lines = [_line(["", *columns.values(), *facts]), _line(["---"] * (1 + len(columns) + len(facts)))]
    for i, r in enumerate(rows):
        cells = [told(r["metrics"][name]) if name in r["metrics"] else "" for name in columns]
        if not r["metrics"]:
            cells[0] = "stopped" if r["stopped"] else "not measured yet"
        mark = " †" if r["passes"] is False else ""
        lines.append(_line([f"`{r['arm']}`{mark}", *cells, *(each[i] for each in facts.values())]))
    seeds = sorted({len(r["seeds"]) for r in rows if r["method"]})
    unit = "over seeds" if seeds and seeds[-1] > 1 else "over prompts, one seed"
    notes = [f"Seeds: {' or '.join(map(str, seeds)) or 'none'}. Intervals (95%) are {unit}."]
    if any(r["passes"] is False for r in rows):
        what = columns.get(results["better"], results["better"])
        notes.append(f"†: {what} is not above {number(results['above'])} with its intervals.")
    notes += [f"- `{r['arm']}`: {r['note']}." for r in rows if r["note"]]
    notes += [f"- `{name}` stopped: {why}." for r in rows for name, why in r["stopped"].items()]
    return "\n".join([*lines, "", *notes, *_varied(results)]) + "\n"


def _varied(results: Row) -> list[str]:
    name = results["better"] or next(iter(results["columns"]))
    lines = []
    for r in (r for r in results["rows"] if r["varied"]):
        own = r["metrics"].get(name, {}).get("each", [{"mean": None}])[0]["mean"]
        by: dict[str, list[str]] = {}
        for v in r["varied"]:
            got = "stopped" if "stopped" in v else number(v["metrics"].get(name, {"mean": None})["mean"])
            by.setdefault(v["setting"], []).append(f"× {v['factor']:g}: {got}")
        lines.append(
            _line([f"`{r['arm']}`", number(own), "; ".join(f"`{s}` {r['settings'].get(s, '')} {', '.join(x)}" for s, x in by.items())])
        )
    if not lines:
        return []
    what = results["columns"].get(name, name)
    return [
        "",
        f"What a changed setting does to it ({what}, one seed):",
        "",
        _line(["", "as above", "changed"]),
        _line(["---"] * 3),
        *lines,
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _facts(row: Row) -> tuple[str, str, str]:
    """The models that training holds, what it learns from, whether it samples."""
    from temper.losses.preference import RULES

    file = NAMES.get(row["method"] or "", "")
    held, data = HOLDS.get(file, ("", ""))
    if file == "preference":
        rule = RULES[row["method"]]
        held, data = f"{held}{', reference before it' if rule.reference else ''}", "rankings" if rule.listwise else data
    return held, data, "" if not held else "yes" if file in SAMPLES else "no"
