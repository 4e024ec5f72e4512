"""The page that `temper data inspect --html` writes: self-contained, without scripts; whatever the data holds is escaped. Floor 7."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from temper.data import look
from temper.report import inspect as view
from temper.report.figures import Axis, Pen, ticks
from temper.report.page import document, html, join
from temper.report.words import amount, plain

if TYPE_CHECKING:
    from temper.report.inspect import Found

TONES = ("c-sft", "c-ppo", "c-dpo", "c-reward")
KEY = (
    '<p class="key"><span class="l">learned</span> <span>context</span> <span class="s">&lt;special&gt;</span>'
    ' <span class="x">cut</span> {boundaries}</p>'
)


def page(found: Found) -> str:
    """The whole document."""
    name = Path(found.settings.file).name or found.settings.file
    facts = [f"{amount(found.stats.rows)} rows", found.report.source, found.spelled]
    head = html('<p class="facts">{f}</p>', f=join(html("<span>{t}</span>", t=text) for text in facts if text))
    sections = [
        ("holds", "What it holds", _facts(found)),
        ("pictures", "Distributions", _pictures(found)),
        ("rows", "Rows as they will be trained", _rows(found)),
    ]
    foot = html("Written by <code>temper data inspect</code>; this page needs no network and runs no script.")
    return document("data", name, head, sections, foot)


def _facts(found: Found) -> Markup:
    rows = join(html("<tr><td>{k}</td><td>{v}</td></tr>\n", k=what, v=text) for what, text in view.facts(found))
    return html('<table class="facts-table"><tbody>{r}</tbody></table>', r=rows)


def _pictures(found: Found) -> Markup | None:
    panels = [
        html(
            "<figure><figcaption><b>{t}</b> <span>{u}</span></figcaption>{f}</figure>\n",
            t=title,
            u=unit,
            f=bars(title, groups),
        )
        for title, unit, groups in view.pictures(found)
    ]
    return html('<div class="panels">{p}</div>', p=join(panels)) if panels else None


def bars(title: str, groups: dict[str, list[int]]) -> Markup:
    """A histogram; of several groups the bars stand side by side."""
    bins = look.histogram(list(groups.values()))
    pen = Pen(330, 190 + (18 if any(groups) else 0), title)
    most = max(max(b.counts) for b in bins)
    marks = [m for m in ticks(0, most, 4) if m == int(m)]
    left = 12 + 6.5 * max(len(plain(m, 0)) for m in marks)
    y = Axis(0, most, 160, 8)
    for mark in marks:
        pen.line(left, y(mark), pen.width, y(mark), "grid")
        pen.text(left - 6, y(mark) + 3.5, plain(mark, 0), "tiny quiet", "end")
    slot = (pen.width - left) / len(bins)
    width = 0.84 * slot / len(groups)
    every = max(1, -(-len(bins) * 7 * max(len(plain(b.low, 0)) for b in bins) // int(pen.width - left)))
    for k, b in enumerate(bins):
        x = left + (k + 0.08) * slot
        for g, (label, n) in enumerate(zip(groups, b.counts, strict=True)):
            if n:
                span = plain(b.low, 0) if b.low == b.high else f"{plain(b.low, 0)} to {plain(b.high, 0)}"
                pen.add(
                    '<rect x="{x}" y="{y}" width="{w}" height="{h}" class="fill {c}"><title>{t}</title></rect>',
                    x=x + g * width,
                    y=min(y(n), y.start - 1),
                    w=max(0.8, width - 0.5),
                    h=max(1.0, y.start - y(n)),
                    c=TONES[g % len(TONES)],
                    t=f"{label + ' ' if label else ''}{span}: {plain(n, 0)}",
                )
        if k % every == 0:
            last = "\u2265 " if k == len(bins) - 1 and b.high - b.low > bins[0].high - bins[0].low else ""
            at = left + (k + (0.5 if b.low == b.high else 0)) * slot
            pen.text(at, y.start + 15, last + plain(b.low, 0), "tiny quiet", "middle" if k else "start")
    pen.line(left, y.start, pen.width, y.start, "axis")
    at = left
    for g, label in enumerate(groups if any(groups) else ()):
        pen.add('<rect x="{x}" y="186" width="9" height="9" class="fill {c}"/>', x=at, c=TONES[g % len(TONES)])
        pen.text(at + 14, 195, label, "tiny")
        at += 34 + 6 * len(label)
    return pen.svg()


def _rows(found: Found) -> Markup | None:
    if not found.shown:
        return None
    boundaries = "" if found.bytes_only else "Shades alternate from token to token."
    return html(KEY, boundaries=boundaries) + join(_row(found, row) for row in found.shown)


def _row(found: Found, row: look.Row) -> Markup:
    unit = "bytes" if found.bytes_only else "tokens"
    head = f"{view._line_of(found, row.at)} \u00b7 {row.tokens:,} {unit} \u00b7 {row.learned:,} learned" + (
        f" \u00b7 {row.cut:,} cut" if row.cut else ""
    )
    parts = join(
        html('{t}<p class="tokens">{p}</p>', t=html("<h4>{t}</h4>", t=part.title) if part.title else Markup(""), p=_tokens(found, part))
        for part in row.parts
    )
    trouble = html('<p class="trouble">{t}</p>', t=row.trouble) if row.trouble else Markup("")
    return html('<div class="row"><h3>{h}</h3>{t}{p}</div>\n', h=head, t=trouble, p=parts)


def _tokens(found: Found, part: look.Part) -> Markup:
    out: list[Markup] = []
    odd = False
    for state, run in view.runs(part):
        for piece in _shortened(run, found.bytes_only):
            if isinstance(piece, str):
                out.append(html('<span class="more">{t}</span>', t=piece))
                continue
            odd = not odd
            kind = " ".join(
                ["l" if state == "learned" else "t", *(["odd"] if odd and not found.bytes_only else []), *(["s"] if piece.special else [])]
                + (["x"] if state == "cut" else [])
            )
            out.append(html('<span class="{k}">{t}</span>', k=kind, t=piece.text.replace("\n", "\u21b5\n")))
    return join(out)


def _shortened(run: list[look.Piece], merge: bool) -> list[look.Piece | str]:
    """The pieces of a stretch, its middle left out where it is long; merge: pieces that look alike as one."""
    total = sum(len(p.text) for p in run)
    kept: list[look.Piece | str] = []
    at = left = 0
    for piece in run:
        inside = total <= view.CHARACTERS or at < view.CHARACTERS // 2 or at >= total - view.CHARACTERS // 2
        at += len(piece.text)
        if not inside:
            left += len(piece.text)
            continue
        if left:
            kept.append(f" \u2026 {left:,} more characters \u2026 ")
            left = 0
        last = kept[-1] if kept else None
        if merge and isinstance(last, look.Piece) and not last.special and not piece.special:
            kept[-1] = last._replace(text=last.text + piece.text)
        else:
            kept.append(piece)
    return kept
