"""The advice for people: in the terminal, and as one page without scripts or network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from temper.advise.advice import number, told
from temper.advise.rivals import MEASURES
from temper.report.page import document, html, join, scroll
from temper.report.words import clean, names, plain

MARKS = {"measured": "bold green", "reckoned": "green", "answered": "cyan", "literature": "yellow"}
KINDS = {
    "measured": "measured here",
    "reckoned": "arithmetic on what was measured",
    "answered": "what you said, or what was assumed for you",
    "literature": "from the literature: others' models and data",
}


def shown(found: Mapping[str, Any]) -> list[str]:
    """The measures that at least one rival has."""
    return [m for m in MEASURES if any(m in r["measures"] for r in found["rivals"])]


def assumed(found: Mapping[str, Any]) -> str:
    """What nobody said."""
    open_ = [f"{name} {_value(a['value'])}" for name, a in found["answers"].items() if a["from"] == "assumed"]
    return f"Assumed, as nothing was said: {names(open_)}." if open_ else ""


def _value(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def tell(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the rivals, then each piece of advice with its reasons."""
    console = console or Console(highlight=False)
    if found["rivals"]:
        rows = found["rows"]
        console.print(Text(f"On {rows['held_out']} held-out rows, with 95% intervals", style="bold"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("rival", no_wrap=True)
        for measure in shown(found):
            table.add_column(measure, justify="right")
        for r in found["rivals"]:
            cells = [_stacked(m, r["measures"][m]) if m in r["measures"] else Text("") for m in shown(found)]
            table.add_row(Text(r["name"]), *cells)
        console.print(table)
        for measure in shown(found):
            console.print(Text(f"  {measure}: {MEASURES[measure]}", style="dim"))
        console.print()
    for item in found["advice"]:
        console.print(Text.assemble((f"{item['topic']}: ", "bold"), (clean(item["choice"]), "bold green")))
        if item["command"]:
            console.print(Text(f"  {clean(item['command'])}"), soft_wrap=True)
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column()
        for r in item["reasons"]:
            limit = f"\nlimits: {clean(r['limit'])}" if r["limit"] else ""
            source = f" [{clean(r['source'])}]" if r["source"] else ""
            table.add_row(Text(f"  {r['kind']}", style=MARKS[r["kind"]]), Text.assemble(clean(r["text"]), (source + limit, "dim")))
        console.print(table)
        console.print()
    for line in [*(f"Not measured: {line}." for line in found["not_measured"]), assumed(found)]:
        if line:
            console.print(Text(clean(line), style="dim"))


def _stacked(measure: str, m: Mapping[str, Any]) -> Text:
    return Text.assemble(number(measure, m["mean"]), (f"\n{number(measure, m['low'])}\u2013{number(measure, m['high'])}", "dim"))


# ---------------------------------------------------------------- the page


def page(found: Mapping[str, Any]) -> str:
    """The whole document."""
    facts = [found["model"] or "no model given", found["data"] or "no data given", found["machine"]["name"]]
    head = html('<p class="facts">{f}</p>', f=join(html("<span>{t}</span>", t=text) for text in facts))
    sections = [
        ("advice", "Advice", join(_advice(item) for item in found["advice"])),
        ("rivals", "What was measured", _rivals(found)),
        ("answers", "Answers to held-out rows", _samples(found)),
        ("said", "What this rests on", _said(found)),
    ]
    foot = html("Written by <code>temper advise</code>; this page needs no network and runs no script.")
    return document("advice", found["advice"][0]["choice"], head, sections, foot)


def _advice(item: Mapping[str, Any]) -> Markup:
    groups = join(
        html(
            "<h4>{k}</h4><ul>{r}</ul>",
            k=KINDS[kind].capitalize(),
            r=join(_reason(r) for r in item["reasons"] if r["kind"] == kind),
        )
        for kind in KINDS
        if any(r["kind"] == kind for r in item["reasons"])
    )
    line = html("<pre>{c}</pre>", c=item["command"]) if item["command"] else Markup("")
    return html('<div class="row"><h3>{t}</h3><p><b>{c}</b></p>{l}{g}</div>', t=item["topic"], c=item["choice"], l=line, g=groups)


def _reason(r: Mapping[str, str]) -> Markup:
    source = Markup("")
    if r["source"].startswith("arXiv:"):
        source = html(' <a href="https://arxiv.org/abs/{i}">{s}</a>', i=r["source"].removeprefix("arXiv:"), s=r["source"])
    elif r["source"]:
        source = html(" <small>({s})</small>", s=r["source"])
    limit = html("<br><small>Limits: {l}</small>", l=r["limit"]) if r["limit"] else Markup("")
    return html("<li>{t}{s}{l}</li>", t=r["text"], s=source, l=limit)


def _rivals(found: Mapping[str, Any]) -> Markup | None:
    if not found["rivals"]:
        return None
    rows, measures = found["rows"], shown(found)
    head = html("<tr><th>rival</th>{m}<th>trained with</th></tr>", m=join(html("<th>{m}</th>", m=m) for m in measures))
    body = join(
        html(
            "<tr><td>{n}</td>{m}<td>{t}</td></tr>\n",
            n=r["name"],
            m=join(html("<td>{v}</td>", v=told(m, r["measures"][m]) if m in r["measures"] else "") for m in measures),
            t=f"rate {r['trained']['rate']:g}, {r['trained']['epochs']:g} passes, {r['trained']['rows']} rows" if r["trained"] else "",
        )
        for r in found["rivals"]
    )
    note = join(html("<li>{m}: {w}</li>", m=m, w=MEASURES[m]) for m in measures)
    words = f"{rows['held_out']} rows kept out, {rows['learned_from']} to learn from, {rows['chosen_on']} to choose rate and passes by;"
    words += f" greedy answers of at most {rows['max_new']} tokens. Means with 95% intervals."
    return html('<p class="note">{w}</p>{t}<ul>{n}</ul>', w=words, t=scroll("", head, body), n=note)


def _samples(found: Mapping[str, Any]) -> Markup | None:
    return join(
        html(
            '<div class="prompt"><p class="turn">{a}</p><p class="turn assistant"><i>in the data</i>{w}</p>{r}</div>',
            a=sample["asked"],
            w=sample["wanted"],
            r=join(html('<p class="turn assistant"><i>{k}</i>{t}</p>', k=k, t=t or "(nothing)") for k, t in sample["answers"].items()),
        )
        for sample in found["samples"]
    )


def _said(found: Mapping[str, Any]) -> Markup:
    rows = [(name, _value(a["value"]), a["from"]) for name, a in found["answers"].items()]
    free = found["machine"]["free_bytes"]
    rows.append(("memory", f"{plain(free / 1e9, 1)} GB free" if free else "not known", "measured"))
    rows += [("rows", found["rows"]["source"], "the data")] if found["rows"] else []
    rows += [("not measured", line, "") for line in found["not_measured"]]
    body = join(html("<tr><td>{n}</td><td>{v}</td><td>{f}</td></tr>\n", n=n, v=v, f=f) for n, v, f in rows)
    return html('<table class="facts-table"><tbody>{b}</tbody></table>', b=body)
