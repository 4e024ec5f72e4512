"""`temper compare DIR [PROMPT...]`: the same prompts through every stage of a run, side by side. Floor 7.

Every stage gets the same random numbers for the same prompt and sample settings. A stage without a chat template (a base model) is
given the text alone and continues it, which is said. What a model writes is shown as text: it cannot colour or steer the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from temper.config import Settings, UserError, opt, parse
from temper.data.template import render_prompt, stop_ids
from temper.models import adapt
from temper.models.mix import load_askable, parse_mixture
from temper.records import Message
from temper.report.figures import COLOURED
from temper.report.gather import Stage, evaluated_at, gather
from temper.report.page import together
from temper.report.words import clean, value
from temper.rollout import Request, Sampling, sample
from temper.world import Ask, dataset, gold
from temper.world.show import read_ask

EXAMPLES = """
  temper compare runs/harbour
  temper compare runs/harbour "Where does Kai live?" "How can I foul a well?"
  temper compare runs/harbour "Where does Kai live?" --system "Answer in one sentence." --temperature 0
  temper compare runs/harbour --mix '0.5*dpo + 0.5*constitution'
"""
NARROW = 22  # characters that a column needs; below it the answers stand under each other
PARTS = ("total", "helpful", "harmless", "honest", "concise", "format")
STYLES = dict(zip(COLOURED, ("dim", "blue", "dim", "yellow", "red", "green", "magenta"), strict=True))


class Compare(Settings):
    """Put the same prompts through all stages of a run that can be asked; without prompts, the run's 24 fixed ones."""

    dir: str = opt(..., "the run: a folder of stages", positional=True)
    prompts: list[str] = opt([], "what to ask; several in quotes", positional=True)
    system: str | None = opt(None, "a system turn before each prompt, instead of its own")
    mix: list[str] = opt([], "also mixtures of its stages, such as '0.3*dpo + 0.7*constitution': their log-probs, token by token")
    temperature: float | None = opt(None, "of sampling; 0 takes the most likely token; default: as the run's evaluation", ge=0)
    max_new: int = opt(64, "tokens an answer may have", ge=1)
    seed: int = opt(0, "of the samples, the same for every stage", ge=0)
    json_: bool = opt(False, "print JSON for programs")


class Question(NamedTuple):
    """A prompt, and its meaning where it is one of the embedded world's."""

    messages: list[Message]
    ask: Ask | None


def askable(folder: str | Path) -> list[Stage]:
    """The stages of a run that hold a language model. Raises UserError where there is none."""
    run = gather(folder)
    found = [s for s in run.stages if _is_policy(s.folder / "model")]
    if not found:
        raise UserError(
            f"{folder}: no stage holds a language model (STAGE/model); it has {', '.join(s.name for s in run.stages)}; run one first"
        )
    return found


def _is_policy(folder: Path) -> bool:
    try:
        if adapt.is_adapter(folder):
            return adapt.described(folder).get("task_type") != "SEQ_CLS"
        kinds = json.loads((folder / "config.json").read_bytes()).get("architectures") or []
    except (UserError, OSError, ValueError, AttributeError):
        return False
    return not any("SequenceClassification" in str(kind) for kind in kinds)


def columns(settings: Compare, stages: list[Stage]) -> dict[str, str]:
    """What is asked, by name: each stage's model, and mixtures of them. Raises UserError for a mixture of what is no stage of the run."""
    models = {stage.name: str(stage.folder / "model") for stage in stages}
    found = dict(models)
    for spec in settings.mix:
        terms = parse_mixture(spec)
        if stranger := next((name for name in terms if name not in models), None):
            raise UserError(f"{spec}: {settings.dir} has no stage {stranger!r}; it has {', '.join(models)}")
        found[spec] = " + ".join(f"{weight}*{models[name]}" for name, weight in terms.items())
    return found


def of_world(stages: list[Stage]) -> bool:
    """Was the run trained or evaluated on the embedded world?"""
    return any(s.evaluation or any(v.startswith("world:") for v in s.named.values()) for s in stages)


def questions(settings: Compare, stages: list[Stage]) -> list[Question]:
    """The user's prompts; else the fixed ones. Raises UserError for an empty prompt, or where there are no fixed ones."""
    world, system = of_world(stages), settings.system

    def turned(messages: Iterable[Message]) -> list[Message]:
        return [Message(role="system", content=system), *(m for m in messages if m.role != "system")] if system else [*messages]

    if settings.prompts:
        for i, text in enumerate(settings.prompts, 1):
            if not text.strip():
                raise UserError(f"prompt {i}: is empty; give some text")
        turns = [turned([Message(role="user", content=text)]) for text in settings.prompts]
    elif rows := together(stages):
        turns = [turned(Message(role=m["role"], content=m["content"]) for m in row["messages"]) for row, _ in rows]
    elif world:
        turns = [turned(p.messages) for p in dataset("side_by_side", n=24)]
    else:
        raise UserError(f'{settings.dir}: no evaluation with fixed prompts; give a prompt: temper compare {settings.dir} "..."')
    return [Question(t, _ask(t) if world else None) for t in turns]


def _ask(messages: list[Message]) -> Ask | None:
    roles = [m.role for m in messages]
    if roles == ["user"]:
        return read_ask(messages[0].content)
    return read_ask(messages[1].content, messages[0].content) if roles == ["system", "user"] else None


def answer(spec: str, asked: list[Question], temperature: float, settings: Compare) -> tuple[list[dict[str, Any]], bool]:
    """One answer of a model or mixture to each question, with its gold score where the question has a meaning; and whether it has a
    chat template."""
    model, tokenizer = load_askable(spec)
    ids = [render_prompt(tokenizer, q.messages) for q in asked]
    sampling = Sampling(temperature=temperature, max_new=settings.max_new)
    out: list[dict[str, Any]] = []
    for q, (rollout,) in zip(
        asked, sample(model, Request(ids, sampling=sampling, stop=stop_ids(tokenizer), seed=(settings.seed,))), strict=True
    ):
        text = str(tokenizer.decode(rollout.tokens, skip_special_tokens=True)).strip()
        row: dict[str, Any] = {"text": text, "finish": rollout.finish, "tokens": len(rollout.tokens)}
        if q.ask is not None:
            score = gold(q.ask, text)
            row["gold"] = {part: getattr(score, part) for part in PARTS}
        out.append(row)
    return out, bool(tokenizer.chat_template)


def show(console: Console, asked: list[Question], answers: dict[str, list[dict[str, Any]]]) -> None:
    """Side by side where the terminal is wide enough, else under each other; in a file or a pipe a block each, and no line broken."""
    plain = not console.is_terminal
    wide = not plain and console.width // max(1, len(answers)) >= NARROW
    for i, q in enumerate(asked):
        if plain:
            console.print(f"== {i + 1} of {len(asked)}")
        for m in q.messages:
            who = "" if m.role == "user" else f"{m.role}: "
            console.print(Text(f"{who}{clean(m.content)}", style="bold" if m.role == "user" else "dim"), soft_wrap=plain)
        if wide:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
            for name in answers:
                table.add_column(Text(clean(name), style=f"bold {STYLES.get(name, '')}".strip()), ratio=1, overflow="fold", vertical="top")
            table.add_row(*[_body(rows[i]) for rows in answers.values()])
            if any("gold" in rows[i] for rows in answers.values()):
                table.add_row(*[_score(rows[i]) for rows in answers.values()])
            console.print(table)
        else:
            for name, rows in answers.items():
                head = Text(f"{clean(name)}  ", style=f"bold {STYLES.get(name, '')}".strip())
                head = Text("\n-- " if plain else "") + head + _score(rows[i])
                head.rstrip()
                console.print(head, soft_wrap=plain)
                console.print(_body(rows[i]), soft_wrap=plain)
        console.print()


def _body(row: dict[str, Any]) -> Text:
    text = Text(clean(row["text"]) or "(nothing)", style="" if row["text"] else "dim italic")
    return text.append(" \u2026", style="dim") if row["finish"] == "length" else text


def _score(row: dict[str, Any]) -> Text:
    if "gold" not in row:
        return Text("")
    found = row["gold"]
    parts = [f"{p} {value('gold', found[p], 2, True)}" for p in PARTS[1:] if found[p]]
    return Text(f"gold {value('gold', found['total'], 2, True)}" + (f" ({', '.join(parts)})" if parts else ""), style="dim")


def read(argv: list[str]) -> tuple[Compare, list[Stage]]:
    """What is asked for, and of which stages. Raises UserError for wrong flags, and where there is nothing to ask."""
    s = parse(Compare, argv, "temper compare", EXAMPLES)
    stages = askable(s.dir)
    columns(s, stages)
    return s, stages


def main(argv: list[str]) -> int:
    s, stages = read(argv)
    temperature = evaluated_at(s.dir) if s.temperature is None else s.temperature
    asked = questions(s, stages)
    answers: dict[str, list[dict[str, Any]]] = {}
    bare = []
    for name, spec in columns(s, stages).items():
        answers[name], chat = answer(spec, asked, temperature, s)
        if not chat:
            bare.append(name)
    if s.json_:
        rows = [
            {"messages": [m.model_dump() for m in q.messages], "answers": {name: found[i] for name, found in answers.items()}}
            for i, q in enumerate(asked)
        ]
        how = {"temperature": temperature, "max_new": s.max_new, "seed": s.seed, "without_template": bare}
        print(json.dumps({"dir": s.dir, **how, "prompts": rows}, indent=1))
        return 0
    console = Console(file=sys.stdout, highlight=False)
    show(console, asked, answers)
    how_sampled = "greedy" if temperature == 0 else f"temperature {temperature:g}, seed {s.seed}"
    notes = f"{how_sampled}, at most {s.max_new} tokens (\u2026: cut there)"
    if bare:
        notes += f"; {', '.join(map(clean, bare))}: no chat template, so given the text alone to continue"
    if of_world(stages) and (strange := sum(q.ask is None for q in asked)):
        notes += f"; no gold for {strange} of {len(asked)}: not prompts that the embedded world understands"
    console.print(Text(notes, style="dim"), soft_wrap=not console.is_terminal)
    return 0
