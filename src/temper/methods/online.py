"""Online preference learning: sample answers, have them rated, learn from the best and the worst of each prompt; again. Floor 5.

Direct alignment from online feedback (arXiv:2402.04792): the pairs come from the policy of the moment, so the loss sees what the model
would say now. The rater is a reward model or the embedded world's exact score; the loss any offline rule by name, DPO by default.
Each rollout is learned from once, in one step, so that none is ever pending: to resume is to sample again from the same weights.
Log-probs, the reference's too, are those at the sampling temperature, so that `kl` is the policy's own.
An answer without a rating is left out and counted; a prompt whose answers are rated alike gives no pair and is counted.
Deviations: the rater is not asked for a preference between two but for a score of each; more than two answers give one pair.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from temper.config import Settings, UserError, opt
from temper.data.template import stop_ids
from temper.forest import Forest, Segment, Tree
from temper.judges.rating import REWARDS, Answer, Rater, ask, rater
from temper.losses.preference import RULES
from temper.methods.base import Asked, Job, Window, asked, microbatches
from temper.methods.comparisons import count_records
from temper.methods.preference import METRICS as OFFLINE
from temper.methods.preference import check_reference, make_loss, with_reference
from temper.methods.rated import EQUAL
from temper.methods.rules import any_rule, told
from temper.methods.start import begin
from temper.models.adapt import Adapter
from temper.models.load import export
from temper.records import Prompt
from temper.rollout import Request, Rollout, Sampling, sample
from temper.runs import Run
from temper.train import Compute, Optim, State, Step, TrainingError, fit, ranks

BARREN = 4  # rollouts without any pair that are enough to give up
METRICS = {
    **{name: text for name, text in OFFLINE.items() if not name.startswith("held_out")},
    "reward": "mean rating of the sampled answers",
    "gap": "mean rating of the best answer to a prompt less that of the worst",
    "unrated": "share of answers that the rater gave no rating",
    "alike": "share of prompts that gave no pair: fewer than two answers were rated, or all alike",
    "kl": "mean over sampled answers of the summed log-ratio of policy over reference (k1), in nats",
    "kl_error": "standard error of kl",
    "entropy": "mean of -log p over the sampled tokens, in nats",
    "length": "mean tokens of an answer",
    "truncated": "share of answers that reached --max-new without ending",
    "sampler_gap": "difference between the sampler's and the trainer's log-prob of an answer, per token",
}
EXAMPLES = """
  temper online-dpo --model runs/sft --reward runs/reward --prompts prompts.jsonl --out runs/online
  temper online-dpo --model runs/sft --reward gold --prompts 'world:prompts?n=2000' --rule ipo --tau 0.1 --out runs/online
"""


class Online(Settings):
    """Online DPO: learn from pairs of the model's own fresh answers, ordered by a rater (arXiv:2402.04792).

    For when answers can be rated at any time: the pairs stay on what the model says now, which offline pairs do not. It holds as many
    models as PPO less the value model, and needs no tuning of advantages; the loss is any offline one (--rule).
    """

    model: str = opt(..., "the SFT model: policy and reference start from it")
    reward: str = opt(..., f"what rates an answer: {REWARDS}")
    prompts: str = opt(..., "prompts to answer: a file, or world:prompts")
    rule: str = opt("dpo", f"the loss over pairs: {', '.join(RULES)}")
    rollouts: int = opt(100, "times to sample, each followed by one optimiser step", ge=1)
    prompts_per_step: int = opt(64, "prompts per rollout", ge=1)
    samples_per_prompt: int = opt(2, "answers to each; the best and the worst become a pair", ge=2)
    missing_eos: float | None = opt(-1.0, "most that an answer can be rated that did not end; none: its own rating")
    tokens_per_microbatch: int = opt(8192, "tokens computed at a time; the result does not depend on it", ge=1)
    seed: int = opt(0, "of prompts and samples", ge=0)
    sampling: Sampling = Sampling()
    window: Window = Window()
    optim: Optim = Optim(lr=1e-4, schedule="linear", warmup=0.05)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


@cache
def settings(name: str) -> type[Online]:
    return any_rule(Online, RULES)


class Group(NamedTuple):
    """A prompt with its sampled answers and their ratings."""

    prompt: list[int]
    answers: list[Rollout]
    ratings: list[float | None]

    def tree(self) -> Tree:
        """The prompt, and all answers under it."""
        answers = [
            Segment(a.tokens, [1.0] * len(a.tokens), parent=0, labels={"soft": 1.0, "sampler_logp": sum(a.logp)}) for a in self.answers
        ]
        return [Segment(self.prompt, [0.0] * len(self.prompt), labels={"rank": -1.0}), *answers]

    def pair(self, tree: Tree) -> Tree | None:
        """Of its tree the prompt, the best and the worst answer; None where no two ratings differ."""
        rated = [(rating, i) for i, rating in enumerate(self.ratings) if rating is not None]
        if not rated or max(rated)[0] - min(rated)[0] < EQUAL:
            return None
        (low, worst), (high, best) = min(rated), max(rated, key=lambda one: (one[0], -one[1]))
        ends = [(tree[1 + best], 0.0), (tree[1 + worst], 1.0)]
        for segment, rank in ends:
            segment.labels = {**segment.labels, "rank": rank, "margin": high - low}
        return [tree[0], *(segment for segment, _ in ends)]


class Pairs:
    """The source: step -> micro-batches of pairs that were sampled for it."""

    def __init__(self, s: Online, model: Any, reference: Any, rater: Rater, prompts: Asked, tokenizer):
        self.s, self.model, self.reference, self.rater = s, model, reference, rater
        self.records, self.prompts, self.order, self.tokenizer = prompts.records, prompts.ids, prompts.order, tokenizer
        self.found, self.last = 0, dict[str, float]()  # pairs so far
        self.why = ""  # an answer could not be rated

    def __call__(self, step: int) -> list[Forest]:
        s, groups = self.s, self._sample(step)
        trees = [group.tree() for group in groups]
        if self.reference is not None:
            with_reference(self.reference, trees, s.tokens_per_microbatch, temperature=s.sampling.temperature)
        pairs = [pair for group, tree in zip(groups, trees, strict=True) if (pair := group.pair(tree))]
        self.last, self.found = _summary(groups, trees, len(pairs)), self.found + len(pairs)
        if not self.found and step + 1 >= BARREN:
            unrated = f"{self.last['unrated']:.0%} of the answers had no rating by {self.rater.name}"
            why = f" ({self.why})" if self.why else ""
            raise TrainingError(
                f"{step + 1} rollouts gave no pair: {unrated}{why}, the others to a prompt were rated alike; look at --reward"
            )
        return microbatches(pairs or [_alone(trees[0])], s.tokens_per_microbatch, count_records)

    def reads(self, step: int) -> bool:
        return True

    def metrics(self, step: int) -> dict[str, float]:
        return self.last

    def state(self) -> State:
        return {"found": self.found}

    def restore(self, state: State) -> None:
        self.found = state["found"]

    def _sample(self, rollout: int) -> list[Group]:
        """The ranks share the prompts; each samples and rates its own."""
        s = self.s
        rows = self.order.rows(min(s.prompts_per_step, self.order.n), rollout)
        every = [self.prompts[row] for row in rows]
        mine = ranks.share([len(ids) for ids in every])
        stop, prompts, seed = stop_ids(self.tokenizer), [every[i] for i in mine], ("online", s.seed, rollout)
        sampled = sample(self.model, Request(prompts, sampling=s.sampling, stop=stop, n=s.samples_per_prompt, seed=seed, index=mine))
        records = [self.records[rows[i]] for i in mine]
        flat = [self._answer(record, ids, a) for record, ids, answers in zip(records, prompts, sampled, strict=True) for a in answers]
        rated = ask(self.rater, flat)
        self.why = "; ".join(failure.first for failure in rated.failures.values()) or self.why
        ratings = iter([self._capped(answer, rating) for answer, rating in zip(flat, rated.scores, strict=True)])
        groups = [Group(ids, answers, [next(ratings) for _ in answers]) for ids, answers in zip(prompts, sampled, strict=True)]
        return ranks.whole(mine, groups)

    def _answer(self, prompt: Prompt, ids: list[int], a: Rollout) -> Answer:
        text = self.tokenizer.decode(a.tokens, skip_special_tokens=True).strip()
        return Answer(prompt, ids, a.tokens, text, a.finish == "stop")

    def _capped(self, answer: Answer, rating: float | None) -> float | None:
        most = self.s.missing_eos
        return rating if answer.ended or rating is None or most is None else min(rating, most)


def _alone(tree: Tree) -> Tree:
    """The prompt and one answer: nothing to compare, so that the loss and its gradient are 0 exactly."""
    answer = tree[1]
    return [tree[0], Segment(answer.tokens, answer.target, parent=0, labels={**answer.labels, "rank": 0.0, "margin": 0.0})]


def _summary(groups: Sequence[Group], trees: Sequence[Tree], pairs: int) -> dict[str, float]:
    """Of all answers of a rollout. A figure that nothing speaks of is left out."""
    answers = [a for group in groups for a in group.answers]
    rated = [[r for r in group.ratings if r is not None] for group in groups]
    flat = [r for some in rated for r in some]
    found = {
        "unrated": 1 - len(flat) / len(answers),
        "alike": 1 - pairs / len(groups),
        "entropy": -sum(sum(a.logp) for a in answers) / sum(len(a.tokens) for a in answers),
        "length": sum(len(a.tokens) for a in answers) / len(answers),
        "truncated": sum(a.finish != "stop" for a in answers) / len(answers),
    }
    if flat:
        found |= {"reward": sum(flat) / len(flat), "gap": sum(max(some) - min(some) for some in rated if some) / sum(map(bool, rated))}
    if "ref_logp" in trees[0][1].labels:
        kl = torch.tensor([s.labels["sampler_logp"] - s.labels["ref_logp"] for tree in trees for s in tree[1:]], dtype=torch.double)
        found |= {"kl": float(kl.mean()), "kl_error": float(kl.std() / len(kl) ** 0.5)}
    return found


def train(settings: Online, model: Any, source: Pairs, resume: State | None = None) -> Iterator[Step]:
    s, rule, temperature = settings, RULES[settings.rule], settings.sampling.temperature
    loss, check = make_loss(rule, told(s, RULES), temperature), partial(check_reference, temperature=temperature)
    how: dict[str, Any] = {"steps": s.rollouts, "optim": s.optim, "seed": s.seed, "compute": s.compute}
    return fit(model, source, loss, resume=resume, check=check if rule.reference else None, **how)


def prepare(settings: Online, run: Run) -> Job:
    s = settings
    how = told(s, RULES)
    if not s.sampling.temperature or not s.sampling.plain:
        what = s.sampling.truncates or f"temperature {s.sampling.temperature:g}, repetition penalty {s.sampling.repetition_penalty:g}"
        raise UserError(
            f"{what}: answers must be drawn from the policy's own distribution; give a temperature above 0 and leave the rest out"
        )
    model, reference, tokenizer = begin(s, seed=s.seed)
    reference = reference if RULES[s.rule].reference else None
    rates = rater(s.reward, tokenizer=tokenizer, **s.compute.placed, beside=model)
    prompts = asked(s.prompts, run, tokenizer, model, s.window, room=s.sampling.max_new, seed=s.seed)
    source = Pairs(s, model, reference, rates, prompts, tokenizer)
    return Job(
        total=s.rollouts,
        steps=lambda resume: train(s, model, source, resume),
        save=lambda path: export(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={
            **prompts.card,
            "rater": rates.name,
            "rule": ", ".join([s.rule, *(f"{name} {value}" for name, value in how.items())]),
        },
        policy=(model, tokenizer),
        asks=[r.messages for r in prompts.records[:4]],
    )
