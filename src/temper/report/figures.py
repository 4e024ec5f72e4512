"""Figures as inline SVG: the ladder, intervals, training curves, gold and proxy against KL, the exact frontier, gold parts. Floor 7.

Colours are CSS variables, so one picture serves light, dark and print. Every text goes through markupsafe: nothing that a model or a
folder's name says can become markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from temper.report.gather import Ladder, Metric, Stage, listed, mapped, metric, number
from temper.report.words import NO_CHANGE, WHAT, clean, digits, duration, few, measured, plain, told, value

COLOURED = ("base", "sft", "comparisons", "reward", "ppo", "dpo", "constitution")
PARTS = ("helpful", "harmless", "honest", "concise", "format")


def colour(stage: Stage, ladder: Ladder) -> str:
    """CSS class that carries a stage's colour: the same in every figure."""
    if stage.name in COLOURED:
        return f"c-{stage.name}"
    others = [s.name for s in ladder.stages if s.name not in COLOURED]
    return f"c-other{others.index(stage.name) % 4}"


class Pen:
    """Collects the elements of one SVG."""

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[Markup] = []

    def add(self, template: str, **values: Any) -> None:
        self.parts.append(Markup(template).format(**{k: _short(v) if isinstance(v, float) else v for k, v in values.items()}))

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.add('<text x="{x}" y="{y}" class="{k}" text-anchor="{a}">{t}</text>', x=float(x), y=float(y), k=kind, a=anchor, t=clean(text))

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        template = '<line x1="{a}" y1="{b}" x2="{c}" y2="{d}" class="{k}"/>'
        self.add(template, a=float(x1), b=float(y1), c=float(x2), d=float(y2), k=kind)

    def path(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        steps = " ".join(f"{'L' if i else 'M'}{_short(x)} {_short(y)}" for i, (x, y) in enumerate(points))
        if steps:
            self.add('<path d="{d}" class="{k}"/>', d=steps, k=kind)

    def dot(self, x: float, y: float, r: float, kind: str, tip: str = "") -> None:
        template = (
            '<circle cx="{x}" cy="{y}" r="{r}" class="{k}"><title>{t}</title></circle>'
            if tip
            else '<circle cx="{x}" cy="{y}" r="{r}" class="{k}"/>'
        )
        self.add(template, x=float(x), y=float(y), r=float(r), k=kind, t=clean(tip))

    def svg(self, kind: str = "") -> Markup:
        head = Markup('<svg class="{}" viewBox="0 0 {} {}" width="{}" height="{}" role="img" aria-label="{}">')
        w, h = _short(self.width), _short(self.height)
        return head.format(kind, w, h, w, h, clean(self.label)) + Markup("").join(self.parts) + Markup("</svg>\n")


def _short(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that divide [low, high] into about so many parts."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= 0.7 * raw)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(name: str, x: float, all_ticks: Sequence[float]) -> str:
    """A tick's label with as many decimals as the step between ticks needs."""
    step = all_ticks[1] - all_ticks[0] if len(all_ticks) > 1 else abs(x) or 1.0
    step *= 100 if value(name, 0.5).endswith("%") else 1
    return value(name, x, max(0, min(4, -math.floor(math.log10(step) + 1e-9))))


def span(numbers: Iterable[float | None], pad: float = 0.06, include: Sequence[float] = ()) -> tuple[float, float]:
    """The range of the numbers with some air."""
    known = [x for x in numbers if x is not None] + list(include)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    air = (high - low) * pad or abs(high) * 0.1 or 0.5
    return low - air, high + air


class Axis(NamedTuple):
    """A linear scale: data [low, high] onto pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, x: float) -> float:
        return self.start + (x - self.low) / (self.high - self.low) * (self.end - self.start)


def fit_text(text: str, room: float, size: float = 12) -> str:
    """Cut to about `room` pixels."""
    most = max(3, int(room / (0.54 * size)))
    text = " ".join(clean(text).split())
    return text if len(text) <= most else text[: most - 1] + "\u2026"


# ---------------------------------------------------------------- the ladder


def ladder(run: Ladder, wide: bool) -> Markup:
    """Stages as rungs of a tree (each under the one it starts from), with gold and what the rung gained; data flows as dashed arcs."""
    rows = _tree(run.stages)
    at = {s.name: i for i, (s, _) in enumerate(rows)}
    deepest = max((d for _, d in rows), default=0)
    row, indent, head = (46.0, 22.0, 34.0) if wide else (62.0, 15.0, 14.0)
    width = 1020.0 if wide else 350.0
    pen = Pen(width, head + row * len(rows) + 8, "The stages as a tree, with the gold score of each and what it gained")
    x = [12.0 + indent * depth for _, depth in rows]
    y = [head + row * (i + 0.5) for i in range(len(rows))]
    label = 12 + indent * deepest + (40 if wide else 30)
    gold = {s.name: s.metrics["gold"] for s, _ in rows if "gold" in s.metrics}
    axis = Axis(*span(v for m in gold.values() for v in (m["low"], m["mean"], m["high"])), label + 210, label + 520)
    if wide:
        _columns(pen, axis if gold else None, head)
    place = list(zip(x, y, strict=True))
    for i, (stage, _) in enumerate(rows):
        if stage.parent in at:
            _trunk(pen, place[at[stage.parent]], place[i])
        for other in stage.inputs:
            if other != stage.parent and other in at:
                _flow(pen, place[at[other]], place[i], label - (8 if wide else 5))
    for (stage, _), (left, middle) in zip(rows, place, strict=True):
        tone = colour(stage, run)
        broken = "" if stage.status in ("done", "skipped", "unknown") else " broken"
        pen.dot(left, middle, 6.5, f"node {tone}{'' if stage.metrics.get('gold') else ' hollow'}{broken}")
        what = WHAT.get(stage.method, stage.method) + (f": {stage.status}" if broken else "")
        pen.text(label, middle - (3 if wide else 12), fit_text(stage.name, 190 if wide else 150, 14), "name")
        pen.text(label, middle + (13 if wide else 4), fit_text(what, 195 if wide else 180, 12), "small quiet")
        pace = duration(stage.seconds) if stage.seconds is not None else ""
        pen.text(1016 if wide else width - 2, middle + (4 if wide else -12), pace, "small quiet", "end")
        if wide:
            _beside(pen, stage, axis, middle, tone)
        else:
            pen.text(label, middle + 20, _in_words(stage), "small")
    return pen.svg("wide" if wide else "narrow")


def _columns(pen: Pen, axis: Axis | None, head: float) -> None:
    """The wide ladder's headings, and the grid of gold (axis None: there is no gold)."""
    pen.text(1016, 13, "time", "small quiet", "end")
    if axis:
        pen.text((axis.start + axis.end) / 2, 13, "gold, 95%", "small quiet", "middle")
        pen.text(760, 13, "gained", "small quiet", "end")
        pen.text(890, 13, "wins over SFT", "small quiet", "end")
        marks = ticks(axis.low, axis.high, 4)
        for mark in marks:
            pen.line(axis(mark), head, axis(mark), pen.height - 8, "grid")
            pen.text(axis(mark), 28, tick_text("gold", mark, marks), "tiny quiet", "middle")


def _trunk(pen: Pen, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From a stage down and round the corner to one that starts from it."""
    (a, top), (e, c) = start, end
    pen.path([(a, top), (a, c - 9)], "trunk")
    pen.add('<path d="M{a} {b}Q{a} {c} {d} {c}L{e} {c}" class="trunk"/>', a=a, b=c - 9, c=c, d=a + 9, e=e)


def _flow(pen: Pen, start: tuple[float, float], end: tuple[float, float], bulge: float) -> None:
    """A dashed arc with an arrow, from a stage to one that reads what it made."""
    (a, b), (e, d) = start, end
    pen.add('<path d="M{a} {b}C{c} {b} {c} {d} {e} {d}" class="flow"/>', a=a + 8, b=b, c=float(bulge), d=d, e=e + 11)
    pen.add('<path d="M{a} {b}l6 -3.5v7z" class="arrow"/>', a=e + 8, b=d)


def _beside(pen: Pen, stage: Stage, axis: Axis, y: float, tone: str) -> None:
    """A rung's figures, in the wide ladder's columns."""
    m = stage.metrics
    _interval(pen, m.get("gold"), axis, y, tone, "gold")
    if "gold" in m:
        pen.text(axis.end + 8, y + 4, value("gold", m["gold"]["mean"]), "small")
    if "gold_gained" in m:
        pen.text(760, y + 4, value("gold_gained", m["gold_gained"]["mean"], 2, True), "number", "end")
    if win := measured(stage, "win_rate_vs_sft"):
        pen.text(890, y + 4, value("win_rate_vs_sft", win["mean"], 0), "number", "end")
    if "held_out_accuracy" in m:
        pen.text(axis.start, y + 4, _accuracy(stage), "small quiet")


def _in_words(stage: Stage) -> str:
    """The same for the narrow ladder, on one line."""
    m, words = stage.metrics, []
    if "gold" in m:
        words.append(f"gold {value('gold', m['gold']['mean'])}")
    if "gold_gained" in m:
        words.append(f"{value('gold_gained', m['gold_gained']['mean'], 2, True)} gained")
    if win := measured(stage, "win_rate_vs_sft"):
        words.append(f"wins {value('win_rate_vs_sft', win['mean'], 0)}")
    if "held_out_accuracy" in m:
        words.append(_accuracy(stage))
    return " \u00b7 ".join(words)


def _accuracy(stage: Stage) -> str:
    name = "expected_accuracy" if "expected_accuracy" in stage.metrics else "held_out_accuracy"
    text = f"accuracy {value(name, stage.metrics[name]['mean'])}"
    return f"{text} of at most {value(name, stage.metrics['ceiling']['mean'])}" if "ceiling" in stage.metrics else text


def _tree(stages: Sequence[Stage]) -> list[tuple[Stage, int]]:
    """Depth first, children in the stages' order; a stage whose parents go in a circle stands alone."""
    known = {s.name for s in stages}
    out: list[tuple[Stage, int]] = []
    seen: set[str] = set()

    def put(stage: Stage, depth: int) -> None:
        if stage.name not in seen:
            seen.add(stage.name)
            out.append((stage, depth))
            for child in stages:
                if child.parent == stage.name:
                    put(child, depth + 1)

    for stage in stages:
        if stage.parent not in known:
            put(stage, 0)
    for stage in stages:
        put(stage, 0)
    return out


def _interval(pen: Pen, m: Metric | None, axis: Axis, y: float, tone: str, name: str) -> None:
    if m is None:
        return
    if m["low"] is not None and m["high"] is not None:
        low, high = (min(max(axis(v), axis.start), axis.end) for v in (m["low"], m["high"]))
        pen.line(low, y, high, y, f"bar {tone}")
    tip = told(name, m) if few(m) else f"{told(name, m)}, n = {m['n']:,}"
    pen.dot(axis(m["mean"]), y, 3.6, f"dot {tone}", tip)


# ---------------------------------------------------------------- intervals


def drawn(run: Ladder, name: str) -> list[Stage]:
    """The stages that have the metric."""
    return [s for s in run.stages if measured(s, name)]


def forest(run: Ladder, name: str, reference: Metric | None) -> Markup:
    """One metric over the stages that have it: points, 95% intervals, figures; SFT's interval as a band down the panel."""
    stages = drawn(run, name)
    metrics = [s.metrics[name] for s in stages]
    row, left, right = 21.0, 92.0, 58.0
    pen = Pen(330, row * len(stages) + 26, f"{name} by stage, with 95% intervals")
    zero = {**NO_CHANGE, "kl": 0.0, "length": 0.0}.get(name)
    low, high = span([v for m in metrics for v in (m["low"], m["mean"], m["high"])], include=[] if zero is None else [zero])
    if value(name, 0.5).endswith("%"):
        low, high = (0.0, 1.0)
    axis = Axis(low, high, left, pen.width - right)
    bottom = row * len(stages) + 4
    if name not in ("gold_gained", "kl", "win_rate_vs_sft") and reference and None not in (reference["low"], reference["high"]):
        a, b = axis(max(low, reference["low"])), axis(min(high, reference["high"]))
        pen.add('<rect x="{x}" y="2" width="{w}" height="{h}" class="band c-sft"/>', x=float(a), w=max(1.0, b - a), h=bottom - 2)
    marks = ticks(low, high, 4)
    for mark in marks:
        pen.line(axis(mark), 2, axis(mark), bottom, "grid strong" if mark and mark == zero else "grid")
        pen.text(axis(mark), bottom + 14, tick_text(name, mark, marks), "tiny quiet", "middle")
    decimals = digits(name, metrics)
    for i, (stage, m) in enumerate(zip(stages, metrics, strict=True)):
        y = row * (i + 0.5) + 3
        pen.text(left - 10, y + 4, fit_text(stage.name, left - 10, 12), "small", "end")
        _interval(pen, m, axis, y, colour(stage, run), name)
        pen.text(pen.width - 2, y + 4, value(name, m["mean"], decimals, name == "gold_gained"), "small number", "end")
    return pen.svg()


# ---------------------------------------------------------------- curves


class Series(NamedTuple):
    """Points of one curve and how it is drawn. crosses: points with intervals (x, y, x low, x high, y low, y high)."""

    label: str
    tone: str
    points: list[tuple[float, float]]
    kind: str = "curve"
    dots: bool = False
    ring: bool = False  # open dots: points that are exact
    crosses: Sequence[tuple[float, float, float | None, float | None, float | None, float | None]] = ()


def chart(
    series: Sequence[Series],
    x_label: str,
    label: str,
    *,
    include_y: Sequence[float] = (),
    include_x: Sequence[float] = (),
    breaks: Sequence[tuple[float, str]] = (),
    size: tuple[float, float] = (400, 250),
) -> Markup:
    """Curves on two axes, each named where it ends."""
    width, height = size
    pen = Pen(width, height, label)
    xs = [x for s in series for x, _ in s.points] + [v for s in series for c in s.crosses for v in (c[0], c[2], c[3]) if v is not None]
    ys = [y for s in series for _, y in s.points] + [v for s in series for c in s.crosses for v in (c[1], c[4], c[5]) if v is not None]
    x_low, x_high = span(xs, 0.03, include_x)
    if include_x and min([*xs, *include_x]) >= 0:
        x_low = -0.02 * x_high
    y_low, y_high = span(ys, 0.07, include_y)
    y_marks = ticks(y_low, y_high, 5)
    y_texts = [tick_text("", m, y_marks) for m in y_marks]
    left = 12 + 6.5 * max(len(t) for t in y_texts)
    room = 10.0  # on the right, for the labels that end there
    for s in series:
        ends_at = [c[0] for c in s.crosses] or [a for a, _ in s.points]
        if s.label and ends_at:
            room = max(room, 7.2 * len(s.label) + 12 - (x_high - ends_at[-1]) / (x_high - x_low) * (width - left))
    x, y = Axis(x_low, x_high, left, width - room), Axis(y_low, y_high, height - 36, 8)
    for mark, text in zip(y_marks, y_texts, strict=True):
        pen.line(left, y(mark), x.end, y(mark), "grid")
        pen.text(left - 6, y(mark) + 3.5, text, "tiny quiet", "end")
    x_marks = ticks(max(x_low, 0) if min(xs, default=0) >= 0 else x_low, x_high, 5)
    for mark in x_marks:
        pen.line(x(mark), y.start, x(mark), y.start + 4, "axis")
        pen.text(x(mark), y.start + 16, tick_text("", mark, x_marks), "tiny quiet", "middle")
    pen.line(left, y.start, x.end, y.start, "axis")
    pen.text((left + x.end) / 2, height - 3, x_label, "tiny quiet", "middle")
    for at, text in breaks:
        pen.line(x(at), y.end, x(at), y.start, "break")
        pen.text(x(at) + 4, y.end + 9, text, "tiny quiet")
    ends: list[tuple[float, float, Series]] = []
    for s in series:
        drawn = [(x(a), y(b)) for a, b in s.points]
        pen.path(drawn if s.kind != "none" else [], f"{s.kind} {s.tone}")
        if s.dots:
            for (a, b), (raw_x, raw_y) in zip(drawn, s.points, strict=True):
                pen.dot(a, b, 2.4, f"dot {s.tone}", f"{s.label} {plain(raw_x, 2)}, {plain(raw_y, 3)}".strip())
        for a, b in drawn if s.ring else []:
            pen.dot(a, b, 2.2, f"open {s.tone}")
        for a, b, al, ah, bl, bh in s.crosses:
            if al is not None and ah is not None:
                pen.line(x(al), y(b), x(ah), y(b), f"whisker {s.tone}")
            if bl is not None and bh is not None:
                pen.line(x(a), y(bl), x(a), y(bh), f"whisker {s.tone}")
            pen.dot(x(a), y(b), 4.2, f"dot {s.tone}", f"{s.label}: {plain(a, 2)}, {plain(b, 3)}")
            drawn.append((x(a), y(b)))
        if s.label and drawn:
            ends.append((*drawn[-1], s))
    for a, b, s in _spread(ends):
        pen.text(a + 8, b + 4, s.label, f"small label {s.tone}")
    return pen.svg()


def _spread(ends: list[tuple[float, float, Series]], gap: float = 14) -> list[tuple[float, float, Series]]:
    """Labels pushed apart where they would lie on each other."""
    placed: list[tuple[float, float, Series]] = []
    for x, y, s in sorted(ends, key=lambda e: e[1]):
        for px, py, ps in placed:
            reach = 7.5 * max(len(s.label), len(ps.label)) + 8
            if abs(px - x) < reach and y - py < gap:
                y = max(y, py + gap)
        placed.append((x, y, s))
    return placed


def smooth(points: Sequence[tuple[float, float]], most: int = 160) -> list[tuple[float, float]]:
    """A running mean over about a thirtieth of the points, at most `most` of them."""
    n = len(points)
    half = max(0, n // 60)
    every = max(1, n // most)
    out: list[tuple[float, float]] = []
    for i in [*range(0, n, every), n - 1] if n else []:
        near = points[max(0, i - half) : i + half + 1]
        if not out or points[i][0] != out[-1][0]:
            out.append((points[i][0], sum(v for _, v in near) / len(near)))
    return out


def thin(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """At most about `most` points, the extremes of each bucket kept."""
    if len(points) <= most:
        return list(points)
    size = -(-2 * len(points) // most)
    out: list[tuple[float, float]] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        out += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return out


def column(rows: Sequence[dict[str, Any]], y: str, x: str = "step") -> list[tuple[float, float]]:
    """Points (x, y) of the rows that have both as finite numbers."""
    found = ((number(r.get(x)), number(r.get(y))) for r in rows)
    return [(a, b) for a, b in found if a is not None and b is not None]


def training(stage: Stage, run: Ladder, name: str, held_out: str | None = None) -> Markup | None:
    """A training metric against the step: faint as measured, strong as a running mean; held-out values as dots. A new phase is marked."""
    tone = colour(stage, run)
    raw = column(stage.rows, name)
    if len(raw) < 2:
        return None
    phases: dict[float, list[dict[str, Any]]] = {}
    for row in stage.rows:
        phases.setdefault(number(row.get("phase")) or 0.0, []).append(row)
    series, breaks = [], []
    for k, rows in enumerate(phases.values()):
        points = column(rows, name)
        if points:
            series += [Series("", tone, thin(points), "raw"), Series("", tone, smooth(points))]
            if k:
                breaks.append((points[0][0], f"phase {k + 1}"))
    looked = column(stage.looks, held_out) if held_out else []
    if looked:
        series.append(Series("", "c-ink", looked, "none", dots=True))
    return chart(series, "optimiser step", f"{name} of {stage.name} during training", breaks=breaks, size=(330, 190))


def against_kl(run: Ladder, name: str) -> Markup | None:
    """Gold or proxy against KL from SFT: along each policy's training (thin), and as evaluated at its end (with intervals)."""
    series = []
    sft = run.role("sft")
    start = sft.metrics.get(name) if sft else None
    for stage in run.stages:
        if stage.role in ("base", "sft", "comparisons", "reward"):
            continue
        tone = colour(stage, run)
        if name == "proxy" and (own := column(stage.rows, "reward", "kl")):
            series.append(Series("", tone, thin(smooth(own), 120), "raw"))
        points = column(stage.looks, name, "kl")
        m, kl = stage.metrics.get(name), stage.metrics.get("kl")
        crosses = [(kl["mean"], m["mean"], kl["low"], kl["high"], m["low"], m["high"])] if m and kl else []
        if points or crosses:
            series.append(Series(fit_text(stage.name, 100, 12), tone, points, dots=True, crosses=crosses))
    if not any(s.label for s in series):
        return None
    if start:
        series.insert(0, Series("sft", "c-sft", [], "none", crosses=[(0.0, start["mean"], None, None, start["low"], start["high"])]))
    return chart(series, "KL from SFT, nats", f"{name} against KL", include_x=[0.0])


def best_of_n(stage: Stage, name: str, run: Ladder) -> Markup | None:
    """What the best of n gives by one rater against its KL from the model, for n = 1, 2, 4, ..., with intervals both ways."""
    points = []
    for row in map(mapped, listed(stage.curve.get("rows"))):
        y, x = metric(row.get(name)), metric(row.get("kl"))
        if x and y:
            points.append((x["mean"], y["mean"], x["low"], x["high"], y["low"], y["high"]))
    if len(points) < 2:
        return None
    series = Series("", colour(stage, run), [p[:2] for p in points], crosses=points)
    return chart([series], "KL from the model, nats", f"{name} of the best of n against its KL", include_x=[0.0], size=(330, 200))


# ---------------------------------------------------------------- the frontier


def frontier(run: Ladder, prompt: str) -> Markup:
    """One enumerable prompt: the exact most gold at each policy's KL (line through ticks), and the policies below it."""
    here = [(s, p) for s in run.policies for p in s.frontier if str(p.get("prompt")) == prompt]
    best = sorted({(p["kl"], g) for _, p in here if (g := number(p.get("frontier_gold"))) is not None})
    start = next((g for _, p in here if (g := number(p.get("reference_gold"))) is not None), None)
    edge = ([(0.0, start)] if start is not None else []) + best
    series = [
        Series("", "c-ink", edge, "edge", ring=True),
        *([Series("sft", "c-sft", [], "none", crosses=[(0.0, start, None, None, None, None)])] if start is not None else []),
    ]
    for stage, p in here:
        if (g := number(p.get("gold"))) is not None:
            bad = (number(p.get("above")) or 0) > 1e-6
            tone = "c-bad" if bad else colour(stage, run)
            point = (p["kl"], g, None, None, None, None)
            series.append(Series(fit_text(stage.name, 100, 12), tone, [], "none", crosses=[point]))
    return chart(series, "exact KL, nats", f"gold and the exact frontier on: {prompt}", include_x=[0.0], size=(330, 200))


# ---------------------------------------------------------------- gold parts


def parts(gold: dict[str, Any], scale: float) -> Markup:
    """The parts of one answer's gold score as small bars around zero."""
    pen = Pen(180, 12.0 * len(PARTS) + 2, "parts of the gold score")
    middle, reach = 104.0, 38.0
    pen.line(middle, 1, middle, pen.height - 1, "axis")
    for i, part in enumerate(PARTS):
        y = 12.0 * i + 7
        x = number(gold.get(part))
        pen.text(54, y + 3.5, part, "tiny quiet", "end")
        if x is not None:
            long = max(-reach, min(reach, reach * x / scale))
            if x:
                pen.add(
                    '<rect x="{x}" y="{y}" width="{w}" height="7" class="{k}"/>',
                    x=middle + min(0.0, long),
                    y=y - 3.5,
                    w=max(0.8, abs(long)),
                    k="plus" if x > 0 else "minus",
                )
            pen.text(178, y + 3.5, value("", x, 2, True), "tiny number quiet", "end")
    return pen.svg("parts")
