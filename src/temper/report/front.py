"""`temper front A B`: the trade-off between two rewards, drawn with intervals: soups, mixed log-probs, trained policies. Floor 7.

Every policy answers the same prompts with the same random numbers; both raters rate the same answers. A point is (mean of the first
rating, mean of the second) with 95% intervals over prompts. `dominated`: another point of the front is better in both means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import field_validator

from temper.config import Settings, UserError, opt, parse
from temper.judges.rating import Rater, rater
from temper.methods.base import Window, asked
from temper.methods.best_of_n import draw, rated
from temper.models.load import load_policy
from temper.models.mix import check_start, load_mixed, load_soup
from temper.report.figures import Series, chart
from temper.report.page import document, html, join, scroll
from temper.report.words import clean, plain
from temper.rollout import Sampling
from temper.runs import Run, atomic_write
from temper.stats.intervals import mean_interval
from temper.train import machine

EXAMPLES = """
  temper front runs/harbour/dpo runs/harbour/constitution --out runs/front
  temper front runs/a runs/b --rewards runs/rm_a runs/rm_b --prompts prompts.jsonl --trained runs/both --out runs/front
"""
TONES = {"soup": "c-dpo", "mixed": "c-ppo", "trained": "c-constitution"}
SAYS = {
    "soup": "interpolated weights",
    "mixed": "mixed log-probs",
    "trained": "trained",
}


class Front(Settings):
    """Draw the trade-off between two rewards: two experts at several weights, as rewarded soups and as mixed log-probs, and other policies.

    What for: to see what a choice of weights at deployment costs either reward, before one is made. When: two experts of one SFT model,
    each better at another reward. Give policies trained on weighted sums of the rewards (--trained) to see what the short cut loses;
    such training itself reaches the convex hull of the front only. Source: rewarded soups arXiv:2306.04488, decoding-time mixing
    arXiv:2406.18853.
    """

    experts: list[str] = opt(..., "two models", positional=True, min_length=2, max_length=2)
    out: str = opt(..., "folder for front.json and front.html")
    rewards: list[str] = opt(["gold:helpful", "gold:harmless"], "two raters", min_length=2, max_length=2)
    prompts: str = opt("world:evaluation?n=200&split=evaluation", "prompts to answer: a file, or of the embedded world")
    weights: list[float] = opt([0.0, 0.25, 0.5, 0.75, 1.0], "of the first expert; the second has the rest", min_length=1)
    soups: bool = opt(True, "interpolated weights: experts of one start only")
    mixed: bool = opt(True, "mixed log-probs: each token costs a pass of both models")
    trained: list[str] = opt([], "other policies to draw: trained on weighted rewards, or the experts' start")
    samples_per_prompt: int = opt(2, "answers drawn to each", ge=1)
    seed: int = opt(0, "of the samples, the same for every policy", ge=0)
    threads: int = opt(2, "CPU threads", ge=1)
    json_: bool = opt(False, "print front.json instead of the summary")
    sampling: Sampling = Sampling(temperature=0.7, max_new=64)
    window: Window = Window()

    @field_validator("weights")
    @classmethod
    def _shares(cls, weights: list[float]) -> list[float]:
        if any(not 0 <= w <= 1 for w in weights):
            raise ValueError("a weight is a share between 0 and 1")
        return sorted(set(weights))


def policies(s: Front) -> Iterator[tuple[list[str], str, float | None, Any, Any]]:
    """(kinds, name, weight of the first expert, policy, tokenizer), loaded one after the other. An expert alone is a soup and a mixture."""
    kinds = [kind for kind, wanted in (("soup", s.soups), ("mixed", s.mixed)) if wanted]
    first, second = s.experts
    for w in s.weights if kinds else []:
        if w in (0.0, 1.0):
            yield kinds, first if w else second, w, *load_policy(first if w else second)
            continue
        for kind in kinds:
            yield [kind], f"{w:g} {first}", w, *(load_soup if kind == "soup" else load_mixed)({first: w, second: 1 - w})
    for name in s.trained:
        yield ["trained"], name, None, *load_policy(name)


def measure(s: Front, raters: Sequence[Rater]) -> list[dict[str, Any]]:
    """The points: kind, name, weight, x and y as intervals, how many answers could not be rated by both."""
    points: list[dict[str, Any]] = []
    for kinds, name, weight, policy, tokenizer in policies(s):
        prompts = asked(s.prompts, Run(s.out), tokenizer, policy, s.window, room=s.sampling.max_new)
        groups = draw(policy, tokenizer, prompts, s.sampling, s.samples_per_prompt, ("front", s.seed), lambda done, of: None)
        names = [json.dumps([m.model_dump(mode="json") for m in r.messages]) for r in prompts.every()[0]]
        both = zip(*(rated(by, groups) for by in raters), strict=True)
        rows = [
            (a, b, n) for n, pair in zip(names, both, strict=True) for a, b in zip(*pair, strict=True) if a is not None and b is not None
        ]
        if not rows:
            raise UserError(f"{s.prompts}: {' and '.join(by.name for by in raters)} rate none of the answers both; give other --rewards")
        xs, ys, where = zip(*rows, strict=True)
        found = {"x": mean_interval(xs, where).to_dict(), "y": mean_interval(ys, where).to_dict()}
        unrated = sum(map(len, groups)) - len(rows)
        points += [{"kind": kind, "name": name, "weight": weight, **found, "unrated": unrated} for kind in kinds]
    for p in points:
        p["dominated"] = any(q["x"]["mean"] > p["x"]["mean"] and q["y"]["mean"] > p["y"]["mean"] for q in points)
    return points


def page(found: dict[str, Any]) -> str:
    """The document: the picture, and its points as a table."""
    x, y = found["rewards"]
    series = []
    for kind, tone in TONES.items():
        here = [p for p in found["points"] if p["kind"] == kind]
        cross = [(p["x"]["mean"], p["y"]["mean"], p["x"]["low"], p["x"]["high"], p["y"]["low"], p["y"]["high"]) for p in here]
        if kind == "trained":
            series += [Series(Path(p["name"]).name, tone, [], "none", crosses=[c]) for p, c in zip(here, cross, strict=True)]
        elif here:
            series.append(Series(SAYS[kind], tone, [c[:2] for c in cross], crosses=cross))
    figure = chart(series, f"{x} (mean, 95%)", f"{y} against {x}", size=(640, 420))
    rows = join(
        html(
            "<tr><td>{k}</td><td>{n}</td><td>{w}</td><td>{x}</td><td>{y}</td><td>{d}</td></tr>\n",
            k=SAYS[p["kind"]],
            n=p["name"],
            w="" if p["weight"] is None else f"{p['weight']:g}",
            x=_told(p["x"]),
            y=_told(p["y"]),
            d="yes" if p["dominated"] else "",
        )
        for p in found["points"]
    )
    head = html("<tr><th>kind</th><th>policy</th><th>weight</th><th>{x}</th><th>{y}</th><th>dominated</th></tr>", x=x, y=y)
    a, b = found["experts"]
    facts = html('<p class="facts"><span>{a} and {b}</span><span>{p}</span></p>', a=a, b=b, p=found["prompts"])
    note = (
        html(
            '<p class="note">Up is more of {y}, right is more of {x}. Along a line the weight of {a} goes from {l} to {h}. Bars are 95%'
            " intervals over prompts, each reward by itself.</p>",
            x=x,
            y=y,
            a=a,
            l=plain(found["weights"][0], 2),
            h=plain(found["weights"][-1], 2),
        )
        if found["weights"]
        else Markup("")
    )
    sections = [
        ("front", "The front", html("<figure>{f}</figure>{n}", f=figure, n=note)),
        ("points", "Its points", scroll("", head, rows)),
    ]
    foot = html("Written by <code>temper front</code>; this page needs no network and runs no script.")
    return document("trade-off", f"{y} against {x}", facts, sections, foot)


def _told(m: dict[str, Any]) -> str:
    low, high = ("?" if v is None else plain(v, 3) for v in (m["low"], m["high"]))
    return f"{plain(m['mean'], 3)} ({low} to {high})"


def read(argv: list[str]) -> Front:
    """What is asked for. Raises UserError for wrong flags, models that are not there, and experts of different starts."""
    s = parse(Front, argv, "temper front", EXAMPLES)
    for name in (*s.experts, *s.trained):
        if not Path(name).expanduser().exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise UserError(f"{name}: no such folder")
    if Path(s.out).is_file():
        raise UserError(f"{s.out}: a file; give a folder for --out")
    if s.soups:
        check_start(s.experts)
    return s


def main(argv: list[str]) -> int:
    s = read(argv)
    machine.use(s.threads)
    raters = [rater(spec) for spec in s.rewards]
    found: dict[str, Any] = {
        "experts": s.experts,
        "rewards": s.rewards,
        "prompts": s.prompts,
        "weights": s.weights,
        "samples": s.samples_per_prompt,
    }
    found |= {"temperature": s.sampling.temperature, "seed": s.seed, "points": measure(s, raters)}
    Path(s.out).mkdir(parents=True, exist_ok=True)
    atomic_write(Path(s.out) / "front.json", json.dumps(found, indent=1) + "\n")
    atomic_write(Path(s.out) / "front.html", page(found))
    if s.json_:
        print(json.dumps(found, indent=1))
        return 0
    x, y = s.rewards
    for p in found["points"]:
        print(
            f"{SAYS[p['kind']]:<21} {clean(p['name'])}: {x} {_told(p['x'])}, {y} {_told(p['y'])}{', dominated' if p['dominated'] else ''}"
        )
    print(f"picture in {Path(s.out) / 'front.html'}")
    return 0
