"""A toy for the tests of methods and ladder: a few sentences about boats, and models that learn them in a second or two.

The commands of the end-to-end tests are written here once: `COMMANDS[method](toy)` are the flags of a tiny run of that method.
"""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from temper.config import build
from temper.ladder.stage import Place, run_stage
from temper.methods import NAMES, load
from temper.train.fit import TIMINGS
from temper.world import dataset

BOATS = ("Sea Star", "Old Tom", "Blue Gull", "Red Hen", "Grey Cat", "Long Eel")
COLOURS = ("red", "blue", "grey", "white")
QUESTIONS = ("What colour is the {}?", "Tell me the colour of the {}.", "Which colour has the {}?")
TINY = {"width": 16, "layers": 1, "heads": 2, "context": 160, "vocab": 330}
PRINCIPLES = """
comparison_template: "Asked: {prompt} A: {a} B: {b} {principle}"
principles:
  - {name: kind, about: harm, critique: "What is wrong?", revision: "Write it again.", comparison: "Which is kinder?"}
  - {name: safe, about: harm, critique: "Is it safe?", revision: "Make it safe.", comparison: "Which is safer?"}
  - {name: plain, about: honesty, critique: "Is it true?", revision: "Make it true.", comparison: "Which is true?"}
  - {name: useful, about: help, critique: "Does it help?", revision: "Make it help.", comparison: "Which helps?"}
"""


class Toy(NamedTuple):
    """Files and trained stages, all in one folder; treat it as read-only."""

    folder: Path

    def __getattr__(self, name: str) -> str:
        return str(next(path for path in (self.folder / name, *self.folder.glob(f"{name}.*")) if path.exists()))


def colour(boat: int) -> str:
    return COLOURS[boat % len(COLOURS)]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_files(folder: Path) -> None:
    """text, chats, pairs, prompts (and two parts of them) and principles about the boats; solutions in steps."""
    asked = [(q.format(name), k) for q in QUESTIONS for k, name in enumerate(BOATS)]
    answers = ["It is {}.", "{}.", "The boat is {}, I think."]
    lines = [f"The {name} is {colour(k)}. {q.format(name)} It is {colour(k)}." for q in QUESTIONS for k, name in enumerate(BOATS)]
    write(folder / "text.jsonl", [{"text": f"{line} A or B? A. {lines[-1 - i]}"} for i, line in enumerate(lines)] * 2)
    chats = [[*user(q), says(answers[(i + j) % 3].format(colour(k)))] for j in range(3) for i, (q, k) in enumerate(asked)]
    talks = [
        [
            *chat,
            *user(("What is wrong?", "Is it safe?")[i % 2]),
            says(("Nothing.", "Yes.")[i // 2 % 2]),
            *user(("Write it again.", "Make it safe.")[i % 2]),
        ]
        for i, chat in enumerate(chats)
    ]
    talks = [[*talk, says(talk[1]["content"])] for talk in talks]
    town = [
        [*(m.model_dump() for m in p.messages), says(("Yes.", "No.", "I do not know.")[i % 3])]
        for i, p in enumerate(dataset("prompts", n=60, seed=1))
    ]
    write(folder / "chats.jsonl", [{"messages": messages} for messages in (*chats, *talks, *town)])
    pairs = [
        {"prompt": user(q), "chosen": answers[0].format(colour(k)), "rejected": answers[1 + i % 2].format(colour(k))}
        for i, (q, k) in enumerate(asked)
    ]
    write(folder / "pairs.jsonl", pairs)
    sums = [(k, n, (k + n) % 3 != 0) for k in range(8) for n in range(3)]
    solved = [
        {"prompt": user(f"Add {n} to {k}."), "steps": [f"{k} and {n}.", f"So {k + n}." if ok else "So what?"], "labels": [1.0, float(ok)]}
        for k, n, ok in sums
    ]
    write(folder / "steps.jsonl", [{**row, "meta": {}} for row in solved])
    for name, some in ("prompts", asked), ("red", asked[:12]), ("calm", asked[12:]):
        write(folder / f"{name}.jsonl", [{"messages": user(q)} for q, _ in some])
    (folder / "principles.yaml").write_text(PRINCIPLES)


def train(method: str, out: Path | str, *, save_seconds: float = 600, **values: Any) -> dict[str, Any]:
    """run_stage; the summary."""
    settings = build(load(method).settings(method), values)
    return run_stage(method, settings, Place(out=str(out), threads=1, quiet=True, looks=1, save_seconds=save_seconds))


def make_toy(folder: Path) -> Toy:
    """Files, and the stages base, sft and reward."""
    toy = Toy(folder)
    write_files(folder)
    train("pretrain", folder / "base", data=toy.text, batch=12, epochs=4, lr=2e-2, **TINY)
    train("sft", folder / "sft", model=toy.base, data=toy.chats, batch=16, epochs=10, lr=2e-2)
    train("reward", folder / "reward", model=toy.sft, data=toy.pairs, batch=8, epochs=4, lr=1e-2, held_out=0.2)
    return toy


def values_of(method: str, toy: Toy) -> dict[str, Any]:
    """Settings of a run of each method that takes about a second."""
    short = {"max_new": 12}
    pairs = {"model": toy.sft, "data": toy.pairs, "batch": 4, "epochs": 5, "held_out": 0.2, "lr": 1e-3}
    return {
        **{name: pairs for name, file in NAMES.items() if file in ("preference", "unpaired")},
        "pretrain": {"data": toy.text, "batch": 8, "epochs": 4, "optimizer": "muon", **TINY},
        "sft": {"model": toy.base, "data": toy.chats, "batch": 8, "epochs": 2},
        "collect": {"model": toy.sft, "prompts": "world:prompts?n=12", **short},
        "reward": {"model": toy.sft, "data": toy.pairs, "batch": 4, "epochs": 5, "held_out": 0.2},
        "process-reward": {"model": toy.sft, "data": toy.steps, "batch": 4, "epochs": 4, "held_out": 0.2},
        "online-dpo": {"model": toy.sft, "reward": toy.reward, "prompts": toy.prompts, "rollouts": 6, "prompts_per_step": 6, **short},
        "ppo": {
            "model": toy.sft,
            "reward": toy.reward,
            "prompts": toy.prompts,
            "rollouts": 6,
            "prompts_per_step": 6,
            "minibatches": 2,
            **short,
        },
        "grpo": {
            "model": toy.sft,
            "reward": toy.reward,
            "prompts": toy.prompts,
            "rollouts": 8,
            "prompts_per_step": 4,
            "samples_per_prompt": 3,
            **short,
        },
        "best-of-n": {"model": toy.sft, "reward": toy.reward, "prompts": toy.prompts, "samples_per_prompt": 8, **short},
        "rejection": {
            **{"model": toy.sft, "reward": toy.reward, "prompts": toy.prompts, "samples_per_prompt": 4, "rounds": 2, "batch": 4},
            **short,
        },
        "constitution": {
            **{"model": toy.sft, "red_team": toy.red, "helpful": toy.calm, "helpful_pairs": toy.pairs, "principles": toy.principles},
            **{"batch": 4, "judged_by": 1, **short},
        },
    }[method]


def flags(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def command(method: str, toy: Toy, out: Path, *more: str) -> list[str]:
    """`temper METHOD ...` for `values_of`."""
    return [method, *flags(values_of(method, toy)), "--out", str(out), "--threads", "1", "--quiet", "--looks", "2", *more]


def result(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """What must not depend on kills: the weights' bytes, the metrics without timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (folder / "model" / "model.safetensors").read_bytes(), [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


# ---------------------------------------------------------------- commands in processes of their own


def _work(argv: list[str], log: str) -> None:
    import sys

    from temper.cli import main

    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(main(argv))


def start(argv: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    """`temper ARGV` in a process that was forked where everything is imported: it begins at once, and can be killed like any other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["temper.ladder.worker", "toy"])
    process = context.Process(target=_work, args=(argv, str(log)))
    process.start()
    return process
