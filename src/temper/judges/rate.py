"""`temper rate --reward SPEC --data FILE`: what a reward says of answers that are there, before a model is trained on it. Floor 4."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from temper.config import Settings, UserError, opt, parse
from temper.data import sources
from temper.data.trees import where
from temper.judges.rating import REWARDS, Answer, Mixture, Ratings, least_and_most, rater
from temper.judges.rating import parse as parse_reward
from temper.records import Chat, Message, Pair, Prompt, Ranked, Rated, Record, Steps

EXAMPLES = """
  temper rate --reward maths --data gsm8k.jsonl
  temper rate --reward '0.7*runs/reward + 0.3*format:words=..80' --data pairs.jsonl
  temper rate --reward python:my.py:score --data chats.jsonl --show 10
  temper rate --reward 'gold + 0*runs/reward' --data 'world:demonstrations?n=500' --json
"""
SHOWN = 600  # characters of a prompt or answer that are shown


class Rate(Settings):
    """Rate the answers in a file: the mean of each part of a reward, what it could not rate and why, the best and the worst."""

    reward: str = opt(..., f"what rates: {REWARDS}")
    data: str = opt(..., "conversations, pairs, rankings or rated answers: a file, a folder, a hub name or world:NAME")
    rows: int = opt(1000, "rows to rate, evenly spaced; 0 is all", ge=0)
    show: int = opt(3, "of the most and of the least rewarded answers to show", ge=0)
    skip_bad: bool = opt(False, "leave out rows that cannot be read, and count them")
    seed: int = opt(0, "of raters that draw", ge=0)
    device: str = opt("cpu", "where reward models compute")
    precision: Literal["auto", "float32", "bfloat16"] = opt("auto", "of reward models")
    json_: bool = opt(False, "print JSON for programs")


class Found(NamedTuple):
    """An answer of the data. label: what the row calls it; order: its place among the row's answers, the best 0, where the row says so."""

    row: int
    at: str
    label: str
    answer: Answer
    order: int | None = None


def answers_of(record: Record, index: int) -> list[Found]:
    """The answers of a row. Raises UserError where it holds none."""
    at = where(record, index)

    def one(messages: list[Message], text: str, label: str, order: int | None = None) -> Found:
        return Found(index, at, label, Answer(Prompt(messages=messages, meta=record.meta), (), (), text, True), order)

    match record:
        case Chat():
            last = max(i for i, m in enumerate(record.messages) if m.role == "assistant")
            if last and record.messages[last - 1].role in ("user", "tool"):
                return [one(record.messages[:last], record.messages[last].content, "answer")]
        case Pair():
            order = (0, 1) if record.soft > 0.5 else (1, 0) if record.soft < 0.5 else (None, None)
            return [one(record.prompt, record.chosen, "chosen", order[0]), one(record.prompt, record.rejected, "rejected", order[1])]
        case Ranked():
            places = [record.scores.index(s) for s in record.scores] if record.scores else range(len(record.answers))
            return [
                one(record.prompt, text, f"answer {i}", place)
                for i, (text, place) in enumerate(zip(record.answers, places, strict=True), 1)
            ]
        case Rated():
            return [one(record.prompt, record.answer, f"rated {record.rating:g}")]
        case Steps():
            return [one(record.prompt, "\n".join(record.steps), "solution")]
    raise UserError(f"{at}: holds no answer to rate; give conversations, pairs, rankings, rated answers or solutions")


def agreement(found: Sequence[Found], scores: Sequence[float | None]) -> float | None:
    """Share of the rows' own comparisons in which the better answer has the higher score; equal scores count half. None without any."""
    rows: dict[int, list[tuple[int, float]]] = {}
    for one, score in zip(found, scores, strict=True):
        if one.order is not None and score is not None:
            rows.setdefault(one.row, []).append((one.order, score))
    pairs = [(a, b) for row in rows.values() for (p, a), (q, b) in combinations(sorted(row), 2) if p < q]
    return fmean((a > b) + (a == b) / 2 for a, b in pairs) if pairs else None


def figures(found: Sequence[Found], scores: Sequence[float | None]) -> dict[str, Any]:
    """n, mean and deviation over the answers that have a score, and `agrees` where the rows compare their answers."""
    there = [s for s in scores if s is not None]
    out: dict[str, Any] = {"n": len(there), "mean": fmean(there) if there else None, "std": pstdev(there) if there else None}
    agrees = agreement(found, scores)
    return out if agrees is None else {**out, "agrees": agrees}


def rate(s: Rate) -> tuple[sources.Report, Mixture, list[Found], Ratings]:
    """Raises UserError where the reward, the file or a row of it cannot be used."""
    parse_reward(s.reward)
    records, report = sources.read(s.data, "any", skip_bad=s.skip_bad)
    step = max(1, len(records) / s.rows) if s.rows else 1
    chosen = [int(k * step) for k in range(min(s.rows or len(records), len(records)))]
    found = [one for i in chosen for one in answers_of(records[i], i)]
    reward = rater(s.reward, seed=s.seed, device=s.device, precision=s.precision)
    return report, reward, found, reward.ratings([one.answer for one in found])


def _row(one: Found, i: int, ratings: Ratings) -> dict[str, Any]:
    return {
        "at": one.at,
        "label": one.label,
        "reward": ratings.scores[i],
        "parts": {name: scores[i] for name, scores in ratings.parts.items()},
        "prompt": one.answer.prompt.messages[-1].content,
        "answer": one.answer.text,
    }


def _shown(text: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return line if len(line) <= SHOWN else line[: SHOWN // 2] + " ... " + line[-SHOWN // 2 :]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _tell(s: Rate, summary: dict[str, Any], ends: dict[str, list[dict[str, Any]]]) -> None:
    console = Console(highlight=False)
    compares = "agrees" in summary["total"]
    table = Table("part", *("mean", "deviation", "rated"), *(["agrees with the rows"] if compares else []), "not rated", box=None)
    for name, row in [*summary["parts"].items(), ("total", summary["total"])]:
        agrees = [f"{row['agrees']:.1%}" if row.get("agrees") is not None else "-"] if compares else []
        failed = f"{row['failed']}: {_shown(row['why'])}" if row.get("failed") else str(summary["answers"] - row["n"] or "")
        table.add_row(Text(name), _number(row["mean"]), _number(row["std"]), str(row["n"]), *agrees, Text(failed))
    console.print(table)
    for title, rows in ends.items():
        for row in rows:
            parts = ", ".join(f"{name} {_number(score)}" for name, score in row["parts"].items()) if len(row["parts"]) > 1 else ""
            head = f"\n{title} {_number(row['reward'])}  {row['at']} ({row['label']}){'  ' + parts if parts else ''}"
            console.print(Text(head, style="bold"), soft_wrap=True)
            console.print(Text(f"  asked: {_shown(row['prompt'])}", style="dim"), soft_wrap=True)
            console.print(Text(f"  {_shown(row['answer'])}"), soft_wrap=True)


def read(argv: list[str]) -> Rate:
    """What is asked for. Raises UserError for wrong flags and for a reward that cannot be read."""
    s = parse(Rate, argv, "temper rate", EXAMPLES)
    parse_reward(s.reward)
    return s


def main(argv: list[str]) -> int:
    """1 where no answer could be rated."""
    s = read(argv)
    report, _, found, ratings = rate(s)
    parts = {name: figures(found, scores) for name, scores in ratings.parts.items()}
    for name, failure in ratings.failures.items():
        parts[name] |= {"failed": failure.n, "why": failure.first}
    summary: dict[str, Any] = {
        "reward": s.reward,
        "source": report.summary(),
        "answers": len(found),
        "parts": parts,
        "total": figures(found, ratings.scores),
    }
    least, most = least_and_most(ratings.scores, s.show) if s.show else ([], [])
    ends = {"most": [_row(found[i], i, ratings) for i in most], "least": [_row(found[i], i, ratings) for i in least]}
    if s.json_:
        print(json.dumps({**summary, **ends}))
    else:
        _tell(s, summary, ends)
    return 0 if summary["total"]["n"] else 1
