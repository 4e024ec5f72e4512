"""Collecting preferences: a model answers each prompt several times, a rater ranks the answers. Floor 5.

The rankings are what a reward model learns from (arXiv:2203.02155, section 3.4: 4 to 9 answers to a prompt); the best and the worst
of each are the pairs that DPO learns from. The raters here are the embedded world's annotators, whose exact preference probabilities
are known, so the ceiling of any reward model is known too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from temper.config import Settings, UserError, opt
from temper.data.template import stop_ids
from temper.data.trees import where
from temper.judges.annotators import Annotators, ceiling, extremes
from temper.methods.base import Job, Window, asked
from temper.models.load import load_policy
from temper.records import Ranked, write_jsonl
from temper.rollout import Request, Sampling, sample
from temper.runs import Run
from temper.train import ranks

METRICS = {
    "rankings": "prompts with two or more different answers",
    "comparisons": "pairs of answers in them",
    "ceiling": "E max(P, 1 - P) of the raters on these",
}
EXAMPLES = """
  temper collect --model runs/sft --prompts 'world:prompts?n=4000' --out runs/comparisons
"""


class Collect(Settings):
    """Have the world's annotators rank a model's answers: rankings.jsonl, and pairs.jsonl of the best and worst."""

    model: str = opt(..., "whose answers are compared")
    prompts: str = opt(..., "prompts of the embedded world")
    panel: str = opt("town", "which annotators rank")
    samples_per_prompt: int = opt(4, "answers drawn per prompt; those that differ are ranked", ge=2)
    seed: int = opt(0, "of samples and labels", ge=0)
    sampling: Sampling = Sampling()
    window: Window = Window()


def settings(name: str) -> type[Settings]:
    return Collect


def collect(s: Collect, model: Any, tokenizer: Any, run: Run, progress: Callable[[int, int], None]) -> tuple[list[Ranked], dict[str, Any]]:
    """The rankings, and what the card says of them. Prompts whose answers are all alike give none and are counted."""
    raters = Annotators(s.panel, s.seed)
    found = asked(s.prompts, run, tokenizer, model, s.window, room=s.sampling.max_new, seed=s.seed)
    records, prompts = found.every()
    stranger = next((i for i, r in enumerate(records) if "ask" not in r.meta), None)
    if stranger is not None:
        at = where(records[stranger], stranger)
        raise UserError(f"{at}: not a prompt of the embedded world, whose annotators judge no other; give world:prompts")
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
            Request(
                [prompts[i] for i in mine], sampling=s.sampling, stop=stop, n=s.samples_per_prompt, seed=("collect", s.seed), index=mine
            ),
            progress=told,
        ),
    )
    rankings = []
    for i, (record, answers) in enumerate(zip(records, groups, strict=True)):
        texts = [tokenizer.decode(a.tokens, skip_special_tokens=True).strip() for a in answers if a.finish == "stop"]
        different = list(dict.fromkeys(text for text in texts if text))
        if len(different) > 1:
            rankings.append(raters.rank(record, different, index=i))
    if not rankings:
        raise UserError(
            f"{s.prompts}: no prompt got two different answers that ended; raise --temperature, --samples-per-prompt or --max-new"
        )
    card = {
        **found.card,
        "prompts": len(records),
        "rankings": len(rankings),
        "alike": len(records) - len(rankings),
        "tokens": sum(len(a.tokens) for group in groups for a in group),
        "comparisons": sum(len(r.meta["probabilities"]) for r in rankings),
        "ceiling": ceiling(rankings),
        "panel": s.panel,
    }
    return rankings, card


def prepare(settings: Collect, run: Run) -> Job:
    model, tokenizer = load_policy(settings.model)
    card: dict[str, Any] = {}

    def finish(path: Path, progress) -> None:
        rankings, found = collect(settings, model, tokenizer, run, progress)
        card.update(found)
        if ranks.rank() == 0:
            write_jsonl(run.file("rankings.jsonl"), rankings)
            write_jsonl(path, [extremes(ranking) for ranking in rankings])

    return Job(make=finish, card=card, artefact="pairs.jsonl")
