"""Learning from thumbs, up or down: KTO, and every rule registered in losses/unpaired.py. Floor 5.

KTO (arXiv:2402.01306 eq. 8) compares an answer's log-ratio with z0, what policy and reference differ by anyway. z0 is the mean
log-ratio of mismatched pairs, at least 0: each prompt of the *global* batch with the next answer of the batch that belongs to another
prompt. It needs the whole batch and the policy of the moment, so the source computes it, without gradient, before the step, and writes
it as a column; the loss sees data. The reference's side of it is computed before training, for every step of it: the batches are known.
BCO (arXiv:2404.04656) compares with the middle of the classes' mean log-ratios, found in the same way and averaged over steps.

Deviations: AdamW; of BCO no density-ratio weighting, and an exponential mean in the place of one over all steps, which lags behind.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from temper.config import Settings, UserError, opt
from temper.data.store import Trees, label
from temper.data.template import stop_ids
from temper.data.trees import Chunk, comparison_chunk, limit_of, where
from temper.forest import Forest, Segment, Tree
from temper.losses.registry import settings as keywords
from temper.losses.unpaired import RULES, Answers
from temper.methods.base import Batching, Job, Prepared, Split, Window, epoch, forests, given, offline, rows_of, way
from temper.methods.preference import answer_logp, check_reference, references, with_reference
from temper.methods.rules import settings_of
from temper.models.adapt import Adapter
from temper.models.load import export, load_policy
from temper.records import Rated
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term, fit, ranks

METRICS = {
    "loss": "the rule's loss per answer",
    "good_gain": "mean log-ratio of policy over reference of answers with a thumb up, in nats",
    "bad_gain": "the same of answers with a thumb down",
    "point": "what gains are compared with, in nats: KTO's z0, at least 0; BCO's delta / beta",
    "held_out_auc": "share of pairs of a good and a bad answer, kept out of training, of which the good one gained more",
    "held_out_answers": "answers kept out of training",
}
MOMENTUM = 0.9  # of BCO's point: it follows about the last ten steps
RANGE = (1.0, 1.5)  # of the classes' total weights, good over bad (arXiv:2402.01306, sec. 4.2)
EXAMPLES = """
  temper METHOD --model runs/sft --data thumbs.jsonl --out runs/METHOD
  temper METHOD --model runs/sft --data runs/comparisons/pairs.jsonl --out runs/METHOD --beta 0.2
"""


class Unpaired(Settings):
    """Move a model towards answers with a thumb up and away from those with a thumb down."""

    rule: ClassVar[str]
    model: str = opt(..., "the SFT model: a folder or a Hugging Face name")
    data: str = opt(..., "answers with a thumb; or pairs, of which each is a thumb up and a thumb down")
    desirable_weight: float | None = opt(
        None, "of thumbs up; none: by the counts, see `class_weights` on the card; 1 where the other is given", gt=0
    )
    undesirable_weight: float | None = opt(None, "of thumbs down; none: as above", gt=0)
    window: Window = Window()
    split: Split = Split()
    batching: Batching = Batching(batch=64)
    optim: Optim = Optim(lr=1e-4, schedule="cosine", warmup=0.1)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


@cache
def settings(name: str) -> type[Unpaired]:
    return settings_of(Unpaired, name, RULES[name])


def class_weights(good: int, bad: int, up: float | None, down: float | None) -> tuple[float, float]:
    """Weights of a thumb up and of a thumb down.

    Where none is given, the rarer class gets the least weight above 1 that puts (lambda_D n_D) / (lambda_U n_U) into RANGE.
    """
    if up is not None or down is not None:
        return up or 1.0, down or 1.0
    low, high = RANGE
    ratio = good / bad
    return max(1.0, low / ratio), max(1.0, ratio / high)


def count_answers(trees: Sequence[Tree]) -> dict[str, float]:
    return {"records": float(len(trees))}


class Mismatched(Sequence[Tree]):
    """Prompts of some trees with the answers of others, made when they are asked for."""

    def __init__(self, trees: Sequence[Tree], pairs: Sequence[tuple[int, int]]) -> None:
        """pairs: whose prompt, whose answer."""
        self.trees, self.pairs = trees, np.array(pairs, np.int32)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: Any) -> Any:
        (prompt, _), (_, answer) = (self.trees[k] for k in self.pairs[i].tolist())
        return [Segment(prompt.tokens, prompt.target), Segment(answer.tokens, answer.target, parent=0)]


def mismatches(trees: Sequence[Tree], b: Batching, steps: int, window: int | None) -> list[Trees]:
    """Of each step: the prompts of its batch, each with the next answer of the batch that is to another prompt and fits.

    Raises UserError for a batch without two different prompts.
    """
    made, chosen = [], rows_of(trees, b)
    for step in range(steps):
        at = chosen(step)
        rows = [trees[i] for i in at]
        found: list[tuple[int, int]] = []
        for i, (prompt, _) in enumerate(rows):
            others = [*range(i + 1, len(rows)), *range(i)]
            other = next((k for k in others if _mismatched(prompt, rows[k][0], rows[k][1], window)), None)
            if other is not None:
                found.append((at[i], at[other]))
        if not found:
            raise UserError(f"step {step + 1}: its {len(rows)} answers are all to one prompt, so none can be mismatched; raise --batch")
        made.append(Trees([(Mismatched(trees, found), np.arange(len(found)))], [1.0]))
    return made


def _mismatched(prompt: Segment, other: Segment, answer: Segment, window: int | None) -> bool:
    return prompt.tokens != other.tokens and (window is None or len(prompt.tokens) + len(answer.tokens) <= window)


class Pointed:
    """The source: step -> micro-batches with the label `point`. BCO's moving means are its state."""

    def __init__(self, model: Any, trees: Sequence[Tree], b: Batching, others: Sequence[Sequence[Tree]] | None) -> None:
        """others: of each step the mismatched pairs; None: the point is the balance of the step's own answers."""
        self.model, self.trees, self.b, self.others = model, trees, b, others
        self.source, self.rows = offline(trees, b, count_answers), rows_of(trees, b)
        self.means: dict[str, float] = {}
        self.point = 0.0

    def __call__(self, step: int) -> list[Forest]:
        self.point = self._balance(step) if self.others is None else self._drift(self.others[step])
        batches = self.source(step)
        for batch in batches:
            batch.columns["point"] = torch.full((batch.S,), self.point)
            batch.labels |= {"point"}
        return batches

    def reads(self, step: int) -> bool:
        return True

    def metrics(self, step: int) -> dict[str, float]:
        return {"point": self.point}

    def state(self) -> State:
        return {"means": dict(self.means)}

    def restore(self, state: State) -> None:
        self.means = dict(state["means"])

    def _drift(self, others: Sequence[Tree]) -> float:
        return max(0.0, self._sums(others)["sum of good"] / len(others))

    def _balance(self, step: int) -> float:
        sums = self._sums([self.trees[i] for i in self.rows(step)])
        for name in "good", "bad":
            if n := sums[f"number of {name}"]:
                now = sums[f"sum of {name}"] / n
                self.means[name] = MOMENTUM * self.means.get(name, now) + (1 - MOMENTUM) * now
        return sum(self.means.values()) / len(self.means)

    def _sums(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Log-ratios of the trees' answers under the policy of the moment, summed over all ranks."""
        mine = ranks.share([sum(len(s.tokens) for s in tree) for tree in trees])
        gains = log_ratios(self.model, [trees[i] for i in mine], self.b.tokens_per_microbatch)
        found = dict.fromkeys(("sum of good", "number of good", "sum of bad", "number of bad"), 0.0)
        for i, gain in zip(mine, gains, strict=True):
            name = "good" if trees[i][1].labels.get("good", 1.0) else "bad"
            found[f"sum of {name}"] += gain
            found[f"number of {name}"] += 1
        return ranks.all_sum(found)


def log_ratios(model: Any, trees: Sequence[Tree], microbatch: int) -> list[float]:
    """log pi - log pi_ref of each tree's answer."""
    out = [0.0] * len(trees)
    with torch.no_grad():
        for index, forest in forests(trees, microbatch, count_answers, model.device):
            gain = answer_logp(model, forest) - forest.columns["ref_logp"]
            for i, value in zip(index, gain[forest.parent >= 0].tolist(), strict=True):
                out[i] = value
    return out


def make_loss(rule, how: dict[str, Any]):
    def loss(model, batch: Forest) -> Loss:
        at = batch.parent >= 0
        gain = (answer_logp(model, batch) - batch.columns["ref_logp"])[at]
        good, point, weight = (batch.columns[name][at] for name in ("good", "point", "weight"))
        items = rule(Answers(gain, good > 0, point, weight), **how)
        now = gain.detach()
        metrics: dict[str, Any] = {"good_gain": ((now * good).sum(), good.sum()), "bad_gain": ((now * (1 - good)).sum(), (1 - good).sum())}
        return Loss({"preference": Term(items.sum(), per="records")}, metrics)

    return loss


def thumb_chunk(records: Sequence[Rated], *, rule: str, **how: Any) -> Chunk:
    """Answers with a thumb."""
    for i, row in enumerate(records):
        if row.rating not in (0, 1):
            raise UserError(f"{where(row, i)}: rating {row.rating:g}; {rule} learns from thumbs, 1 up and 0 down")
    return comparison_chunk(records, **how)


def ratings(trees: Sequence[Tree]) -> list[float]:
    """Of each answer."""
    return [answer.labels["rating"] for _, answer in trees]


def weigh(trees: Sequence[Tree], up: float, down: float) -> None:
    """Write onto each answer which thumb it got and what it weighs: to the loss, both are data."""
    found = ratings(trees)
    label(trees, "good", [[0.0, good] for good in found])
    label(trees, "weight", [[0.0, up if good else down] for good in found])


def train(settings: Unpaired, model, trees, others: Sequence[Sequence[Tree]] | None, resume: State | None = None) -> Iterator[Step]:
    """On labelled trees that carry their reference log-probs."""
    s, b, rule = settings, settings.batching, RULES[settings.rule]
    how = {name: getattr(s, name) for name in keywords(rule)}
    source, steps = Pointed(model, trees, b, others), b.steps(epoch(trees))
    loss = make_loss(rule, how)
    return fit(model, source, loss, steps=steps, optim=s.optim, seed=b.seed, resume=resume, check=check_reference, compute=s.compute)


def prepare(settings: Unpaired, run: Run) -> Job:
    s, b, rule = settings, settings.batching, RULES[settings.rule]
    model, tokenizer = load_policy(s.model, **s.compute.placed, adapters=s.adapters, seed=b.seed)

    trees, tests, out, _, card, corpus, whole = given(s, run, "rated", way(thumb_chunk, tokenizer, model, s.window, rule=s.rule))
    good = int(sum(ratings(trees)))
    bad = len(trees) - good
    if not good or not bad:
        only = "up" if good else "down"
        raise UserError(f"{s.data}: its {len(trees)} thumbs are all {only}; {s.rule} needs answers of both kinds")
    up, down = class_weights(good, bad, s.desirable_weight, s.undesirable_weight)
    weigh(trees, up, down)
    weigh(tests, up, down)
    others = None
    if rule.point == "mismatched":
        if b.rows(epoch(trees)) < 2:
            raise UserError(f"--batch {b.batch}: {s.rule} compares an answer with those to the batch's other prompts; give at least 2")
        others = mismatches(trees, b, b.steps(epoch(trees)), limit_of(model, None)[0])
    with_reference(model, trees, b.tokens_per_microbatch, references(run), also=[tests, *(others or [])])

    def held_out() -> dict[str, float]:
        gains = torch.tensor(log_ratios(model, tests, b.tokens_per_microbatch))
        up = torch.tensor([answer.labels["good"] > 0 for _, answer in tests])
        higher = torch.sign(gains[up][:, None] - gains[~up])
        return {"held_out_answers": len(tests)} | ({"held_out_auc": float((higher.mean() + 1) / 2)} if higher.numel() else {})

    weighed = up * good / (down * bad)
    return Job(
        total=b.steps(epoch(trees)),
        steps=lambda resume: train(s, model, trees, others, resume),
        save=lambda path: export(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={
            **card,
            "records": len(trees),
            "thumbs": f"{good} up, {bad} down",
            "class_weights": f"up {up:.3g}, down {down:.3g}; together {weighed:.3g} (arXiv:2402.01306 advises 1 to 1.5)",
        },
        evaluate=held_out if tests else None,
        policy=(model, tokenizer),
        asks=[record.prompt for record in out[:4]],
        prepared=Prepared(corpus, tokenizer, model, whole=whole),
    )
