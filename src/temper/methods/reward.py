"""A reward model from comparisons: a scalar head on the SFT model, read at the answer's last token. Floor 5.

L = -log sigma(r_better - r_worse - margin) per pair, with soft labels and centring as settings (arXiv:2009.01325 eq. 1; margin
arXiv:2307.09288; centring arXiv:2312.09244). A ranking of K answers is its K(K-1)/2 pairs, averaged, in one forest: each answer is
computed once (arXiv:2203.02155 eq. 1). The last token is the end of the turn, and it is found by its index in the forest, never by
looking for padding. The prompt of a comparison is computed once.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.config import Settings, opt
from temper.data.trees import comparison_trees
from temper.forest import Forest, Tree
from temper.judges.reward_model import remember_scale
from temper.losses.reward import bradley_terry
from temper.methods.base import Batching, Job, Split, Window, forests, given, learn
from temper.models.adapt import Adapter
from temper.models.heads import scalar
from temper.models.load import export, load_scalar
from temper.records import Pair, Ranked
from temper.runs import Run
from temper.stats.intervals import mean_interval, paired_difference, share_interval
from temper.train import Compute, Loss, Optim, State, Step, Term

METRICS = {
    "loss": "Bradley-Terry loss per record",
    "accuracy": "share of pairs whose better answer scores strictly higher",
    "margin": "mean of r_better - r_worse",
    "held_out_accuracy": "accuracy against the labels of records kept out of training",
    "held_out_pairs": "pairs in these",
    "expected_accuracy": "the same in expectation over the raters, where their exact probabilities are known",
    "ceiling": "E max(P, 1 - P): what no model can exceed, where the raters' exact probabilities are known",
    "ceiling_gap": "ceiling - expected_accuracy, pair by pair",
}  # the held-out figures come with NAME_low and NAME_high, the ends of their 95% intervals
SCALED = 1000  # training records over whose answers the scores' mean and deviation are taken
EXAMPLES = """
  temper reward --model runs/sft --data hh.jsonl.gz --out runs/reward --skip-bad --too-long drop
  temper reward --model runs/sft --data runs/comparisons/rankings.jsonl --out runs/reward
"""


class Reward(Settings):
    """Train a reward model from pairs or rankings of answers."""

    model: str = opt(..., "the SFT model: a folder or a Hugging Face name")
    data: str = opt(..., "pairs (chosen/rejected, HH dialogues) or rankings, such as `temper collect` writes")
    centring: float = opt(0.01, "weight of (r_chosen + r_rejected)^2, which fixes the free constant", ge=0)
    window: Window = Window()
    split: Split = Split()
    batching: Batching = Batching(batch=64)
    optim: Optim = Optim(lr=1e-3, schedule="cosine", warmup=0.05)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


def settings(name: str) -> type[Settings]:
    return Reward


def count_records(trees: Sequence[Tree]) -> dict[str, float]:
    return {"records": float(len(trees))}


def ends(batch: Forest) -> tuple[Tensor, Tensor]:
    """Of pairs: the segments that hold the chosen and the rejected answers, [N] each, in the same order."""
    rank = batch.columns["rank"]
    return (rank == 0).nonzero()[:, 0], (rank == 1).nonzero()[:, 0]


class Compared(NamedTuple):
    """The comparisons in a forest. The answers are its segments of rank >= 0, in order."""

    answers: Tensor  # [A] segments
    better: Tensor  # [C] places in `answers`
    worse: Tensor  # [C]
    share: Tensor  # [C] one over the comparisons of the record


def compared(batch: Forest) -> Compared:
    """All pairs of answers of one record, the better first."""
    rank = batch.columns["rank"]
    answers = (rank >= 0).nonzero()[:, 0]
    rank = rank[answers]
    record = (rank == 0).cumsum(0)
    better, worse = ((record[:, None] == record) & (rank[:, None] < rank)).nonzero(as_tuple=True)
    return Compared(answers, better, worse, 1.0 / torch.bincount(record[better])[record[better]])


def make_loss(centring: float):
    def loss(model, batch: Forest) -> Loss:
        c = compared(batch)
        r = scalar(model, batch, batch.end[c.answers] - 1)
        won, lost = r[c.better], r[c.worse]
        margin, soft = (batch.columns[name][c.answers][c.better] for name in ("margin", "soft"))
        items = bradley_terry(won, lost, margin=margin, soft=soft, centring=centring) * c.share
        n, gap = len(c.better), (won - lost).detach()
        return Loss({"preference": Term(items.sum(), per="records")}, {"accuracy": ((gap > 0).sum(), n), "margin": (gap.sum(), n)})

    return loss


def scores(model, trees: Sequence[Tree], microbatch: int) -> list[list[float]]:
    """Raw scores of each record's answers, the best first."""
    out: list[list[float]] = [[] for _ in trees]
    with torch.no_grad():
        for index, forest in forests(trees, microbatch, count_records, model.device):
            answers = compared(forest).answers
            raw = iter(scalar(model, forest, forest.end[answers] - 1).tolist())
            for i in index:
                out[i] = [next(raw) for segment in trees[i] if segment.labels["rank"] >= 0]
    return out


def held_out(model, trees: Sequence[Tree], records: Sequence[Pair | Ranked], microbatch: int) -> dict[str, float]:
    """Accuracy on held-out comparisons; with the raters' exact probabilities also its expectation, its ceiling and the gap between.

    A record's pairs share its answers, so each interval is clustered by record.
    """
    pairs = [(i, better > worse) for i, each in enumerate(scores(model, trees, microbatch)) for better, worse in combinations(each, 2)]
    record, right = [i for i, _ in pairs], np.array([won for _, won in pairs], dtype=float)
    found = {"held_out_accuracy": share_interval(right, record)}
    if all(record.meta.keys() & {"probability", "probabilities"} for record in records):
        p = np.array([x for r in records for x in r.meta.get("probabilities", [r.meta.get("probability")])])
        expected, most = right * p + (1 - right) * (1 - p), np.maximum(p, 1 - p)
        found["expected_accuracy"] = mean_interval(expected, record)
        found["ceiling"] = mean_interval(most, record)
        found["ceiling_gap"] = paired_difference(most, expected, record)
    out: dict[str, float] = {"held_out_pairs": len(pairs)}
    for name, interval in found.items():
        out |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return out


def train(settings: Reward, model, trees, resume: State | None = None) -> Iterator[Step]:
    s = settings
    return learn(model, trees, make_loss(s.centring), s.batching, s.optim, resume, s.compute, count_records)


def prepare(settings: Reward, run: Run) -> Job:
    b = settings.batching
    model, tokenizer = load_scalar(settings.model, seed=b.seed, **settings.compute.placed, adapters=settings.adapters)
    trees, tests, _, tested, card = given(settings, "comparisons", lambda rows: comparison_trees(tokenizer, rows, model, settings.window))

    def finish(path: Path) -> str:
        seen = scores(model, trees[:SCALED], b.tokens_per_microbatch)
        remember_scale(model, torch.tensor([score for each in seen for score in each]))
        return export(model, tokenizer, path)

    return Job(
        total=b.steps(len(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=finish,
        card={
            **card,
            "records": len(trees),
            "comparisons": sum(comb(len(tree) - (tree[0].labels["rank"] < 0), 2) for tree in trees),
        },
        evaluate=(lambda: held_out(model, tests, tested, b.tokens_per_microbatch)) if tests else None,
    )
