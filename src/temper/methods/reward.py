"""A reward model from comparisons: a scalar head on the SFT model, read at the answer's last token. Floor 5.

L = -log sigma(r_better - r_worse - margin) per pair (arXiv:2009.01325 eq. 1), or another rule of losses/reward.py: ties (Rao-Kupper,
Davidson), a known share of flipped labels, whole rankings (Plackett-Luce); with soft labels and centring (arXiv:2312.09244). Unless the
rule takes it whole, a ranking of K answers is its K(K-1)/2 pairs, averaged, in one forest: each answer is computed once (arXiv:2203.02155
eq. 1). The last token is the end of the turn, and it is found by its index in the forest, never by looking for padding. Several heads
share the trunk where rows name what they judge; several members (arXiv:2310.02743) are trained one after the other, on the same records,
each with its own head and order.
"""

from collections.abc import Iterator, Sequence
from math import comb
from pathlib import Path
from typing import Any, Literal

import torch

from temper.config import Settings, UserError, opt
from temper.data.sources import read
from temper.data.store import parts
from temper.data.trees import Chunk, comparison_chunk, where
from temper.forest import Forest
from temper.judges.reward_model import remember_scale
from temper.losses.reward import RULES, plackett_luce
from temper.methods.base import Batching, Job, Prepared, Split, Window, epoch, given, learn, numbered, way
from temper.methods.comparisons import HeldOut, compared, count_records, field, own_head, scores
from temper.methods.comparisons import ends as ends
from temper.models.adapt import Adapter
from temper.models.heads import scalar
from temper.models.load import export, load_scalar
from temper.records import Pair, Ranked
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term, ranks

METRICS = {
    "loss": "the rule's loss per record",
    "accuracy": "share of pairs whose better answer scores strictly higher",
    "margin": "mean of r_better - r_worse",
    "phase": "which member of the ensemble is being trained, from 1",
    "held_out_accuracy": "accuracy against the labels of records kept out of training",
    "held_out_pairs": "pairs in these",
    "held_out_ece": "expected calibration error: how far, on average over ten bins, confidence lies from accuracy",
    "held_out_overconfidence": "mean confidence less accuracy; above 0, the model is surer than it is right",
    "expected_accuracy": "the same in expectation over the raters, where their exact probabilities are known",
    "ceiling": "E max(P, 1 - P): what no model can exceed, where the raters' exact probabilities are known",
    "ceiling_gap": "ceiling - expected_accuracy, pair by pair",
}  # the held-out figures come with NAME_low and NAME_high, the ends of their 95% intervals
SCALED = 1000  # training records over whose answers the scores' mean and deviation are taken
EXAMPLES = """
  temper reward --model runs/sft --data hh.jsonl.gz --out runs/reward --skip-bad --too-long drop
  temper reward --model runs/sft --data runs/comparisons/rankings.jsonl --out runs/reward --members 5
  temper reward --model runs/sft --data votes.jsonl --out runs/reward --rule davidson --tie 0.8
  temper reward --model runs/sft --data helpful-and-harmless/ --out runs/reward --heads file --head-weights helpful=1 harmless=2
"""


class Reward(Settings):
    """Train a reward model from pairs or rankings of answers.

    For PPO, GRPO, best-of-n and rejection sampling, and to score answers; DPO needs none. Sources: arXiv:2009.01325, arXiv:2203.02155.
    """

    model: str = opt(..., "the SFT model: a folder or a Hugging Face name")
    data: str = opt(..., "pairs (chosen/rejected, HH dialogues) or rankings, such as `temper collect` writes")
    rule: Literal["bradley_terry", "rao_kupper", "davidson", "plackett_luce"] = opt(
        "bradley_terry", "who wins, given two scores; rao_kupper and davidson know ties, plackett_luce takes rankings whole"
    )
    tie: float | None = opt(None, "eta of rao_kupper, nu of davidson: the larger, the likelier a tie; none: 0.5", gt=0)
    flip_rate: float = opt(0.0, "known share of labels that name the wrong answer", ge=0, lt=0.5)
    centring: float = opt(0.01, "weight of (r_chosen + r_rejected)^2, which fixes the free constant", ge=0)
    heads: str | None = opt(None, "several scores: the field of a row that names the one it judges, as `head`; `file`: its file's name")
    head_weights: list[str] = opt([], "NAME=WEIGHT ... of the heads, in the loss and in the score that is their sum; default: 1 each")
    members: int = opt(1, "models of an ensemble: the same records, other heads and orders", ge=1)
    sections: str | None = opt(None, "field to break held-out accuracy down by, as `source`; default on the world: the kind of ask")
    window: Window = Window()
    split: Split = Split()
    batching: Batching = Batching(batch=64)
    optim: Optim = Optim(lr=1e-3, schedule="cosine", warmup=0.05)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


def settings(name: str) -> type[Settings]:
    return Reward


def make_loss(centring: float = 0.0, rule: str = "bradley_terry", weights: Sequence[float] = (1.0,), **how: float):
    """weights: of the heads. how: flip, and the rule's own settings."""

    def loss(model, batch: Forest) -> Loss:
        c = compared(batch)
        r, head = own_head(scalar(model, batch, batch.end[c.answers] - 1), batch, c.answers)
        weight = torch.tensor(weights, device=r.device)[head]
        won, lost = r[c.better], r[c.worse]
        if rule == "plackett_luce":
            first, size = c.rank == 0, int(c.rank.max()) + 1
            place = c.record, c.rank
            rows = r.new_zeros(int(first.sum()), size).index_put(place, r)
            there = torch.zeros_like(rows, dtype=torch.bool).index_put(place, torch.ones_like(first))
            pull = centring * (won + lost).square() * c.share * weight[c.better]
            total = (plackett_luce(rows, there) * weight[first]).sum() + pull.sum()
        else:
            margin, soft = (batch.columns[name][c.answers][c.better] for name in ("margin", "soft"))
            items = RULES[rule](won, lost, margin=margin, soft=soft, centring=centring, **how)
            total = (items * c.share * weight[c.better]).sum()
        n, gap = len(c.better), (won - lost).detach()
        return Loss({"preference": Term(total, per="records")}, {"accuracy": ((gap > 0).sum(), n), "margin": (gap.sum(), n)})

    return loss


def told(s: Reward) -> dict[str, float]:
    """What the rule is told."""
    tie = {"tie": s.tie or 0.5} if s.rule in RULES and RULES[s.rule].ties else {}
    return {**tie, **({"flip": s.flip_rate} if s.flip_rate else {})}


def named_heads(s: Reward) -> dict[str, float]:
    """The heads with their weights, by name; one without a name where the rows tell none apart. Raises UserError for what does not fit."""
    if s.tie is not None and "tie" not in told(s):
        raise UserError(f"--tie {s.tie:g}: --rule {s.rule} knows no ties; take rao_kupper or davidson")
    if s.rule == "plackett_luce" and s.flip_rate:
        raise UserError("--flip-rate: is of pairs, and plackett_luce takes rankings whole; take another --rule")
    if not s.heads:
        if s.head_weights:
            raise UserError("--head-weights without --heads: name the field that tells the heads apart")
        return {"score": 1.0}
    records = [record for spec in parts(s.data) for record in read(spec, "comparisons", skip_bad=s.window.skip_bad).records]
    for i, record in enumerate(records):
        if field(record, s.heads) is None:
            raise UserError(f"{where(record, i)}: has no field {s.heads!r}, which --heads needs; give each row one, or leave --heads out")
    weights = dict.fromkeys(sorted({str(field(record, s.heads)) for record in records}), 1.0)
    for text in s.head_weights:
        name, _, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if name not in weights or not 0 <= weight < float("inf"):
            raise UserError(f"--head-weights {text}: give NAME=WEIGHT, a weight of at least 0, for heads among {', '.join(weights)}")
        weights[name] = weight
    if len(weights) == 1:
        raise UserError(f"--heads {s.heads}: all rows name the same head, {next(iter(weights))!r}; leave --heads out")
    return weights


def train(
    settings: Reward, model, trees, resume: State | None = None, *, weights: Sequence[float] = (1.0,), member: int = 0
) -> Iterator[Step]:
    """One member: its seed decides the order of the records."""
    s, b = settings, settings.batching.model_copy(update={"seed": settings.batching.seed + member})
    return learn(model, trees, make_loss(s.centring, s.rule, weights, **told(s)), b, s.optim, resume, s.compute, count_records, join=True)


def headed_chunk(records: Sequence[Pair | Ranked], *, heads: str | None, names: Sequence[str], whole: bool, **how: Any) -> Chunk:
    """Comparisons with the label `head`, which of `names` the field `heads` says. whole: they are read as rankings, by plackett_luce."""
    found, report = comparison_chunk(records, **how)
    for i, tree in found:
        for segment in tree:
            segment.labels = {**segment.labels, "head": float(names.index(str(field(records[i], heads))) if heads else 0)}
        if whole and (tree[-1].labels["soft"] != 1 or tree[-1].labels["margin"]):
            raise UserError(f"{where(records[i], i)}: has a soft label or a margin, which plackett_luce cannot read; take another --rule")
    return found, report


def prepare(settings: Reward, run: Run) -> Job:
    s, b = settings, settings.batching
    heads = named_heads(s)
    if s.members > 1 and s.compute.shard != "none":
        raise UserError("--members and --shard together: train the members as runs of their own, with other seeds")
    names = list(heads)

    def fresh(member: int) -> tuple[Any, Any]:
        return load_scalar(s.model, seed=b.seed + member, labels=names, **s.compute.placed, adapters=s.adapters)

    model, tokenizer = fresh(0)
    current = [model]  # the member that is being trained

    how = way(headed_chunk, tokenizer, model, s.window, heads=s.heads, names=names, whole=s.rule == "plackett_luce")
    trees, tests, _, _, card, corpus, whole = given(s, run, "comparisons", how, every=True)
    tested = tests.records()
    total = b.steps(epoch(trees))
    sections = list(dict.fromkeys(filter(None, (s.sections or "ask.kind", s.heads))))
    held_out = HeldOut(tests, tested, s.rule, told(s), sections, b.tokens_per_microbatch) if tests else None

    def scaled(model: Any) -> Any:
        seen = scores(model, trees[:SCALED], b.tokens_per_microbatch, every=True)
        remember_scale(model, torch.tensor([score for each in seen for score in each]), heads if len(heads) > 1 else None)
        return model

    def member(k: int, resume: State | None) -> Iterator[Step]:
        if k:
            current[0], _ = fresh(k)
        return train(s, current[0], trees, resume, weights=list(heads.values()), member=k)

    def steps(resume: State | None) -> Iterator[Step]:
        if s.members == 1:
            yield from member(0, resume)
            return
        begun = resume["phase"] - 1 if resume else 0
        for k in range(begun, s.members):
            yield from numbered(member(k, resume["state"] if resume and k == begun else None), k + 1, k * total)
            if k + 1 < s.members and ranks.rank() == 0:
                export(scaled(current[0]), tokenizer, run.file(f"members/{k}"))

    def finish(path: Path) -> None:
        scaled(current[0])
        if held_out:
            run.update(card=job.card | held_out(current[0])[1])
        export(current[0], tokenizer, path)

    job = Job(
        total=s.members * total,
        steps=steps,
        save=finish,
        card={
            **card,
            "records": len(trees),
            "comparisons": sum(comb(len(tree) - (tree[0].labels["rank"] < 0), 2) for tree in trees),
            **({"heads": heads} if s.heads else {}),
        },
        evaluate=(lambda: held_out(current[0])[0]) if held_out else None,
        prepared=Prepared(
            corpus, tokenizer, model, make_loss(s.centring, s.rule, list(heads.values()), **told(s)), count_records, whole=whole
        ),
    )
    return job
