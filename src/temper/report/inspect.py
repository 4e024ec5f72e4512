"""`temper data inspect FILE`: rows as they will be trained, and what the file holds; in the terminal and as one page. Floor 7."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from temper.config import Settings, UserError, opt, parse
from temper.data import look, sources
from temper.data.template import attach_default_template
from temper.data.trees import TooLong, limit_of, where
from temper.report.chat import model_folder
from temper.report.words import amount, clean, names, percent, plain

EXAMPLES = """
  temper data inspect chats.jsonl --model runs/harbour/sft
  temper data inspect hh-harmless.jsonl.gz --model Qwen/Qwen2.5-0.5B-Instruct --max-length 512 --html hh.html
  temper data inspect alpaca.json --rows 2
"""
BYTES = "bytes in Temper's default template (give --model for a model's own tokens and template)"
LINES, CHARACTERS = 8, 4000  # of a stretch of a row that are shown, in the terminal and on the page
LISTED = 5
MARK = {"context": "", "learned": "green", "cut": "red strike"}


class Inspect(Settings):
    """Show rows as they will be trained: what is learned and what is context, the special tokens, what is cut; and what the file holds."""

    file: str = opt(..., "a file, a folder, `-`, a hub name or world:NAME", positional=True)
    model: str | None = opt(None, "whose tokenizer and template to use: a stage, a folder, a hub name; without one bytes are shown")
    max_length: int | None = opt(None, "tokens a row may have; none is the model's window", ge=8)
    too_long: TooLong = opt("cut-prompt", "rows that are longer: what training would do with them")
    learn: Literal["all", "last"] = opt("all", "learn every assistant turn of a conversation, or only the last")
    rows: int = opt(5, "rows to show", ge=0)
    sample: int = opt(20_000, "rows whose tokens are counted, evenly spaced; 0 is all", ge=0)
    html: str | None = opt(None, "also write a page: OUT.html")
    json_: bool = opt(False, "print JSON for programs")


@dataclass
class Found:
    """What the command shows. spelled: whose tokens these are."""

    settings: Inspect
    report: sources.Report
    spelled: str
    bytes_only: bool
    shown: list[look.Row]
    stats: look.Stats


def tokenizer_for(model: str | None) -> tuple[Any, int | None, str]:
    """(tokenizer, the model's window, how to call it). None: 256 bytes and the special tokens of Temper's default template."""
    from temper.models.load import load_tokenizer
    from temper.models.tokenizer import SPECIAL, train_tokenizer

    tokenizer: Any
    if model is None:
        tokenizer = train_tokenizer([], 256 + len(SPECIAL))
        attach_default_template(tokenizer)
        return tokenizer, None, BYTES
    folder = model_folder(model, needs="tokenizer_config.json")
    tokenizer = load_tokenizer(folder)
    own = "its own template"
    if attach_default_template(tokenizer):
        own = "Temper's default template, which fine-tuning attaches: it has none"
    return tokenizer, _window(folder), f"tokens of {model}, {own}"


def _window(folder: str) -> int | None:
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    except (OSError, ValueError):  # a tokenizer alone
        return None


def inspect(s: Inspect) -> Found:
    """Raises UserError where the file, the model or the limit cannot be used."""
    tokenizer, window, spelled = tokenizer_for(s.model)
    limit, _ = limit_of(window, s.max_length)
    report = sources.Report(s.file)
    records = list(sources.stream(s.file, "any", report, skip_bad=True))
    if not records:
        raise UserError(f"{report.summary()}; nothing is left to show")
    shown = [look.show(tokenizer, r, where(r, i), limit, s.too_long, s.learn) for i, r in enumerate(records[: s.rows])]
    stats = look.statistics(tokenizer, records, limit, s.too_long, s.learn, s.sample or None)
    return Found(s, report, spelled, s.model is None, shown, stats)


# ---------------------------------------------------------------- what the figures say, for terminal and page


def facts(found: Found) -> Iterator[tuple[str, str]]:
    """(what, in words), a line each."""
    r, s = found.report, found.stats
    unit = "bytes" if found.bytes_only else "tokens"
    yield "format", f"{r.source} ({r.why})" if r.why else r.source
    kinds = names([f"{amount(n)} {_KINDS[k][n != 1]}" for k, n in s.kinds.most_common()])
    yield "rows", kinds + (f"; {amount(len(r.skipped))} of {amount(r.rows)} rows cannot be used" if r.skipped else "")
    yield "counted in", found.spelled
    if s.tokenised < s.rows:
        yield "tokens of", f"{amount(s.tokenised)} rows, evenly spaced (--sample 0 counts all)"
    if s.roles:
        yield "turns", f"{_spread(s.turns)} a row; {', '.join(f'{amount(n)} {role}' for role, n in s.roles.most_common())}"
    if s.tokens:
        yield "length", f"{_spread(s.longest)} {unit}; the longest is {_line_of(found, s.longest_at)}"
    if any(s.learned):
        shares = [a / b for a, b in zip(s.learned, s.tokens, strict=True)]
        by_row = f"by row {percent(min(shares))} to {percent(max(shares))}"
        yield "learned", f"{percent(sum(s.learned) / sum(s.tokens))} of {amount(sum(s.tokens))} {unit}; {by_row}"
    for label, lengths in s.answers.items():
        if len(s.answers) > 1:
            yield label, f"{amount(len(lengths))} answers, {_spread(lengths)} {unit}"
    if s.kinds["pair"] and s.shared:
        n = len(s.answers.get("chosen", []))
        yield "chosen longer", f"{percent(s.chosen_longer / n)} of {amount(n)} pairs, equal lengths counted half"
    if s.shared:
        saved = 1 - sum(s.tokens) / sum(s.unshared)
        yield "shared prompt", f"whole in {amount(s.whole_prompts)} of {amount(len(s.shared))} rows; {_spread(s.shared)} {unit}"
        yield "with sharing", f"{amount(sum(s.tokens))} {unit}, without {amount(sum(s.unshared))}: {percent(saved)} saved"
    if s.limit and not s.kinds["text"]:
        fates = f": {_list(found, s.over)}" if s.over else ""
        yield "too long", f"{amount(len(s.over))} of {amount(s.tokenised)} rows for {amount(s.limit)} {unit}{fates}"
    elif s.limit:
        yield "windows", f"documents are cut into windows of {amount(s.limit)} {unit}"
    if s.refused:
        yield "refused", f"{amount(len(s.refused))} rows by the template: {_list(found, s.refused)}"
    if r.skipped:
        yield "unusable", f"{amount(len(r.skipped))} rows: {_list(found, r.skipped)}"
    same = [(at, f"repeats {_line_of(found, first)}") for at, first in s.duplicates]
    yield "duplicates", f"{amount(len(same))} rows{f': {_list(found, same)}' if same else ''}"
    if s.same_prompt:
        yield "prompts again", f"{amount(s.same_prompt)} rows ask what an earlier row asks"
    if s.languages:
        total = s.languages.total()
        yield "languages", f"{', '.join(f'{name} {percent(n / total)}' for name, n in s.languages.most_common(5))} (of {total} rows)"


_KINDS = {
    "text": ("document", "documents"),
    "chat": ("conversation", "conversations"),
    "prompt": ("prompt", "prompts"),
    "pair": ("pair of answers", "pairs of answers"),
    "ranked": ("ranking", "rankings"),
    "rated": ("rated answer", "rated answers"),
    "steps": ("solution in steps", "solutions in steps"),
    "judgement": ("judgement", "judgements"),
}


def _spread(values: Sequence[int]) -> str:
    if len(set(values)) == 1:
        return plain(values[0], 0)
    middle, high = look.quantile(values, 0.5), look.quantile(values, 0.95)
    return f"median {plain(middle, 0)}, 95% up to {plain(high, 0)}, {plain(min(values), 0)} to {plain(max(values), 0)}"


def _short(found: Found, at: str) -> str:
    return at.removeprefix(f"{found.settings.file}:") if at.startswith(f"{found.settings.file}:") and ":" in at else at


def _list(found: Found, items: Sequence[tuple[str, str]]) -> str:
    first = "; ".join(f"{_line_of(found, at)}: {why}" for at, why in items[:LISTED])
    return f"{first}; ..." if len(items) > LISTED else first


def _line_of(found: Found, at: str) -> str:
    short = _short(found, at)
    return f"line {short}" if short.isdigit() else short


def pictures(found: Found) -> Iterator[tuple[str, str, dict[str, list[int]]]]:
    """(title, unit, {label: values}) of the histograms."""
    s, unit = found.stats, "bytes" if found.bytes_only else "tokens"
    if s.longest:
        yield "Length of a row", unit, {"": s.longest}
    if len(set(s.turns)) > 1:
        yield "Turns in a row", "turns", {"": s.turns}
    if any(s.learned) and not s.kinds["text"]:
        share = [round(100 * a / b) for a, b in zip(s.learned, s.tokens, strict=True)]
        yield f"Learned share of a row's {unit}", "%", {"": share}
    if s.answers:
        groups = dict(sorted(s.answers.items(), key=lambda item: -len(item[1]))[:4]) if len(s.answers) > 4 else s.answers
        title = "Length of what is learned" if list(groups) == ["learned"] else "Length of answers by label"
        yield title, unit, {"" if label == "learned" else label: values for label, values in groups.items()}


# ---------------------------------------------------------------- the terminal


def runs(part: look.Part) -> Iterator[tuple[str, list[look.Piece]]]:
    """Stretches of a part that are treated alike: context, learned or cut."""
    state = ""
    run: list[look.Piece] = []
    for piece in part.pieces:
        now = "cut" if piece.cut else "learned" if piece.learned else "context"
        if run and now != state:
            yield state, run
            run = []
        state = now
        run.append(piece)
    if run:
        yield state, run


def _stretch(run: list[look.Piece], state: str, width: int) -> Text:
    text = Text()
    for piece in run:
        style = "cyan" if piece.special else MARK[state]
        text.append(clean(piece.text).replace("\n", "\u21b5\n"), style=style)
    lines = text.wrap(Console(width=width), width)
    if len(lines) > LINES:
        half, left = LINES // 2, sum(len(line) for line in lines[LINES // 2 : -(LINES // 2)])
        return Text("\n").join([*lines[:half], Text(f"... {left:,} more characters ...", style="dim"), *lines[-half:]])
    return Text("\n").join(lines)


def show_row(console: Console, found: Found, row: look.Row) -> None:
    unit = "bytes" if found.bytes_only else "tokens"
    counts = f"{row.tokens:,} {unit}, {row.learned:,} learned" + (f", {row.cut:,} cut" if row.cut else "")
    console.print(Text(f"{_line_of(found, row.at)}: {counts}", style="bold"))
    if row.trouble:
        console.print(Text(clean(row.trouble), style="red"))
    for part in row.parts:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True, width=7)
        table.add_column(overflow="fold")
        if part.title:
            console.print(Text(part.title, style="dim bold"))
        for state, run in runs(part):
            table.add_row(Text(state, style=MARK[state] or "dim"), _stretch(run, state, max(20, console.width - 9)))
        console.print(table)
    console.print()


def show_histogram(console: Console, title: str, unit: str, groups: dict[str, list[int]]) -> None:
    bins = look.histogram(list(groups.values()))
    if not bins:
        return
    console.print(Text(title, style="bold"), Text(f"({unit})", style="dim"))
    most = max(max(b.counts) for b in bins)
    labels = [plain(b.low, 0) if b.low == b.high else f"{plain(b.low, 0)}\u2013{plain(b.high, 0)}" for b in bins]
    left, right = max(map(len, labels)), len(plain(most, 0))
    wide = max(map(len, groups))
    room = max(10, min(48, console.width - left - right - wide - 4))
    for label, b in zip(labels, bins, strict=True):
        for k, (name, n) in enumerate(zip(groups, b.counts, strict=True)):
            bar = "\u2588" * round(room * n / most) or ("\u258f" if n else "")
            front = f"{label if k == 0 else '':>{left}} " + (f"{name:<{wide}} " if wide else "")
            colour = ("green", "yellow", "blue", "magenta")[k % 4]
            console.print(Text(front, style="dim") + Text(bar, style=colour) + Text(f" {plain(n, 0)}" if n else ""))
    console.print()


def show(found: Found, console: Console) -> None:
    """Rows, facts and histograms; without colours it says the same."""
    for row in found.shown:
        show_row(console, found, row)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for what, text in facts(found):
        table.add_row(Text(what), Text(clean(text)))
    console.print(table)
    console.print()
    for title, unit, groups in pictures(found):
        show_histogram(console, title, unit, groups)


def as_json(found: Found) -> dict[str, Any]:
    s = found.stats
    numbers = {k: v for k, v in vars(s).items() if isinstance(v, int | str | dict)}
    return {
        "file": found.settings.file,
        "format": found.report.source,
        "why": found.report.why,
        "counted_in": found.spelled,
        "limit": s.limit,
        **numbers,
        "answers": {label: _numbers(v) for label, v in s.answers.items()},
        **{name: _numbers(getattr(s, name)) for name in ("turns", "tokens", "unshared", "longest", "learned", "shared")},
        **{name: [list(x) for x in getattr(s, name)] for name in ("refused", "over", "duplicates")},
        "skipped": [list(x) for x in found.report.skipped],
        "chosen_longer": s.chosen_longer / len(s.answers["chosen"]) if s.answers.get("chosen") else None,
        "shown": [{**vars(row), "parts": [_listed(part) for part in row.parts]} for row in found.shown],
    }


def _listed(part: look.Part) -> dict[str, Any]:
    return {"title": part.title, "pieces": [piece._asdict() for piece in part.pieces]}


def _numbers(values: Sequence[int]) -> dict[str, float | int]:
    if not values:
        return {"n": 0, "sum": 0}
    quantiles = {f"p{round(100 * q)}": look.quantile(values, q) for q in (0.05, 0.5, 0.95)}
    return {"n": len(values), "sum": sum(values), "mean": sum(values) / len(values), "min": min(values), **quantiles, "max": max(values)}


def write_page(found: Found, path: str | Path) -> None:
    """The page, atomically. Raises UserError where it cannot be written."""
    from temper.records import atomic
    from temper.report.inspect_page import page

    with atomic(path) as file:
        file.write(page(found).encode("utf-8"))


def main(argv: list[str]) -> int:
    s = parse(Inspect, argv, "temper data inspect", EXAMPLES)
    found = inspect(s)
    if s.html:
        write_page(found, s.html)
    if s.json_:
        print(json.dumps(as_json(found), ensure_ascii=False))
        return 0
    console = Console(highlight=False)
    show(found, console)
    if s.html:
        console.print(Text(f"page     {s.html}"), soft_wrap=True)
    return 0
