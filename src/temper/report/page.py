"""report.html: one self-contained page, readable without scripts, on a phone, in the dark and on paper. Floor 7.

Everything is put together with markupsafe: what comes from a run is escaped because only templates in this file are markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup, escape

from temper.report import figures
from temper.report.gather import Ladder, Metric, Stage, listed, mapped, number
from temper.report.words import (
    BETTER,
    FEW,
    GROUPS,
    LABELS,
    MEANING,
    WHAT,
    amount,
    between,
    clean,
    digits,
    duration,
    expectations,
    few,
    measured,
    missed,
    paragraph,
    percent,
    plain,
    remarks,
    sureness,
    value,
)

PANELS = (
    *("gold", "win_rate_vs_sft", "gold_gained", "answers", "correct", "correct_phrasing", "correct_entity", "arithmetic", "honest"),
    *("harmful", "over_refusal", "sycophancy", "length", "diversity", "kl", "proxy"),
)
MATTER = (  # settings shown on a card, where the stage has them; the rest is folded
    *(
        "vocab",
        "width",
        "layers",
        "lr",
        "schedule",
        "batch",
        "epochs",
        "sl_lr",
        "sl_epochs",
        "rollouts",
        "prompts_per_step",
        "samples_per_prompt",
    ),
    *(
        "epochs_per_batch",
        "minibatches",
        "beta",
        "kl_target",
        "clip",
        "centring",
        "revisions",
        "judged_by",
        "panel",
        "max_new",
        "temperature",
    ),
)
BOLD = ("The base model", "Fine-tuning", "The reward model", "PPO", "DPO", "Constitutional AI")  # where a rung is first named
NOTES = {
    "ladder": "Each rung hangs below the one it starts from; dashed arcs show what else it read.",
    "gold": " Points are mean gold scores of sampled answers, bars their 95% intervals; \u201cgained\u201d is against the stage that"
    " it started from, paired by prompt.",
    "table": "Below each figure its 95% interval and the number of answers or prompts behind it. Point at a name, or tap it, for its"
    f" meaning. Where fewer than {FEW} are behind it, its n stands out: such an interval is wide, and its figure a rough one.",
    "intervals": "Points with 95% intervals; percentages are drawn from 0 to 100. The band down a panel is SFT's interval: a stage whose"
    " own bar stays clear of it differs from SFT, one that touches it has shown nothing.",
    "kl": "Small points are looks during training at a few held-out prompts; the large point is the finished model on all of them, with 95%"
    " intervals both ways. Faint lines are PPO's own rollouts. Where the proxy goes on rising and gold does not, the reward model is"
    " being exploited.",
    "best-of-n": "Points are n = 1, 2, 4, ...: the mean over prompts of the best of n, estimated without bias from all samples, with 95%"
    " intervals. One rater chooses; the other only reports. Where the first goes on rising and the second does not, the choice exploits its"
    " rater. The KL counts answers that come again, so it lies below log n \u2212 (n \u2212 1) / n.",
    "frontier": "On these prompts answers can be listed, so KL and gold are sums over the list, not samples, as if a policy gave no"
    " other answer. The dashed line joins exact points of the most gold that any policy can reach at a KL (the reference tilted by the"
    " gold score); no point can lie above it. Below each prompt stands how much of a policy\u2019s probability lies on the listed answers:"
    " where that is little, the policy mostly says something else, and its point says little of it.",
    "prompts": "in their fixed order, none picked: one answer each, sampled{at}. Above each answer its gold score, below it the parts."
    " The base model is given the bare question, the others their chat template.",
    "reward": "The reward model's figures are counted on pairs kept out of training. The pairs of one prompt share its answers, so their"
    " intervals are clustered by prompt: Wilson's for the accuracy, Student's t for what is a mean of the raters' probabilities. The gap"
    " to the ceiling is paired: both are taken of the same pairs.",
    "same": "With the same seed, thread count and machine the figures come out the same, timings apart.",
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"  # nothing is ever fetched or run


def html(template: str, **values: Any) -> Markup:
    """A template of this file, filled; what is not Markup already is cleaned and escaped."""
    return Markup(template).format(**{k: v if isinstance(v, Markup) else clean(v) for k, v in values.items()})


def join(parts: Iterable[Markup | None]) -> Markup:
    return Markup("").join(p for p in parts if p)


def page(run: Ladder, machine: dict[str, Any]) -> str:
    """The whole document."""
    sections = [
        ("ladder", "The ladder", _ladder(run)),
        ("expected", "What was expected", _expected(run)),
        ("figures", "All figures", _table(run)),
        ("intervals", "The figures, drawn", _intervals(run)),
        ("training", "Training", _training(run)),
        ("kl", "What the KL bought", _kl(run)),
        ("best-of-n", "Best of n", _best_of_n(run)),
        ("frontier", "The exact frontier", _frontier(run)),
        ("stages", "The stages", _cards(run)),
        ("answers", "The fixed prompts, side by side", _prompts(run)),
        ("made", "How every number was made", _made(run, machine)),
    ]
    head = html(
        '<p class="facts">{facts}</p>\n<p class="lede">{lede}</p>\n{lists}',
        facts=_facts(run),
        lede=_lede(" ".join(paragraph(run))),
        lists=join(
            (
                _list("missed", "Not as expected", missed(run)),
                _list("remarks", "Worth knowing", remarks(run)),
                _list("missing", "Not in this run, so not in this report", run.missing),
            )
        ),
    )
    foot = html(
        "Written by <code>temper report</code> from the files of {folder}. The figures are in <code>report.json</code>;\n"
        "this page needs no network and runs no script.",
        folder=run.folder.resolve().name,
    )
    return document("report of a run", f"{run.name}: {_what(run)}", head, sections, foot)


def document(kicker: str, title: str, head: Markup, sections: Sequence[tuple[str, str, Markup | None]], foot: Markup) -> str:
    """A self-contained page: (key, name, body) of its sections, those without a body left out."""
    shown = [(key, name, body) for key, name, body in sections if body]
    return html(
        """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="temper">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
<p class="kicker">Temper \u00b7 {kicker}</p>
<h1>{title}</h1>
{head}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{sections}
</main>
<footer>{foot}</footer>
</body>
</html>
""",
        policy=POLICY,
        kicker=kicker,
        title=title,
        css=Markup(files("temper.report").joinpath("style.css").read_text(encoding="utf-8")),
        head=head,
        links=join(html('<a href="#{k}">{n}</a>', k=k, n=n) for k, n, _ in shown),
        sections=join(html('<section id="{k}"><h2>{n}</h2>\n{b}</section>\n', k=k, n=n, b=b) for k, n, b in shown),
        foot=foot,
    )


def _what(run: Ladder) -> str:
    """The page's title, after the run's name."""
    if len(run.stages) == 1:
        return WHAT.get(run.stages[0].method, run.stages[0].method or "one stage")
    return "from a base model to an assistant" if run.role("base") and run.role("sft") else f"a run of {len(run.stages)} stages"


def _lede(text: str) -> Markup:
    """Sentences with their rungs in bold and their intervals set back, so that they read as such."""
    marked = str(_set_back(text))
    for name in BOLD:
        marked = marked.replace(name, f"<b>{name}</b>", 1)
    return Markup(marked)


def _set_back(text: str) -> Markup:
    return Markup(re.sub(r"\(([^()<>]{1,40} to [^()<>]{1,40})\)", r'<span class="ci">(\1)</span>', str(escape(clean(text)))))


def _list(kind: str, head: str, lines: Sequence[str]) -> Markup | None:
    """A short list under the paragraph."""
    if not lines:
        return None
    items = join(html("<li>{t}</li>", t=_set_back(line)) for line in lines)
    return html('<div class="points {k}"><b>{h}</b><ul>{i}</ul></div>\n', k=kind, h=head, i=items)


def _facts(run: Ladder) -> Markup:
    done = sum(s.status in ("done", "skipped") for s in run.stages)
    facts = [f"{done} of {len(run.stages)} stages done" if done < len(run.stages) else f"{done} stage{'s' if done != 1 else ''}"]
    if run.elapsed is not None:
        facts.append(f"{duration(run.elapsed)} in all")
    if run.peak_mb:
        facts.append(f"{amount(run.peak_mb)} MB at most")
    if run.cores:
        facts.append(f"{run.cores} core{'s' if run.cores != 1 else ''}")
    if run.seed is not None:
        facts.append(f"seed {run.seed}")
    versions = next((s.versions for s in run.stages if s.versions), {})
    facts += [f"{k} {versions[k]}" for k in ("temper-lm", "torch", "transformers") if k in versions]
    return join(html("<span>{t}</span>", t=t) for t in facts)


def scroll(kind: str, head: Markup, rows: Markup) -> Markup:
    """A table that scrolls in a box of its own where the page is narrow."""
    template = '<div class="scroll" tabindex="0"><table class="{k}"><thead>{h}</thead><tbody>{r}</tbody></table></div>'
    return html(template, k=kind, h=head, r=rows)


def _swatch(stage: Stage, run: Ladder) -> Markup:
    return html('<span class="swatch {c}"></span>', c=figures.colour(stage, run))


# ---------------------------------------------------------------- figures and tables


def _ladder(run: Ladder) -> Markup | None:
    if len(run.stages) < 2:
        return None
    note = NOTES["ladder"] + (NOTES["gold"] if any("gold" in s.metrics for s in run.stages) else "")
    return html('<figure>{a}{b}</figure>\n<p class="note">{n}</p>', a=figures.ladder(run, True), b=figures.ladder(run, False), n=note)


def _expected(run: Ladder) -> Markup | None:
    found = expectations(run)
    if not found:
        return None
    marks = {True: ("yes", "\u2713 met"), False: ("no", "\u2717 missed"), None: ("open", "? not measured")}
    rows = join(
        html(
            '<tr><td class="mark {k}">{mark}</td><td>{stage}</td><td>{what}</td><td>{wanted}</td><td>{found}</td></tr>\n',
            stage=e.stage,
            what=e.what,
            wanted=e.wanted,
            found=e.found,
            k=marks[e.met][0],
            mark=marks[e.met][1],
        )
        for e in found
    )
    head = "<tr><th></th><th>stage</th><th>what</th><th>wanted</th><th>found</th></tr>"
    return scroll("checks", Markup(head), rows)


def _term(name: str) -> Markup:
    """A metric's name, its meaning on hover and on tap."""
    if name not in MEANING:
        return html("{n}", n=LABELS.get(name, name))
    better = {1: " More is better.", -1: " Less is better.", 0: ""}[BETTER.get(name, 0)]
    text = f"{MEANING[name]}.{better}"
    return html(
        '<details class="term"><summary title="{t}">{n}</summary><p>{t} <code>{k}</code></p></details>',
        t=text[:1].upper() + text[1:],
        n=LABELS.get(name, name),
        k=name,
    )


def _cell(name: str, m: Metric | None, decimals: int) -> Markup:
    if m is None:
        return Markup('<td class="none">\u2013</td>')
    signed = name == "gold_gained"
    n = f"n = {plain(m['n'], 0)}" if m["n"] else "n not known"
    return html(
        '<td><b>{v}</b><small>{i}</small><small class="{k}">{n}</small></td>',
        k="few" if few(m) else "",
        v=value(name, m["mean"], decimals, signed),
        i=between(name, m, decimals, signed),
        n=n,
    )


def _table(run: Ladder) -> Markup | None:
    stages = [s for s in run.stages if s.metrics]
    if not stages:
        return None
    known = {n for group in GROUPS.values() for n in group}
    groups = {**GROUPS, "Others": tuple(sorted({n for s in stages for n in s.metrics} - known))}
    rows = []
    for group, members in groups.items():
        here = [n for n in members if any(measured(s, n) for s in stages)]
        if here:
            rows.append(html('<tr class="group"><th colspan="{c}" scope="colgroup">{g}</th></tr>\n', c=len(stages) + 1, g=group))
        for name in here:
            found = [measured(s, name) for s in stages]
            decimals = digits(name, [m for m in found if m])
            cells = join(_cell(name, m, decimals) for m in found)
            rows.append(html('<tr><th scope="row">{t}</th>{c}</tr>\n', t=_term(name), c=cells))
    head = join(html('<th scope="col">{s}{n}</th>', s=_swatch(s, run), n=s.name) for s in stages)
    return scroll("metrics", html("<tr><th></th>{h}</tr>", h=head), join(rows)) + html('<p class="note">{n}</p>', n=NOTES["table"])


def _caption(run: Ladder, name: str) -> Markup:
    better = {1: ", more is better", -1: ", less is better", 0: ""}[BETTER.get(name, 0)]
    ns = sorted({m["n"] for s in figures.drawn(run, name) if few(m := s.metrics[name])})
    n = html('<span class="few">, n = {n}</span>', n=" to ".join(map(str, ns[:1] + ns[1:][-1:]))) if ns else Markup("")
    return html("<figcaption><b>{t}</b><span>{b}</span>{n}</figcaption>", t=LABELS.get(name, name), b=better, n=n)


def _intervals(run: Ladder) -> Markup | None:
    sft = run.role("sft")
    panels = [
        html("<figure>{c}{f}</figure>\n", c=_caption(run, n), f=figures.forest(run, n, sft.metrics.get(n) if sft else None))
        for n in PANELS
        if figures.drawn(run, n)
    ]
    if not panels:
        return None
    return html('<p class="note">{n}</p><div class="panels">{p}</div>', n=NOTES["intervals"], p=join(panels))


def _training(run: Ladder) -> Markup | None:
    panels = []
    for stage in run.stages:
        wanted: list[tuple[str, str | None, str]] = [("loss", "held_out_loss", "loss")]
        if stage.role == "reward":
            wanted.append(("accuracy", None, "accuracy on training pairs"))
        if stage.role == "ppo" or any("reward" in r for r in stage.rows[:3]):
            wanted += [("reward", "proxy", "reward while sampling"), ("kl", "kl", "KL while sampling, nats")]
        for name, held_out, text in wanted:
            figure = figures.training(stage, run, name, held_out)
            if figure:
                looked = held_out and any(held_out in look for look in stage.looks)
                extra = f", {'held-out records' if held_out == 'held_out_loss' else 'held-out prompts'} as dots" if looked else ""
                panels.append(
                    html(
                        "<figure><figcaption>{s}<b>{n}</b> <span>{t}{e}</span></figcaption>{f}</figure>\n",
                        s=_swatch(stage, run),
                        n=stage.name,
                        t=text,
                        e=extra,
                        f=figure,
                    )
                )
    return html('<div class="panels">{p}</div>', p=join(panels)) if panels else None


def _kl(run: Ladder) -> Markup | None:
    panels = []
    for name, text in (("gold", "gold, what it is really worth"), ("proxy", "proxy, what the reward model thinks")):
        figure = figures.against_kl(run, name)
        if figure:
            panels.append(html("<figure><figcaption><b>{t}</b></figcaption>{f}</figure>\n", t=text, f=figure))
    if not panels:
        return None
    return html('<div class="panels large">{p}</div><p class="note">{n}</p>', p=join(panels), n=NOTES["kl"])


def _best_of_n(run: Ladder) -> Markup | None:
    panels = []
    for stage in run.stages:
        raters = mapped(stage.curve.get("raters"))
        for name, does in (("reward", "chooses"), ("report", "reports")):
            if figure := figures.best_of_n(stage, name, run):
                text = f"{raters.get(name) or name}, which {does}"
                panels.append(
                    html(
                        "<figure><figcaption>{s}<b>{n}</b> <span>{t}</span></figcaption>{f}</figure>\n",
                        s=_swatch(stage, run),
                        n=stage.name,
                        t=text,
                        f=figure,
                    )
                )
    return html('<div class="panels">{p}</div><p class="note">{n}</p>', p=join(panels), n=NOTES["best-of-n"]) if panels else None


def _frontier(run: Ladder) -> Markup | None:
    prompts = list(dict.fromkeys(str(p.get("prompt")) for s in run.policies for p in s.frontier))
    if not prompts:
        return None
    panels, rows = [], []
    for prompt in prompts:
        here = [(s, p) for s in run.policies for p in s.frontier if str(p.get("prompt")) == prompt]
        n = number(here[0][1].get("answers"))
        on_them = ", ".join(f"{s.name} {_mass(p, 0)}" for s, p in here)
        panels.append(
            html(
                "<figure><figcaption>{p}<br><span>{n} answers listed; on them: {m}</span></figcaption>{f}</figure>\n",
                p=prompt,
                n=amount(n),
                m=on_them,
                f=figures.frontier(run, prompt),
            )
        )
        for stage, p in here:
            above = number(p.get("above")) or 0.0
            cells = [
                _mass(p, 1),
                value("kl", number(p.get("kl")), 3),
                value("gold", number(p.get("gold")), 3),
                value("gold", number(p.get("frontier_gold")), 3),
                value("gold", above, 3, True),
            ]
            rows.append(
                html(
                    "<tr><td>{p}</td><td>{s}</td>{c}</tr>\n",
                    p=figures.fit_text(prompt, 420, 13),
                    s=stage.name,
                    c=join(html("<td>{x}</td>", x=c) for c in cells),
                )
            )
    head = Markup(
        "<tr><th>prompt</th><th>stage</th><th>mass on listed answers</th><th>KL</th><th>gold</th><th>frontier</th><th>above it</th></tr>"
    )
    table = html('<details class="more"><summary class="note">The same as a table</summary>{t}</details>', t=scroll("", head, join(rows)))
    return html('<p class="note">{n}</p><div class="panels">{p}</div>{t}', n=NOTES["frontier"], p=join(panels), t=table)


def _mass(point: dict[str, Any], decimals: int) -> str:
    found = number(point.get("mass"))
    return "?" if found is None else percent(found, decimals)


# ---------------------------------------------------------------- stage cards


def flat(x: Any, counts: bool = False) -> str:
    """A value of a card or a setting on one line. counts: whole numbers are counts, so 6,000 and not 6000."""
    if isinstance(x, dict):
        return ", ".join(f"{k.replace('_', ' ')} {flat(v, counts)}" for k, v in x.items() if v not in (None, [], {}))
    if isinstance(x, list):
        return ", ".join(flat(v, counts) for v in x[:12]) + (f" and {len(x) - 12} more" if len(x) > 12 else "")
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, int):
        return amount(x) if counts else str(x)
    if isinstance(x, float):
        return f"{x:.6g}".replace("-", "\u2212")
    return "none" if x is None else str(x)


def _cards(run: Ladder) -> Markup:
    return html('<div class="cards">{c}</div>', c=join(_card(s, run) for s in run.stages))


def _card(stage: Stage, run: Ladder) -> Markup:
    s, lines = stage.summary, []

    def add(name: str, text: Any, kind: str = "") -> None:
        lines.append(html('<dt>{n}</dt><dd class="{k}">{t}</dd>', n=name, t=text, k=kind))

    if stage.status not in ("done", "unknown"):
        again = " (nothing it depends on had changed)" if stage.status == "skipped" else ""
        add("status", stage.status + again + (f": {clean(stage.error).splitlines()[-1]}" if stage.error else ""), "" if again else "over")
    if stage.parent:
        others = [i for i in stage.inputs if i != stage.parent]
        add("starts from", stage.parent + (f"; also reads {', '.join(others)}" if others else ""))
    for name, text in stage.named.items():
        if name != "model" or not stage.parent:
            add(name.replace("_", " "), text)
    for name, found in stage.card.items():
        if found not in (None, "", [], {}):
            add(name.replace("_", " "), flat(found, counts=True))
    if stage.labels:
        add("AI labels", sureness(stage))
    if number(s.get("steps")):
        add("steps", amount(number(s["steps"])))
    if number(s.get("tokens")):
        learned = f", {amount(number(s['tokens_learned']))} learned" if number(s.get("tokens_learned")) else ""
        add("tokens", amount(number(s["tokens"])) + learned)
    if stage.seconds is not None:
        over = stage.budget is not None and stage.seconds > stage.budget
        budget = f" of a budget of {duration(stage.budget)}" if stage.budget else ""
        add("time", f"{duration(stage.seconds)}{budget}{', over it' if over else ''}", "over" if over else "")
    if stage.evaluation_seconds is not None:
        add("evaluation", duration(stage.evaluation_seconds))
    if number(s.get("tokens_per_second")):
        add("pace", f"{amount(number(s['tokens_per_second']))} tokens per second")
    if number(s.get("peak_mb")):
        add("memory", f"{amount(number(s['peak_mb']))} MB at most")
    if stage.threads is not None or stage.seed is not None:
        add("threads, seed", f"{stage.threads if stage.threads is not None else '?'}, {stage.seed if stage.seed is not None else '?'}")
    for name in ("skipped", "resumed"):
        if number(s.get(name)):
            add({"skipped": "updates left out", "resumed": "resumed"}[name], f"{amount(number(s[name]))} times")
    matter = {k: stage.settings[k] for k in MATTER if k in stage.settings and stage.settings[k] is not None}
    if matter:
        add("settings", ", ".join(f"{k} {flat(v)}" for k, v in matter.items()))
    command = html('<pre tabindex="0">{c}</pre>', c=stage.command) if stage.command else None
    rest = join(html("<tr><td>{k}</td><td>{v}</td></tr>", k=k, v=flat(v)) for k, v in sorted(stage.settings.items()))
    folded = html("<details><summary>all settings</summary><table>{r}</table></details>", r=rest) if rest else None
    return html(
        '<article class="card {c}"><h3>{n}<small>{w}</small></h3><dl>{l}</dl>{cmd}{f}</article>\n',
        c=figures.colour(stage, run),
        n=stage.name,
        w=WHAT.get(stage.method, stage.method),
        l=join(lines),
        cmd=command or Markup(""),
        f=folded or Markup(""),
    )


# ---------------------------------------------------------------- the fixed prompts


def together(stages: Sequence[Stage]) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """The fixed prompts in order: (a row that holds the messages, {stage: its row})."""
    found: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for stage in stages:
        for row in stage.side_by_side:
            key = json.dumps(row.get("messages"), sort_keys=True, default=str)
            found.setdefault(key, (row, {}))[1][stage.name] = row
    return list(found.values())


def _prompts(run: Ladder) -> Markup | None:
    stages = [s for s in run.stages if s.side_by_side]
    rows = together(stages)
    if not rows:
        return None
    sizes = [
        abs(x) for _, by in rows for r in by.values() for p in figures.PARTS if (x := number(mapped(r.get("gold")).get(p))) is not None
    ]
    scale = max([*sizes, 1e-9])
    out = [
        html(
            '<div class="prompt"><h3>{i} of {n} \u00b7 {k}</h3>{t}<div class="answers">{a}</div></div>\n',
            i=i,
            n=len(rows),
            k=str(row.get("kind") or "prompt").replace("_", " "),
            t=_turns(row),
            a=join(_answer(by.get(s.name), s, run, scale) for s in stages),
        )
        for i, (row, by) in enumerate(rows, 1)
    ]
    note = f"All {len(rows)}, {NOTES['prompts'].format(at=_at(run))}"
    return html('<p class="note">{n}</p>', n=note) + join(out)


def _at(run: Ladder) -> str:
    """How hot the evaluated answers were sampled, where that is known."""
    return "" if run.temperature is None else f" at temperature {run.temperature:g}"


def _turns(row: dict[str, Any]) -> Markup:
    turns = [mapped(m) for m in listed(row.get("messages"))]
    only = len(turns) == 1
    return join(
        html(
            '<p class="turn {k}">{r}{t}</p>',
            k="assistant" if m.get("role") == "assistant" else "",
            r=Markup("") if only else html("<i>{r}</i>", r=m.get("role", "?")),
            t=m.get("content", ""),
        )
        for m in turns
    )


def _answer(row: dict[str, Any] | None, stage: Stage, run: Ladder, scale: float) -> Markup:
    if row is None:
        body, total, bars = html('<p class="empty">not asked</p>'), "", Markup("")
    else:
        text, gold = str(row.get("answer") or ""), mapped(row.get("gold"))
        body = html("<p>{t}</p>", t=text) if text.strip() else html('<p class="empty">(nothing)</p>')
        total = value("gold", number(gold.get("total")), 2, True) if gold else ""
        bars = figures.parts(gold, scale) if gold else Markup("")
    return html(
        '<div class="answer {c}"><h4>{n}<span>{g}</span></h4>{b}{p}</div>',
        c=figures.colour(stage, run),
        n=stage.name,
        g=total,
        b=body,
        p=bars,
    )


# ---------------------------------------------------------------- how it was made


def _made(run: Ladder, machine: dict[str, Any]) -> Markup:
    how = run.evaluation
    parts: list[Markup] = []
    if run.evaluated:
        prompts = f"{amount(number(how['prompts_each']))} " if number(how.get("prompts_each")) else ""
        samples = f", {flat(how['samples'])} to each prompt," if number(how.get("samples")) else ""
        seed = f" The random numbers of sampling follow from seed {flat(how['eval_seed'])}." if "eval_seed" in how else ""
        text = (
            f"Every stage answered the same {prompts}held-out prompts of the embedded world. Facts, sums and \u201cI do not know\u201d are"
            f" read from the greedy answer; everything else from answers{samples} sampled{_at(run)}.{seed} The gold score is exact:"
            " a program that knows the world reads the answer. Intervals are 95%: for means Student's t, for shares Wilson's, over"
            " sampled answers clustered by prompt, or by craft where they speak of harm and of safe prompts that look like it, for the"
            " crafts are few; gold gained and wins are paired by prompt. In the paragraph at the top a change"
            " is claimed only where a paired interval excludes no change, or two stages' intervals do not touch. Intervals speak of"
            " the prompts and samples, not of other seeds: run again with another --seed for those."
        )
        parts.append(html("<p>{t}</p>", t=text))
    if any(s.role == "reward" and s.metrics for s in run.stages):
        parts.append(html("<p>{t}</p>", t=NOTES["reward"]))
    rows = []
    for name in dict.fromkeys(n for group in GROUPS.values() for n in group):
        having = [s for s in run.stages if name in s.metrics]
        if having:
            ns = sorted({s.metrics[name]["n"] for s in having})
            n = plain(ns[0], 0) if len(ns) == 1 else f"{plain(ns[0], 0)} to {plain(ns[-1], 0)}"
            rows.append(html("<tr><td><code>{k}</code></td><td>{t}</td><td>{n}</td></tr>\n", k=name, t=MEANING.get(name, ""), n=n))
    if rows:
        head = Markup("<tr><th>name in report.json</th><th>what it is</th><th>n</th></tr>")
        parts.append(scroll("made", head, join(rows)))
    commands = [s.command for s in run.stages if s.command]
    if run.command:
        commands.insert(0, run.command)
    if commands:
        lines = dict.fromkeys(clean(c) for c in commands)
        parts.append(html('<h3>To make it again</h3><pre tabindex="0">{c}</pre>', c="\n".join(lines)))
    versions = next((s.versions for s in run.stages if s.versions), {})
    facts = [*(f"{k} {v}" for k, v in versions.items()), *({f"code {s.code}" for s in run.stages if s.code})]
    if facts:
        parts.append(html('<h3>Made with</h3><p class="note">{t}</p>', t=", ".join(facts)))
    where = [
        str(machine.get("processor", "")),
        str(machine.get("system", "")),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{machine['memory_gb']} GB of memory" if machine.get("memory_gb") else "",
    ]
    parts.append(html('<p class="note">This page was written on: {t}. {s}</p>', t=", ".join(w for w in where if w), s=NOTES["same"]))
    return join(parts)
