"""Best of n: sample answers to each prompt, keep the one that a rater likes best. Trains nothing: search at the time of asking. Floor 5.

Sources: arXiv:2009.01325 app. G.3 and arXiv:2210.10760 (best of n as a policy, its KL), arXiv:2401.01879 (that its known KL is a bound),
arXiv:2112.09332 app. I (the estimator from N >= n samples). Formulas and their limits are in `temper.stats.best_of_n`.
Choices: `--reward` chooses and `--report` reports; an answer that comes again is one atom with the model's own probability of it, so the KL
is that of the sampled duplicates and not the bound; an answer without a rating is left out and counted.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from temper.config import Settings, UserError, opt
from temper.data.template import stop_ids
from temper.judges.rating import REWARDS, Answer, Rater, rater
from temper.methods.base import Asked, Job, Window, asked
from temper.models.load import load_policy
from temper.records import Chat, Message, Ranked, write_jsonl
from temper.rollout import Request, Sampling, sample
from temper.runs import Run, atomic_write
from temper.stats.best_of_n import expected, kl_bound, kl_estimate
from temper.stats.intervals import mean_interval
from temper.train import Compute, ranks

METRICS = {
    "reward": "by the rater that chooses, of the best of n, for each n",
    "report": "by the rater that reports, of the same answers",
    "kl": "nats of the best of n from the model, for each n, duplicates counted",
    "bound": "log n - (n - 1) / n, what that is without duplicates",
    "unrated": "sampled answers that the choosing rater could not rate: left out",
    "again": "share of answers that came before among the samples of their prompt",
}
EXAMPLES = """
  temper best-of-n --model runs/sft --reward runs/reward --prompts prompts.jsonl --out runs/best
  temper best-of-n --model runs/sft --reward runs/reward --report gold --prompts 'world:prompts?n=200' --out runs/best
"""
BARS = "▁▂▃▄▅▆▇█"


class Raters(Settings):
    """Who chooses and who reports."""

    reward: str = opt(..., f"rater that chooses: {REWARDS}")
    report: str | None = opt(None, "rater that only reports: the one that chose says nothing of how good its choice is")


class BestOfN(Settings):
    """Best of n: sample, rate, keep the best. It writes the curve of what each n gives, and the chosen answers as records.

    What for: the most that a reward model gives without training; how far it can be trusted (reward rises, report falls: over-optimised);
    records for fine-tuning. When: before any RL, as its rival, and where answers may cost n times as much. Source: arXiv:2009.01325,
    arXiv:2210.10760, arXiv:2401.01879.
    """

    model: str = opt(..., "whose answers are sampled")
    prompts: str = opt(..., "prompts to answer: a file, or world:prompts")
    samples_per_prompt: int = opt(16, "answers drawn per prompt; the curve is of n = 1, 2, 4, ... up to it", ge=2)
    seed: int = opt(0, "of the samples", ge=0)
    raters: Raters
    sampling: Sampling = Sampling()
    window: Window = Window()
    compute: Compute = Compute()


def settings(name: str) -> type[Settings]:
    return BestOfN


Ratings = list[list[float | None]]  # of each group's answers


class Sampled(NamedTuple):
    """One answer, and its summed log-prob under what sampled it."""

    answer: Answer
    logp: float


def draw(
    model: Any, tokenizer: Any, prompts: Asked, sampling: Sampling, n: int, seed: Sequence[int | str], told: Callable[[int, int], None]
) -> list[list[Sampled]]:
    """n answers to each prompt, by all ranks together. Raises UserError where all n would be the same."""
    if n > 1 and not sampling.temperature:
        raise UserError(f"--temperature 0: {n} answers to a prompt would all be the most likely one; raise --temperature")
    records, prompt_ids = prompts.every()
    mine, done = ranks.share([len(ids) for ids in prompt_ids]), 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        told(done, len(mine))

    request = Request([prompt_ids[i] for i in mine], sampling=sampling, stop=stop_ids(tokenizer), n=n, seed=seed, index=mine)
    groups = ranks.whole(mine, sample(model, request, progress=progress))
    return [
        [
            Sampled(
                Answer(record, ids, a.tokens, tokenizer.decode(a.tokens, skip_special_tokens=True).strip(), a.finish == "stop"),
                sum(a.logp),
            )
            for a in group
        ]
        for record, ids, group in zip(records, prompt_ids, groups, strict=True)
    ]


def rated(by: Rater, groups: Sequence[Sequence[Sampled]]) -> Ratings:
    """The ratings of all answers, group by group. What comes again in a group is asked about once: ratings may differ in their last
    digits, and equal answers must be ties. Raises UserError where the rater does not give one for each."""
    different = [{tuple(one.answer.tokens): one.answer for one in reversed(group)} for group in groups]
    answers = [answer for group in different for answer in group.values()]
    found = by.rate(answers)
    if len(found) != len(answers):
        raise UserError(f"{by.name}: {len(found)} ratings for {len(answers)} answers; a rater gives one for each, or none (None)")
    rest = iter([None if x is None or not np.isfinite(x) else float(x) for x in found])
    known = [{tokens: next(rest) for tokens in group} for group in different]
    return [[scores[tuple(one.answer.tokens)] for one in group] for group, scores in zip(groups, known, strict=True)]


def curve(
    groups: Sequence[Sequence[Sampled]],
    reward: Ratings,
    report: Ratings | None,
    plain: bool,
) -> list[dict[str, Any]]:
    """A row per n = 1, 2, 4, ...: reward, report and KL of the best of n, means over prompts with intervals, and the KL's bound.

    Only prompts with N rated answers at the largest n count, the same for every n; equal prompts are one cluster. plain: the answers
    were drawn from the model's own distribution, so that their log-probs are those of the sampler.
    """
    most = max(map(len, groups))
    sizes = [2**k for k in range(most.bit_length())]
    whole = [i for i, r in enumerate(reward) if sum(x is not None for x in r) >= sizes[-1]]
    if not whole:
        raise UserError(f"no prompt has {sizes[-1]} answers that could be rated; look at the rater, or draw more answers")
    names = [json.dumps([m.model_dump(mode="json") for m in groups[i][0].answer.prompt.messages]) for i in whole]
    rows = []
    for n in sizes:
        proxy, gold, where, kl = [], [], [], []
        for i, name in zip(whole, names, strict=True):
            chosen = {k: x for k, x in enumerate(reward[i]) if x is not None}
            score = list(chosen.values())
            proxy.append(expected(score, score, n))
            mass = [math.exp(groups[i][k].logp) for k in chosen] if plain else None
            kl.append(kl_estimate(score, n, mass, [tuple(groups[i][k].answer.tokens) for k in chosen]))
            told = {k: x for k, x in enumerate(report[i]) if x is not None and k in chosen} if report else {}
            if len(told) >= sizes[-1]:
                gold.append(expected([chosen[k] for k in told], list(told.values()), n))
                where.append(name)
        row = {"n": n, "bound": kl_bound(n), "reward": mean_interval(proxy, names).to_dict(), "kl": mean_interval(kl, names).to_dict()}
        rows.append(row | ({"report": mean_interval(gold, where).to_dict()} if gold else {}))
    return rows


def best(s: BestOfN, groups: Sequence[Sequence[Sampled]], reward: Ratings, report: Ratings | None) -> list[Chat]:
    """The best answer of all to each prompt that has a rated one, as a conversation; the first drawn among equals. meta: whose choice
    it is, out of how many, its rating and the others' mean, and what the reporting rater says."""
    out = []
    for i, (group, scores) in enumerate(zip(groups, reward, strict=True)):
        held = {k: x for k, x in enumerate(scores) if x is not None and group[k].answer.ended and group[k].answer.text}
        if held:
            k = max(held, key=held.__getitem__)
            prompt = group[k].answer.prompt
            meta = {**prompt.meta, "model": s.model, "rater": s.raters.reward, "of": len(held), "reward": held[k]}
            meta["mean"] = float(np.mean(list(held.values())))
            meta |= {"report": report[i][k]} if report else {}
            out.append(Chat(messages=[*prompt.messages, Message(role="assistant", content=group[k].answer.text)], meta=meta))
    return out


def ranked(groups: Sequence[Sequence[Sampled]], reward: Ratings) -> list[Ranked]:
    """The different rated answers to each prompt, the best first: to be read, or learned from as a reward model's preferences."""
    out = []
    for group, scores in zip(groups, reward, strict=True):
        seen = {one.answer.text: x for one, x in zip(group, scores, strict=True) if x is not None and one.answer.ended and one.answer.text}
        order = sorted(seen, key=lambda text: -seen[text])
        if len(order) > 1:
            prompt = group[0].answer.prompt
            out.append(Ranked(prompt=prompt.messages, answers=order, scores=[seen[text] for text in order], meta=prompt.meta))
    return out


def bars(means: Sequence[float]) -> str:
    """A curve as one line of text: its bars, and where it begins, peaks and ends."""
    low, high = min(means), max(means)
    drawn = "".join(BARS[round((x - low) / ((high - low) or 1) * (len(BARS) - 1))] for x in means)
    peak = max(range(len(means)), key=lambda k: means[k])
    return f"{drawn} {means[0]:.3g} at n = 1, most {high:.3g} at n = {2**peak}, {means[-1]:.3g} at n = {2 ** (len(means) - 1)}"


def prepare(settings: BestOfN, run: Run) -> Job:
    s = settings
    model, tokenizer = load_policy(s.model, **s.compute.placed)
    how = {"tokenizer": tokenizer, **s.compute.placed}
    chooses = rater(s.raters.reward, **how)
    reports = rater(s.raters.report, **how) if s.raters.report else None
    prompts = asked(s.prompts, run, tokenizer, model, s.window, room=s.sampling.max_new, seed=s.seed)
    card: dict[str, Any] = dict(prompts.card)

    def make(path: Path, told: Callable[[int, int], None]) -> None:
        groups = draw(model, tokenizer, prompts, s.sampling, s.samples_per_prompt, ("best of n", s.seed), told)
        if ranks.rank():
            return
        reward = rated(chooses, groups)
        report = rated(reports, groups) if reports else None
        rows = curve(groups, reward, report, s.sampling.plain)
        found = {
            "rows": rows,
            "raters": s.raters.model_dump(),
            "samples": s.samples_per_prompt,
            "kl_from": "the model's own probabilities of its answers" if s.sampling.plain else "repeats among the samples",
        }
        write_jsonl(path, best(s, groups, reward, report))
        write_jsonl(run.file("rankings.jsonl"), ranked(groups, reward))
        atomic_write(run.file("curve.json"), json.dumps(found, indent=1) + "\n")
        total = sum(map(len, groups))
        card.update(
            tokens=sum(len(one.answer.tokens) for group in groups for one in group),
            unrated=sum(x is None for scores in reward for x in scores),
            cut_off=sum(not one.answer.ended for group in groups for one in group),
            again=round(1 - sum(len({tuple(one.answer.tokens) for one in group}) for group in groups) / total, 4),
            curve_prompts=rows[0]["reward"]["n"],
            **{name: bars([row[name]["mean"] for row in rows]) for name in ("reward", "report", "kl") if name in rows[0]},
        )

    return Job(make=make, card=card, artefact="chosen.jsonl")
