"""Learning from comparisons of answers, offline: DPO, and every rule registered in losses/preference.py. Floor 5.

L = -log sigma(beta h), h = (logp_w - ref_w) - (logp_l - ref_l), log-probabilities summed over the answer with its end-of-turn
token (arXiv:2305.18290 eq. 7). The reference is the model as it was loaded; its log-probabilities are computed once, kept
beside the run and are then data; a rule without a reference computes none. A ranking of K answers is its K(K-1)/2 pairs, averaged, in
one forest: each answer is computed once; a listwise rule takes it as it is. Deviation: AdamW where the paper used RMSprop.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.config import Settings, UserError, opt
from temper.data.store import Trees, label, sizes_of
from temper.data.template import stop_ids
from temper.data.trees import comparison_chunk
from temper.forest import Forest, Tree, per_segment
from temper.losses.preference import RULES, Pairs, Rankings, Rule
from temper.losses.registry import settings as keywords
from temper.methods.base import Batching, Job, Prepared, Split, Window, epoch, forests, given, offline, way
from temper.methods.comparisons import compared, count_records
from temper.methods.rules import settings_of
from temper.models.adapt import Adapter
from temper.models.adapters import shifts, without_adapter
from temper.models.heads import precision, slack, token_logp
from temper.models.load import export, load_policy
from temper.models.references import Kept
from temper.runs import Run
from temper.stats.intervals import share_interval
from temper.train import Compute, Loss, Optim, State, Step, Term, fit, ranks

METRICS = {
    "loss": "the rule's loss per record",
    "accuracy": "share of comparisons with h > 0; no measure of quality (arXiv:2406.02900)",
    "margin": "mean of h, the log-ratio of the better answer over the worse, in nats; relative to the reference where the rule has one",
    "chosen_logp": "mean log-probability of the better answers; its fall is expected",
    "rejected_logp": "mean log-probability of the worse answers",
    "held_out_accuracy": "accuracy on records kept out of training",
    "held_out_pairs": "comparisons in these",
}
EXAMPLES = """
  temper METHOD --model runs/sft --data pairs.jsonl --out runs/METHOD
  temper METHOD --model runs/sft --data runs/comparisons/rankings.jsonl --out runs/METHOD --lr 5e-5
  temper METHOD --model runs/sft --data hh.jsonl.gz --out runs/METHOD --skip-bad --too-long cut-prompt
"""


class Preference(Settings):
    """Move a model towards chosen and away from rejected answers."""

    rule: ClassVar[str]
    model: str = opt(..., "the SFT model: a folder or a Hugging Face name")
    data: str = opt(..., "pairs (chosen/rejected, HH dialogues) or rankings, such as `temper collect` writes")
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
    return settings_of(Preference, name, RULES[name])


def answer_logp(model, batch: Forest, temperature: float = 1.0) -> Tensor:
    """[S]: the log-probability of each segment's learned tokens given what precedes them."""
    return per_segment(token_logp(model, batch, temperature=temperature).float(), batch, batch.learned)


def with_reference(
    model,
    trees: Sequence[Tree],
    microbatch: int,
    keep: Path | None = None,
    temperature: float = 1.0,
    also: Sequence[Sequence[Tree]] = (),
) -> None:
    """Write the reference's log-probability onto each answer: to the loss, it is data.

    The reference is the model as it is, or what its adapter was put on. keep: a folder where what it gives is kept. also: further trees.
    """
    sets = [trees, *also]
    every = Trees([(each, np.arange(len(each))) for each in sets], [1.0] * len(sets), mixed=False)
    how = {"microbatch": microbatch, "ranks": ranks.count(), "precision": str(precision(model)), "temperature": temperature}
    kept = Kept(keep, model, every, **how) if keep else None
    found = ranks.led(kept.read() if kept else None)
    if found is None:
        found = _reference(model, every, microbatch, temperature)
        if kept and ranks.rank() == 0:
            kept.write(found)
    values = iter(found)
    for each in sets:
        label(each, "ref_logp", list(islice(values, len(each))))


def references(run: Run | None) -> Path | None:
    """Where runs beside each other keep their references' log-probabilities; nowhere without a run."""
    return run.folder.parent / ".references" if run else None


def _reference(model, trees: Trees, microbatch: int, temperature: float = 1.0) -> list[list[float]]:
    """One number per segment of each tree; the ranks share the work."""
    mine = ranks.share(sizes_of(trees))
    own = Trees([(trees, np.array(mine, np.int64))], [1.0])
    found: list[list[float]] = [[] for _ in mine]
    with torch.no_grad(), without_adapter(model):
        for index, forest in forests(own, microbatch, device=model.device):
            logp = iter(answer_logp(model, forest, temperature).tolist())
            for i in index:
                found[i] = [next(logp) for _ in own[i]]
    return ranks.whole(mine, found)


def count_comparisons(tree: Tree) -> int:
    return comb(sum(s.labels["rank"] >= 0 for s in tree), 2)


class Seen(NamedTuple):
    """The comparisons in a forest under a model."""

    pairs: Pairs
    rankings: Rankings
    soft: Tensor  # [comparisons] the probability that the label is right
    share: Tensor  # [comparisons] one over the comparisons of the record


def look(model, batch: Forest, reference: bool, temperature: float = 1.0) -> Seen:
    """All pairs of answers of each record, the better first, and the records' answers as lists."""
    c = compared(batch)
    logp = answer_logp(model, batch, temperature)
    ref = batch.columns["ref_logp"] if reference else torch.zeros_like(logp)
    length = per_segment((batch.target > 0).float(), batch)
    logp, ref, length, soft, strength, rank = (
        x[c.answers] for x in (logp, ref, length, *(batch.columns[name] for name in ("soft", "margin", "rank")))
    )
    w, l = c.better, c.worse
    pairs = Pairs(logp[w], logp[l], ref[w], ref[l], length[w], length[l], strength[w])
    return Seen(pairs, Rankings(logp, ref, length, (rank == 0).cumsum(0) - 1), soft[w], c.share)


def make_loss(rule: Rule, how: dict[str, Any], temperature: float = 1.0):
    """The loss by a rule with settings `how`; the probabilities are those of the model at a temperature."""

    def loss(model, batch: Forest) -> Loss:
        pairs, rankings, soft, share = look(model, batch, rule.reference, temperature)
        if rule.listwise:
            items = rule(rankings, soft=batch.columns["soft"][batch.columns["rank"] == 0], **how)
        else:
            items = rule(pairs, soft=soft, **how) * share
        n, h = len(share), pairs.margin.detach()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "accuracy": ((h > 0).sum(), n),
            "margin": (h.sum(), n),
            "chosen_logp": (pairs.chosen.detach().sum(), n),
            "rejected_logp": (pairs.rejected.detach().sum(), n),
        }
        if "sampler_logp" in batch.columns:
            gap = rankings.logp.detach() - batch.columns["sampler_logp"][batch.columns["rank"] >= 0]
            metrics["sampler_gap"] = (gap.abs().sum(), rankings.length.sum())
        return Loss({"preference": Term(items.sum(), per="records")}, metrics)

    return loss


def check_reference(model, batches: Sequence[Forest], temperature: float = 1.0) -> None:
    """At step 0 the policy is the reference, so every h is 0 and DPO's loss is ln 2. (But for a new soft prompt, which is something.)"""
    if shifts(model):
        return
    with torch.no_grad():
        gap = max((float((answer_logp(model, b, temperature) - b.columns["ref_logp"]).abs().max()) for b in batches), default=0.0)
    if gap > slack(model, 1e-3, 0.5):
        raise AssertionError(f"policy and reference differ by {gap:.2g} nats on an answer; they must be the same model")


def train_on(
    model, trees, name: str, how: dict, b: Batching, optim: Optim, steps: int, resume: State | None = None, compute: Compute = Compute()
) -> Iterator[Step]:
    """Train on comparison trees, which carry their reference log-probs where the rule of that name reads them; with settings `how`."""
    rule = RULES[name]
    source, loss = offline(trees, b, count_records, join=not compute.fit_memory), make_loss(rule, how)
    check = check_reference if rule.reference else None
    return fit(model, source, loss, steps=steps, optim=optim, seed=b.seed, resume=resume, check=check, compute=compute)


def train(settings: Preference, model, trees, resume: State | None = None) -> Iterator[Step]:
    s, b = settings, settings.batching
    return train_on(model, trees, s.rule, s.own(), b, s.optim, b.steps(epoch(trees)), resume, s.compute)


def held_out(model, trees: Sequence[Tree], reference: bool, microbatch: int) -> dict[str, float]:
    """Accuracy on comparisons kept out of training. Those of one record share its answers, so the interval is clustered by record."""
    right: list[bool] = []
    record: list[int] = []
    with torch.no_grad():
        for index, forest in forests(trees, microbatch, count_records, model.device):
            right += (look(model, forest, reference).pairs.margin > 0).tolist()
            record += [i for i in index for _ in range(count_comparisons(trees[i]))]
    share = share_interval(right, record)
    found = {"": share.mean, "_low": share.low, "_high": share.high}
    return {**{f"held_out_accuracy{end}": value for end, value in found.items()}, "held_out_pairs": len(right)}


def prepare(settings: Preference, run: Run) -> Job:
    b, rule = settings.batching, RULES[settings.rule]
    model, tokenizer = load_policy(settings.model, **settings.compute.placed, adapters=settings.adapters, seed=b.seed)
    how = way(comparison_chunk, tokenizer, model, settings.window)
    trees, tests, out, _, card, corpus, whole = given(settings, run, "comparisons", how)
    if all(s.labels["soft"] == 0.5 for tree in trees for s in tree if s.labels["rank"] >= 0):
        raise UserError(f"{settings.data}: no record prefers one answer to another, all are ties; there is nothing to learn")
    if rule.reference:
        with_reference(model, trees, b.tokens_per_microbatch, references(run), also=[tests])
    return Job(
        total=b.steps(epoch(trees)),
        steps=lambda resume: train(settings, model, trees, resume),
        save=lambda path: export(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={**card, "records": len(trees), "comparisons": sum(map(count_comparisons, trees))},
        evaluate=(lambda: held_out(model, tests, rule.reference, b.tokens_per_microbatch)) if tests else None,
        policy=(model, tokenizer),
        asks=[record.prompt for record in out[:4]],
        prepared=Prepared(
            corpus,
            tokenizer,
            model,
            make_loss(rule, settings.own()),
            count_records,
            check_reference if rule.reference else None,
            whole=whole,
        ),
    )
