"""Collecting preferences: a model answers each prompt twice or more, raters choose between two of its answers. Floor 5.

The pairs are what a reward model and DPO learn from (arXiv:1909.08593; arXiv:2009.01325). The raters here are the embedded world's
annotators, whose exact preference probabilities are known, so the ceiling of any reward model is known too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from temper.config import Settings, UserError, opt
from temper.data.sources import read
from temper.data.template import stop_ids
from temper.data.trees import prompt_ids, where
from temper.judges.annotators import Annotators, ceiling
from temper.methods.base import Job, Window
from temper.models.load import load_policy
from temper.records import Pair, write_jsonl
from temper.rollout import Sampling, sample
from temper.runs import Run
from temper.train import ranks

METRICS = {
    "pairs": "pairs of different answers",
    "ceiling": "E max(P, 1 - P) of the raters on them",
    "ties": "share of labels that are ties",
}
EXAMPLES = """
  temper collect --model runs/sft --prompts 'world:prompts?n=4000' --out runs/comparisons
"""


class Collect(Settings):
    """Have the world's annotators compare a model's answers."""

    model: str = opt(..., "whose answers are compared")
    prompts: str = opt(..., "prompts of the embedded world")
    panel: str = opt("town", "which annotators choose")
    samples_per_prompt: int = opt(4, "answers drawn per prompt; two that differ are compared", ge=2)
    seed: int = opt(0, "of samples and labels", ge=0)
    sampling: Sampling = Sampling()
    window: Window = Window()


def settings(name: str) -> type[Settings]:
    return Collect


def differing(answers: list[str]) -> tuple[str, str] | None:
    """The first answer and the first that is not the same."""
    return next(((answers[0], other) for other in answers[1:] if other != answers[0]), None)


def collect(s: Collect, model: Any, tokenizer: Any, progress: Callable[[int, int], None]) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs, and what the card says of them. Prompts whose answers are all alike give no pair and are counted."""
    records, report = read(s.prompts, "prompts", skip_bad=s.window.skip_bad)
    stranger = next((i for i, r in enumerate(records) if "ask" not in r.meta), None)
    if stranger is not None:
        at = where(records[stranger], stranger)
        raise UserError(f"{at}: not a prompt of the embedded world, whose annotators judge no other; give world:prompts")
    prompts, cut = prompt_ids(tokenizer, records, model, s.window, room=s.sampling.max_new)
    kept = [r for i, r in enumerate(records) if i not in cut.dropped]
    stop = stop_ids(tokenizer)
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        progress(done, len(mine))

    mine = ranks.share([len(p) for p in prompts])
    groups = ranks.whole(
        mine,
        sample(
            model,
            [prompts[i] for i in mine],
            sampling=s.sampling,
            stop=stop,
            n=s.samples_per_prompt,
            seed=("collect", s.seed),
            index=mine,
            progress=told,
        ),
    )
    raters = Annotators(s.panel, s.seed)
    pairs = []
    for i, (record, answers) in enumerate(zip(kept, groups, strict=True)):
        texts = [tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in answers if a.finish == "stop"]
        two = differing([t for t in texts if t]) if texts and texts[0] else None
        if two:
            pairs.append(raters.label(record, *two, index=i))
    if not pairs:
        raise UserError(
            f"{s.prompts}: no prompt got two different answers that ended; raise --temperature, --samples-per-prompt or --max-new"
        )
    card = {
        "source": report.summary(),
        "prompts": len(kept),
        "pairs": len(pairs),
        "alike": len(kept) - len(pairs),
        "ceiling": ceiling(pairs),
        "ties": sum(p.soft == 0.5 for p in pairs) / len(pairs),
        "panel": s.panel,
        "cut": cut.summary(),
    }
    return pairs, card


def prepare(settings: Collect, run: Run) -> Job:
    model, tokenizer = load_policy(settings.model)
    card: dict[str, Any] = {}

    def finish(path: Path, progress) -> None:
        pairs, found = collect(settings, model, tokenizer, progress)
        card.update(found)
        if ranks.rank() == 0:
            write_jsonl(path, pairs)

    return Job(make=finish, card=card, artefact="pairs.jsonl")
