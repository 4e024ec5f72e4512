"""The command: flags, the questions to whoever sits at the terminal, and what comes of both."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from temper.advise.advice import recommend
from temper.advise.rivals import Trial
from temper.advise.show import page, tell
from temper.advise.trial import machine_facts, measure
from temper.config import Settings, UserError, build, dump, opt, parse
from temper.ladder.stage import absent
from temper.runs import atomic_write
from temper.train import machine

EXAMPLES = """
  temper advise
  temper advise --task extraction --examples 300 --format json --privacy local --budget 2
  temper advise --data tickets.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --schema ticket.schema.json --out advice
  temper advise --data gsm8k.jsonl --model runs/sft --feedback verifiable --held-out 100 --minutes 30
"""
Task = Literal["instructions", "style", "extraction", "facts", "reasoning", "harmless"]
Feedback = Literal["none", "pairs", "thumbs", "verifiable", "people"]


class Answers(Settings):
    """What only the user knows. What is not said is asked at a terminal, and elsewhere taken as the default that the advice names."""

    task: Task | None = opt(
        None,
        "what the model is to learn: to follow instructions, a style, to extract or classify, new facts, maths or code, to refuse harm",
    )
    examples: int | None = opt(None, "demonstrations at hand; default: the rows of --data, else 0", ge=0)
    feedback: list[Feedback] = opt(
        [], "what is there to prefer answers by: pairs, thumbs, answers a program can verify, people who can judge fresh ones"
    )
    hardware: Literal["here"] | float | None = opt(None, "where it is to be trained: here, or the GB of memory of another machine's device")
    privacy: Literal["local", "open"] | None = opt(None, "local: the text may not leave this machine; open: it may")
    format: Literal["free", "short", "json"] | None = opt(None, "what answers must be: free text, a few words, JSON")
    budget: float | None = opt(None, "hours that training may take", gt=0)


class Question(NamedTuple):
    """asked: of whoever sits there. assumed: where nobody answers."""

    asked: str
    assumed: Any


QUESTIONS = {
    "task": Question("What is the model to learn?", "instructions"),
    "examples": Question("How many demonstrations (a request with a good answer) do you have?", 0),
    "feedback": Question("What do you have to prefer one answer to another by?", "none"),
    "hardware": Question("Where is it to be trained: `here`, or on a device with how many GB?", "here"),
    "privacy": Question("May the text leave this machine (open), or not (local)?", "local"),
    "format": Question("What must answers be?", "free"),
    "budget": Question("How many hours may training take?", 8.0),
}


class Output(Settings):
    """What is written."""

    out: str | None = opt(None, "folder for advice.json and advice.html")
    ask: bool = opt(True, "ask at a terminal for what no flag says")
    threads: int = opt(2, "CPU threads", ge=1)
    json_: bool = opt(False, "print advice.json instead of the summary; nothing is asked")


class Advise(Settings):
    """Whether to prompt, show examples, train an adapter or all weights; which preference method; how much data; what it costs here.

    With --data and --model the rivals are run on rows kept out of training, and training and sampling are timed on this machine.
    Every reason says whether it was measured, answered, reckoned or is from the literature, and how far it goes.
    """

    data: str | None = opt(None, "demonstrations, pairs, thumbs or worked solutions: what the model is to learn")
    model: str | None = opt(None, "the model to adapt: a stage, a folder or a Hugging Face name")
    schema_: str | None = opt(None, "a JSON Schema that answers must fit")
    answers: Answers = Answers()
    trial: Trial = Trial()
    output: Output = Output()


def read(argv: list[str]) -> Advise:
    """What is asked for. Raises UserError for wrong flags and for inputs that are not there."""
    s = parse(Advise, argv, "temper advise", EXAMPLES)
    if problem := absent({name: value for name, value in (("data", s.data), ("model", s.model)) if value}):
        raise UserError(problem)
    if s.schema_ and not (s.data and s.model):
        raise UserError("--schema: is checked on answers to held-out rows; give --data and --model too")
    if s.schema_ and s.answers.format not in (None, "json"):
        raise UserError(f"--schema describes JSON, --format is {s.answers.format}; leave one of the two out")
    if "none" in s.answers.feedback and len(s.answers.feedback) > 1:
        raise UserError(f"--feedback {' '.join(s.answers.feedback)}: none stands alone")
    if isinstance(s.answers.hardware, float) and s.answers.hardware <= 0:
        raise UserError(f"--hardware {s.answers.hardware:g}: give the GB of the device's memory, or here")
    if any(rate <= 0 for rate in s.trial.rates):
        raise UserError(f"--rates {' '.join(f'{rate:g}' for rate in s.trial.rates)}: a learning rate is above 0")
    if s.output.out and Path(s.output.out).is_file():
        raise UserError(f"{s.output.out}: a file; give a folder for --out")
    return s


def ask(answers: Answers, person: Callable[[str, Question, list[str]], str], shown: Sequence[str] = ()) -> Answers:
    """The answers with what `person(name, question, choices)` says of each that is open; "" leaves it open. shown: what the data tell."""
    values = dump(answers)
    for name, question in QUESTIONS.items():
        field = Answers.model_fields[name]
        choices = _choices(field.annotation)
        while name not in shown and values[name] in (None, []):
            said = person(name, question, choices).strip()
            if not said:
                break
            value = said.replace(",", " ").split() if name == "feedback" else said
            try:
                values[name] = dump(build(Answers, {name: value}))[name]
            except UserError as error:
                print(error, file=sys.stderr)
    return build(Answers, values)


def _choices(annotation: Any) -> list[str]:
    if isinstance(annotation, type) or annotation is None:
        return []
    found = get_args(annotation)
    if all(isinstance(x, str) for x in found):
        return list(found)
    return [choice for part in found for choice in _choices(part)]


def _person(name: str, question: Question, choices: list[str]) -> str:
    """Asks on the error stream; nothing at the end of the input."""
    listed = f" ({', '.join(choices)})" if choices else ""
    print(f"{question.asked}{listed} [{question.assumed}] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


def settled(answers: Answers, said: Answers, data: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """name -> {value, from}: a flag, an answer at the terminal, what the data show, or what is assumed."""
    flags, given, shown = dump(answers), dump(said), (data or {}).get("shows", {})
    out = {}
    for name, question in QUESTIONS.items():
        value, source = given[name], "a flag" if flags[name] not in (None, []) else "you"
        if name == "feedback":
            more = [x for x in shown.get(name, []) if x not in value]
            if more and value != ["none"]:
                value, source = [*value, *more], "the data" if not value else f"{source} and the data"
        if value in (None, []):
            assumed = [question.assumed] if name == "feedback" else question.assumed
            value, source = (shown[name], "the data") if name in shown else (assumed, "assumed")
        out[name] = {"value": value, "from": source}
    return out


def main(argv: list[str]) -> int:
    """Ask, measure, advise; exit code 0."""
    s = read(argv)
    machine.use(s.output.threads)
    said = s.answers
    if s.output.ask and not s.output.json_ and sys.stdin.isatty() and sys.stderr.isatty():
        said = ask(said, _person, ("examples", "format") if s.data else ())
    found: dict[str, Any] = {"model": s.model, "data": s.data, "schema": s.schema_, "machine": machine_facts(s.trial)}
    found |= measure(s.trial, s.model, s.data, s.schema_, said.format, quiet=s.output.json_)
    found["answers"] = settled(s.answers, said, found.get("rows"))
    found["advice"] = recommend(found)
    if s.output.out:
        folder = Path(s.output.out)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "advice.json", json.dumps(found, indent=1) + "\n")
        atomic_write(folder / "advice.html", page(found))
    if s.output.json_:
        print(json.dumps(found, indent=1))
        return 0
    tell(found)
    if s.output.out:
        print(f"\nthe whole in {Path(s.output.out) / 'advice.html'} (figures in advice.json)")
    return 0
