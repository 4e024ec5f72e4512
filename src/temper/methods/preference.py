"""Learning from pairs, offline: DPO, and every rule registered in losses/preference.py. Floor 5.

L = -log sigma(beta h), h = (logp_w - ref_w) - (logp_l - ref_l), log-probabilities summed over the answer with its end-of-turn
token (arXiv:2305.18290 eq. 7). The reference is the model as it was loaded; its log-probabilities are computed once, kept
beside the run and are then data. Deviation: AdamW where the paper used RMSprop.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from temper.config import Settings, opt
from temper.data.template import stop_ids
from temper.data.trees import comparison_trees
from temper.forest import Forest, Tree, per_segment
from temper.losses.preference import RULES, Pairs
from temper.losses.registry import settings as keywords
from temper.methods.base import Batching, Job, Split, Window, forests, given, offline
from temper.methods.reward import count_records, ends
from temper.models.adapt import Adapter
from temper.models.adapters import shifts, without_adapter
from temper.models.heads import precision, slack, token_logp
from temper.models.load import export, load_policy
from temper.models.references import Kept
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term, fit, ranks

METRICS = {
    "loss": "the rule's loss per pair",
    "accuracy": "share of pairs whose chosen answer gained more over the reference; no measure of quality (arXiv:2406.02900)",
    "margin": "mean of h, the log-ratio of chosen over rejected, in nats",
    "chosen_logp": "mean log-probability of the chosen answers; its fall is expected",
    "rejected_logp": "mean log-probability of the rejected answers",
    "held_out_accuracy": "accuracy on pairs kept out of training",
}
EXAMPLES = """
  temper dpo --model runs/sft --data pairs.jsonl --out runs/dpo
  temper dpo --model runs/sft --data hh.jsonl.gz --out runs/dpo --beta 0.5 --skip-bad --too-long cut-prompt
"""


class Preference(Settings):
    """Move a model towards chosen and away from rejected answers."""

    rule: ClassVar[str]
    model: str = opt(..., "the SFT model: a folder or a Hugging Face name")
    data: str = opt(..., "pairs: chosen/rejected, HH dialogues, or the pairs of `temper collect`")
    window: Window = Window()
    split: Split = Split()
    batching: Batching = Batching(batch=64)
    optim: Optim = Optim(lr=1e-4, schedule="cosine", warmup=0.1)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()

    def own(self) -> dict[str, Any]:
        """What the rule itself is told."""
        return {name: getattr(self, name) for name in keywords(RULES[self.rule])}


@cache
def settings(name: str) -> type[Preference]:
    """Those of every rule over pairs, and the rule's own, read off its signature."""
    told = keywords(RULES[name]).values()
    fields: dict[str, Any] = {s.name: opt(s.default, s.help, **cast(Any, s.limits)) for s in told}
    types: dict[str, Any] = {"rule": ClassVar[str], **{s.name: s.kind for s in told}}
    about = (RULES[name].__doc__ or "").split("\n\n")[0]
    return type(name, (Preference,), {"__annotations__": types, "__doc__": about, "__module__": __name__, "rule": name, **fields})


def answer_logp(model, batch: Forest) -> Tensor:
    """[S]: the log-probability of each segment's learned tokens given what precedes them."""
    return per_segment(token_logp(model, batch).float(), batch, batch.learned)


def with_reference(model, trees: Sequence[Tree], microbatch: int, keep: Path | None = None) -> None:
    """Write the reference's log-probability onto each answer: to the loss, it is data.

    The reference is the model as it is, or what its adapter was put on. keep: a folder where what it gives is kept.
    """
    kept = Kept(keep, model, trees, microbatch=microbatch, ranks=ranks.count(), precision=str(precision(model))) if keep else None
    found = ranks.led(kept.read() if kept else None)
    if found is None:
        found = _reference(model, trees, microbatch)
        if kept and ranks.rank() == 0:
            kept.write(found)
    for tree, values in zip(trees, found, strict=True):
        for segment, value in zip(tree, values, strict=True):
            segment.labels = {**segment.labels, "ref_logp": value}


def references(run: Run | None) -> Path | None:
    """Where runs beside each other keep their references' log-probabilities; nowhere without a run."""
    return run.folder.parent / ".references" if run else None


def _reference(model, trees: Sequence[Tree], microbatch: int) -> list[list[float]]:
    """One number per segment of each tree; the ranks share the work."""
    mine = ranks.share([sum(len(s.tokens) for s in tree) for tree in trees])
    found: list[list[float]] = [[] for _ in mine]
    with torch.no_grad(), without_adapter(model):
        for index, forest in forests([trees[i] for i in mine], microbatch, count_records, model.device):
            logp = iter(answer_logp(model, forest).tolist())
            for i in index:
                found[i] = [next(logp) for _ in trees[mine[i]]]
    return ranks.whole(mine, found)


def make_loss(rule):
    def loss(model, batch: Forest) -> Loss:
        chosen, rejected = ends(batch)
        logp, ref = answer_logp(model, batch), batch.columns["ref_logp"]
        length = per_segment((batch.target > 0).float(), batch)
        pairs = Pairs(logp[chosen], logp[rejected], ref[chosen], ref[rejected], length[chosen], length[rejected])
        items = rule(pairs, soft=batch.columns["soft"][chosen])
        n, h = len(chosen), pairs.margin.detach()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "accuracy": ((h > 0).sum(), n),
            "margin": (h.sum(), n),
            "chosen_logp": (pairs.chosen.detach().sum(), n),
            "rejected_logp": (pairs.rejected.detach().sum(), n),
        }
        return Loss({"preference": Term(items.sum(), per="records")}, metrics)

    return loss


def check_reference(model, batches: Sequence[Forest]) -> None:
    """At step 0 the policy is the reference, so every h is 0 and DPO's loss is ln 2. (But for a new soft prompt, which is something.)"""
    if shifts(model):
        return
    with torch.no_grad():
        gap = max((float((answer_logp(model, b) - b.columns["ref_logp"]).abs().max()) for b in batches), default=0.0)
    if gap > slack(model, 1e-3, 0.5):
        raise AssertionError(f"policy and reference differ by {gap:.2g} nats on an answer; they must be the same model")


def train_on(
    model, trees, name: str, how: dict, b: Batching, optim: Optim, steps: int, resume: State | None = None, compute: Compute = Compute()
) -> Iterator[Step]:
    """Train on pair trees that carry their reference log-probs, by the rule of that name with settings `how`."""
    source, loss = offline(trees, b, count_records), make_loss(partial(RULES[name], **how))
    return fit(model, source, loss, steps=steps, optim=optim, seed=b.seed, resume=resume, check=check_reference, compute=compute)


def train(settings: Preference, model, trees, resume: State | None = None) -> Iterator[Step]:
    s, b = settings, settings.batching
    return train_on(model, trees, s.rule, s.own(), b, s.optim, b.steps(len(trees)), resume, s.compute)


def prepare(settings: Preference, run: Run) -> Job:
    b = settings.batching
    model, tokenizer = load_policy(settings.model, **settings.compute.placed, adapters=settings.adapters, seed=b.seed)
    trees, tests, out, _, card = given(settings, "pairs", lambda pairs: comparison_trees(tokenizer, pairs, model, settings.window))
    with_reference(model, [*trees, *tests], b.tokens_per_microbatch, references(run))

    def held_out() -> dict[str, float]:
        right = 0
        with torch.no_grad():
            for _, forest in forests(tests, b.tokens_per_microbatch, count_records, model.device):
                chosen, rejected = ends(forest)
                gain = answer_logp(model, forest) - forest.columns["ref_logp"]
                right += int((gain[chosen] > gain[rejected]).sum())
        return {"held_out_accuracy": right / len(tests), "held_out_pairs": len(tests)}

    return Job(
        total=b.steps(len(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=lambda path: export(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={**card, "pairs": len(trees)},
        evaluate=held_out if tests else None,
        policy=(model, tokenizer),
        asks=[pair.prompt for pair in out[:4]],
    )
