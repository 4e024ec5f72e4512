"""Rejection sampling: sample k answers to each prompt, keep the good ones, fine-tune on them; in rounds it is expert iteration. Floor 5.

    keep above: every answer whose rating reaches the threshold      RFT, arXiv:2308.01825; STaR, arXiv:2203.14465 (without hints)
    keep best:  the answer with the highest rating                   RAFT, arXiv:2304.06767; AlpacaFarm's expert iteration, arXiv:2305.14387
    start:      each round fine-tunes the first model anew (STaR), or the one that sampled (RAFT)

Choices: equal answers to a prompt are learned once; at most `per_prompt` of each prompt and at most a share of the records from easy
prompts, those whose answers were all good already, so that a round does not mostly repeat what the model can do; an answer that did
not end, or that no rating was found for, is left out and counted. The answers are learned as text through the chat template.
The first round's records say how many steps `epochs` are; each further round takes as many, from its own records.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import model_validator

from temper.config import Settings, UserError, opt
from temper.data.template import stop_ids
from temper.data.trees import chat_trees
from temper.forest import Tree
from temper.judges.rating import REWARDS, Rater, rater
from temper.methods import sft
from temper.methods.base import Batching, Job, Window, asked, numbered, offline
from temper.methods.best_of_n import Sampled, draw, rated
from temper.models.adapt import Adapter
from temper.models.load import export, load_policy
from temper.records import Chat, Message, read_jsonl, write_jsonl
from temper.rollout import Sampling, generator
from temper.runs import Run, atomic_write
from temper.train import Compute, Optim, State, Step, fit, ranks

METRICS = {
    **{name: text for name, text in sft.METRICS.items() if name == "loss"},
    "phase": "the round",
    "reward": "mean rating of all answers that the round sampled",
    "kept_reward": "mean rating of those that it learns from",
    "good": "share of sampled answers that are good: at or above the threshold, or as good as their prompt's best",
    "solved": "share of prompts with a good answer",
    "records": "answers that the round learns from",
    "easy": "share of them whose prompt had good answers only",
    "unrated": "share of sampled answers without a rating: left out",
    "cut_off": "share of sampled answers that did not end: left out",
}
EXAMPLES = """
  temper rejection --model runs/sft --prompts prompts.jsonl --reward runs/reward --out runs/best --rounds 2
  temper rejection --model runs/sft --prompts 'world:prompts?n=2000' --reward gold --keep above --threshold 1 --per-prompt 4 --out runs/rft
"""


class Choice(Settings):
    """Which sampled answers are learned."""

    keep: Literal["best", "above"] = opt("best", "best: the highest rated of each prompt; above: all whose rating reaches --threshold")
    threshold: float | None = opt(None, "least rating of an answer that is kept; a check's is 1 for right and 0 for wrong")
    per_prompt: int = opt(1, "different answers learned of a prompt at most, the best first", ge=1)
    easy_share: float = opt(0.5, "most of the records that may come from prompts whose answers were all good", ge=0, le=1)

    @model_validator(mode="after")
    def _sensible(self) -> "Choice":
        if self.keep == "above" and self.threshold is None:
            raise ValueError("--keep above needs --threshold: from which rating on an answer is kept")
        return self


class Rejection(Settings):
    """Rejection sampling (RFT, RAFT) and, with --rounds, expert iteration: fine-tune a model on the best of its own answers.

    What for: turns a rater into demonstrations, so that SFT is all the training there is. When: answers can be checked or rated well, and
    something steadier and simpler than PPO is wanted; it cannot find what k samples never hold. Source: STaR arXiv:2203.14465, RAFT
    arXiv:2304.06767, RFT arXiv:2308.01825, expert iteration as in AlpacaFarm arXiv:2305.14387.
    """

    model: str = opt(..., "the SFT model: it samples, and it is trained")
    prompts: str = opt(..., "prompts to answer: a file, or world:prompts")
    reward: str = opt(..., f"rater that chooses: {REWARDS}")
    rounds: int = opt(1, "times to sample and fine-tune; more than one is expert iteration", ge=1)
    samples_per_prompt: int = opt(8, "answers drawn to each prompt in a round", ge=2)
    start: Literal["first", "latest"] = opt("first", "what a round fine-tunes: the first model anew, or the one that sampled")
    choice: Choice = Choice()
    sampling: Sampling = Sampling()
    window: Window = Window()
    batching: Batching = Batching(epochs=3.0)
    optim: Optim = Optim(lr=3e-4, schedule="cosine", warmup=0.1)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


def settings(name: str) -> type[Settings]:
    return Rejection


class Chosen(NamedTuple):
    """What one round learns, and what was seen on the way."""

    chats: list[Chat]
    metrics: dict[str, float]


def choose(s: Rejection, groups: Sequence[Sequence[Sampled]], ratings: Sequence[Sequence[float | None]], round: int) -> Chosen:
    """The answers to learn. meta: whose answer it is, rated what by whom, and how many of the prompt's were good."""
    rule, solved, good = s.choice, 0, 0
    hard: list[Chat] = []
    easy: list[Chat] = []
    for group, scores in zip(groups, ratings, strict=True):
        known = [x for x in scores if x is not None]
        whole = [
            (one.answer.text, x) for one, x in zip(group, scores, strict=True) if x is not None and one.answer.ended and one.answer.text
        ]
        least = max((x for _, x in whole), default=0.0) if rule.keep == "best" else -np.inf
        least = least if rule.threshold is None else max(least, rule.threshold)
        fine = sum(x >= least for _, x in whole)
        good, solved = good + fine, solved + (fine > 0)
        learnable = {text: x for text, x in whole if x >= least}
        for text in sorted(learnable, key=lambda text: -learnable[text])[: rule.per_prompt]:
            prompt = group[0].answer.prompt
            whence = {"model": s.model, "rater": s.reward, "round": round, "rating": learnable[text], "good": fine, "of": len(known)}
            chat = Chat(messages=[*prompt.messages, Message(role="assistant", content=text)], meta={**prompt.meta, **whence})
            (easy if fine == len(known) else hard).append(chat)
    room = len(easy) if rule.easy_share == 1 else int(rule.easy_share / (1 - rule.easy_share) * len(hard))
    order = generator("rejection easy", s.batching.seed, round).permutation(len(easy))
    chats = hard + [easy[i] for i in sorted(order[:room])]
    total = sum(map(len, groups))
    found = [x for scores in ratings for x in scores if x is not None]
    if not chats:
        why = f"{len(found)} of {total} answers had a rating, {good} were good, {len(easy)} stood among good ones only"
        raise UserError(f"{s.prompts}: round {round} has nothing to learn: {why}; lower --threshold, or raise --easy-share")
    metrics = {
        "reward": float(np.mean(found)),
        "kept_reward": float(np.mean([c.meta["rating"] for c in chats])),
        "good": good / max(1, len(found)),
        "solved": solved / len(groups),
        "records": float(len(chats)),
        "easy": 1 - len(hard) / len(chats),
        "unrated": 1 - len(found) / total,
        "cut_off": sum(not one.answer.ended for group in groups for one in group) / total,
    }
    return Chosen(chats, metrics)


def learned_in(s: Rejection, run: Run, round: int, answers: Callable[[], list[list[Sampled]]], by: Rater) -> Chosen:
    """A round's records and figures: sampled now, or read where they are there already, for the weights that sampled them have moved on."""
    with ranks.leader_first():
        records, figures = run.file(f"round_{round}.jsonl"), run.file(f"round_{round}.json")
    if not ranks.led(figures.exists()):  # written after the records, so it stands for both
        groups = answers()
        with ranks.leader_first():
            if ranks.rank() == 0:
                found = choose(s, groups, rated(by, groups), round)
                write_jsonl(records, found.chats)
                atomic_write(figures, json.dumps(found.metrics, indent=1) + "\n")
    return Chosen(read_jsonl(records, Chat), json.loads(figures.read_bytes()))


def prepare(settings: Rejection, run: Run) -> Job:
    s, b = settings, settings.batching
    model, tokenizer = load_policy(s.model, **s.compute.placed, adapters=s.adapters, seed=b.seed)
    by = rater(s.reward, tokenizer=tokenizer, **s.compute.placed)
    prompts = asked(s.prompts, run, tokenizer, model, s.window, room=s.sampling.max_new, seed=b.seed)
    first = {name: x.clone() for name, x in model.state_dict().items()} if s.start == "first" and s.rounds > 1 else {}

    def material(round: int) -> tuple[list[Tree], dict[str, float]]:
        """What a round learns; the model samples it as it is now."""

        def told(done: int, of: int) -> None:
            if ranks.rank() == 0:
                run.set_status(phase="sample", step=done, steps=of)

        def answers() -> list[list[Sampled]]:
            return draw(model, tokenizer, prompts, s.sampling, s.samples_per_prompt, ("rejection", b.seed, round), told)

        chosen = learned_in(s, run, round, answers, by)
        return chat_trees(tokenizer, chosen.chats, model, s.window, learn="last")[0], chosen.metrics

    trees, metrics = material(1)
    each = b.steps(len(trees))

    def rounds(resume: State | None) -> Iterator[Step]:
        begin = resume["phase"] if resume else 1
        for round in range(begin, s.rounds + 1):
            state = resume["state"] if resume else None
            resume = None  # as large as the weights and the optimiser together
            learn, seen = (trees, metrics) if round == 1 else material(round)
            if state is None and round > 1 and first:
                model.load_state_dict(first)
            steps = fit(model, offline(learn, b), sft.lm_loss, steps=each, optim=s.optim, seed=b.seed, resume=state, compute=s.compute)
            for step in numbered(steps, round, (round - 1) * each):
                yield step._replace(metrics={**step.metrics, **seen} if step.metrics else {})

    return Job(
        total=s.rounds * each,
        steps=rounds,
        save=lambda path: export(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={
            **prompts.card,
            "first_round": {name: round(x, 4) for name, x in metrics.items()},
        },
        policy=(model, tokenizer),
        asks=[r.messages for r in prompts.records[:4]],
    )
