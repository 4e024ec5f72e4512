"""A reward model from preference pairs: a scalar head on the SFT model, read at the answer's last token. Floor 5.

L = -log sigma(r_chosen - r_rejected - margin), with soft labels and centring as settings (arXiv:2009.01325 eq. 1;
arXiv:2203.02155 eq. 1; margin arXiv:2307.09288; centring arXiv:2312.09244). The last token is the end of the turn, and it is
found by its index in the forest, never by looking for padding. The prompt of a pair is computed once.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from temper.config import Settings, opt
from temper.data.sources import read
from temper.data.split import split
from temper.data.trees import pair_trees
from temper.forest import Forest, Tree
from temper.judges.reward_model import remember_scale
from temper.losses.reward import bradley_terry
from temper.methods.base import Batching, Job, Split, Window, forests, offline
from temper.models.heads import scalar
from temper.models.load import load_scalar, save
from temper.runs import Run
from temper.train import Loss, Optim, State, Step, Term, fit

METRICS = {
    "loss": "Bradley-Terry loss per pair",
    "accuracy": "share of pairs whose chosen answer scores strictly higher",
    "margin": "mean of r_chosen - r_rejected",
    "held_out_accuracy": "accuracy against the labels of pairs kept out of training",
    "expected_accuracy": "the same in expectation over the raters, where their exact probabilities are known",
    "ceiling": "E max(P, 1 - P): what no model can exceed, where the raters' exact probabilities are known",
}
EXAMPLES = """
  temper reward --model runs/sft --data hh.jsonl.gz --out runs/reward --skip-bad --too-long drop
"""


class Reward(Settings):
    """Train a reward model from pairs of answers."""

    model: str = opt(..., "the SFT model: a folder or a Hugging Face name")
    data: str = opt(..., "pairs: chosen/rejected, HH dialogues, or the pairs of `temper collect`")
    centring: float = opt(0.01, "weight of (r_chosen + r_rejected)^2, which fixes the free constant", ge=0)
    window: Window = Window()
    split: Split = Split()
    batching: Batching = Batching(batch=64)
    optim: Optim = Optim(lr=1e-3, schedule="cosine", warmup=0.05)


def settings(name: str) -> type[Settings]:
    return Reward


def count_pairs(trees: Sequence[Tree]) -> dict[str, float]:
    return {"pairs": float(len(trees))}


def ends(batch: Forest) -> tuple[Tensor, Tensor]:
    """Indices of the segments that hold the chosen and the rejected answers, [N] each, in the same order."""
    side = batch.columns["side"]
    return (side > 0).nonzero()[:, 0], (side < 0).nonzero()[:, 0]


def make_loss(centring: float):
    def loss(model, batch: Forest) -> Loss:
        chosen, rejected = ends(batch)
        r = scalar(model, batch, torch.cat([batch.end[chosen], batch.end[rejected]]) - 1)
        won, lost = r.chunk(2)
        items = bradley_terry(won, lost, margin=batch.columns["margin"][chosen], soft=batch.columns["soft"][chosen], centring=centring)
        n, gap = len(chosen), (won - lost).detach()
        return Loss({"preference": Term(items.sum(), per="pairs")}, {"accuracy": ((gap > 0).sum(), n), "margin": (gap.sum(), n)})

    return loss


def scores(model, trees: Sequence[Tree], microbatch: int) -> tuple[Tensor, Tensor]:
    """Raw scores of the chosen and rejected answers, [N] each, in the order of the trees."""
    out = torch.zeros(2, len(trees))
    with torch.no_grad():
        for index, forest in forests(trees, microbatch, count_pairs):
            for row, segments in enumerate(ends(forest)):
                out[row, index] = scalar(model, forest, forest.end[segments] - 1).float()
    return out[0], out[1]


def held_out(model, trees: Sequence[Tree], records, microbatch: int) -> dict[str, float]:
    """Accuracy on held-out pairs; with the raters' exact probabilities also its expectation and its ceiling."""
    won, lost = scores(model, trees, microbatch)
    right = (won > lost).double()
    out = {"held_out_accuracy": float(right.mean()), "held_out_pairs": len(trees)}
    if all("probability" in r.meta for r in records):
        p = torch.tensor([r.meta["probability"] for r in records], dtype=torch.double)
        out["expected_accuracy"] = float((right * p + (1 - right) * (1 - p)).mean())
        out["ceiling"] = float(torch.maximum(p, 1 - p).mean())
    return out


def train(settings: Reward, model, trees, resume: State | None = None) -> Iterator[Step]:
    b = settings.batching
    return fit(
        model,
        offline(trees, b, count_pairs),
        make_loss(settings.centring),
        steps=b.steps(len(trees)),
        optim=settings.optim,
        seed=b.seed,
        resume=resume,
    )


def prepare(settings: Reward, run: Run) -> Job:
    b = settings.batching
    model, tokenizer = load_scalar(settings.model, seed=b.seed)
    records, report = read(settings.data, "pairs", skip_bad=settings.window.skip_bad)
    kept, out = split(records, settings.split.held_out, b.seed)
    trees, cut = pair_trees(tokenizer, kept, model, settings.window)
    tests, test_cut = pair_trees(tokenizer, out, model, settings.window)
    tested = [r for i, r in enumerate(out) if i not in test_cut.dropped]

    def finish(path: Path) -> None:
        remember_scale(model, torch.cat(scores(model, trees, b.tokens_per_microbatch)))
        save(model, tokenizer, path)

    return Job(
        total=b.steps(len(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=finish,
        card={
            "source": report.summary(),
            "pairs": len(trees),
            "held_out": len(tests),
            "tokens": sum(len(s.tokens) for t in trees for s in t),
            "cut": cut.summary(),
            "cut_held_out": test_cut.summary() if out else "",
        },
        evaluate=(lambda: held_out(model, tests, tested, b.tokens_per_microbatch)) if tests else None,
    )
