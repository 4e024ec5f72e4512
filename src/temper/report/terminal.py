"""What a run did, in the terminal: a table, a paragraph, what was missed, what else to know, and what to do next. Floor 7."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from temper.report.gather import Ladder, Stage, gather
from temper.report.words import FEW, SHARES, clean, few, measured, missed, paragraph, remarks, value

COLUMNS = {  # metric -> the column's head, in the order in which a narrow terminal keeps them
    "answers": "answers",
    "correct": "facts",
    "gold": "gold",
    "win_rate_vs_sft": "wins",
    "harmful": "harm",
    "kl": "KL",
    "gold_gained": "gained",
    "correct_entity": "new",
    "over_refusal": "refuses",
}


def summary(folder: str | Path, console: Console | None = None) -> None:
    """Print stages and their main figures, what happened, and the next commands. Raises UserError where there is no run."""
    run = gather(folder)
    console = console or Console(highlight=False)
    console.print(_table(run, console))
    for line in _notes(run):
        console.print(Text(clean(line), style="dim"))
    console.print()
    console.print(Text(" ".join(paragraph(run))))
    for head, lines in (("Not as expected", missed(run)), ("Worth knowing", remarks(run)), ("Not in this run", run.missing)):
        _list(console, head, lines)
    console.print()
    for line in next_steps(run):
        console.print(Text(line), soft_wrap=True)


def next_steps(run: Ladder) -> list[str]:
    """What to do with the run now, a line each."""
    asked = [s for s in run.stages if (s.folder / "model").is_dir() and s.role not in ("reward", "comparisons")]
    lines = []
    if (run.folder / "report.html").exists():
        lines.append(f"report   {run.folder / 'report.html'}   (figures in report.json)")
    if len(asked) > 1:
        lines.append(f"compare  temper compare {run.folder}")
    if asked:
        lines.append(f"chat     temper chat {asked[-1].folder}")
    return lines


def _list(console: Console, head: str, lines: Sequence[str]) -> None:
    if lines:
        table = Table.grid(padding=(0, 1, 0, 0))
        for line in lines:
            table.add_row("-", Text(clean(line)))
        console.print(Text(f"\n{head}", style="bold"))
        console.print(table)


def _table(run: Ladder, console: Console) -> Table:
    """As many of the columns as stand side by side unbroken."""
    shown = [name for name in COLUMNS if any(measured(s, name) for s in run.stages)]
    room = console.options.update(width=1000)
    tables = (_columns(run, shown[:k], console.width >= 100) for k in range(len(shown), -1, -1))
    return next((t for t in tables if console.measure(t, options=room).maximum <= console.width), _columns(run, [], False))


def _columns(run: Ladder, shown: Sequence[str], wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2 if wide else 1, 0, 0))
    table.add_column("stage", overflow="fold", max_width=20)
    for name in shown:
        table.add_column(COLUMNS[name], justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for stage in run.stages:
        table.add_row(Text(clean(stage.name)), *[_cell(stage, name) for name in shown], _time(stage))
    return table


def _cell(stage: Stage, name: str) -> Text:
    m = measured(stage, name)
    if m is None:
        return Text("")
    text = value(name, m["mean"], 0 if name in SHARES else 1 if name == "kl" else 2, name == "gold_gained")
    return Text(text + ("*" if few(m) else ""))


def _time(stage: Stage) -> Text:
    if stage.seconds is None:
        return Text("")
    over = bool(stage.budget) and stage.seconds > (stage.budget or 0)
    text = f"{stage.seconds:.0f} of {stage.budget:.0f}" if stage.budget else f"{stage.seconds:.0f}"
    return Text(text, style="red" if over else "")


def _notes(run: Ladder) -> list[str]:
    """What has no column: stages that are not done, what was up to date, the reward model, what the mark means."""
    out = [f"{s.name}: {s.status}" for s in run.stages if s.status not in ("done", "skipped", "unknown")]
    same = [s.name for s in run.stages if s.status == "skipped"]
    if same:
        out.append(f"up to date before: {', '.join(same)}")
    for s in run.stages:
        name = "expected_accuracy" if "expected_accuracy" in s.metrics else "held_out_accuracy"
        if name in s.metrics:
            most = f" of at most {value('ceiling', s.metrics['ceiling']['mean'])}" if "ceiling" in s.metrics else ""
            out.append(f"{s.name}: accuracy {value(name, s.metrics[name]['mean'])}{most}")
    if any(few(m) for s in run.stages for name in COLUMNS if (m := measured(s, name))):
        out.append(f"*: of fewer than {FEW} prompts, so a rough figure")
    return out
