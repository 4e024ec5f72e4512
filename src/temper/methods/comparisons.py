"""Comparisons in a forest, their scores, and the figures of a reward model on those kept out of training. Floor 5."""

from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.forest import Forest, Tree
from temper.losses.reward import RULES
from temper.methods.base import forests
from temper.models.heads import scalar
from temper.records import Pair, Ranked
from temper.stats.calibration import calibration
from temper.stats.intervals import mean_interval, paired_difference, share_interval


def count_records(trees: Sequence[Tree]) -> dict[str, float]:
    return {"records": float(sum(s.labels["rank"] == 0 for tree in trees for s in tree))}


def ends(batch: Forest) -> tuple[Tensor, Tensor]:
    """Of pairs: the segments that hold the chosen and the rejected answers, [N] each, in the same order."""
    rank = batch.columns["rank"]
    return (rank == 0).nonzero()[:, 0], (rank == 1).nonzero()[:, 0]


class Compared(NamedTuple):
    """The comparisons in a forest. The answers are its segments of rank >= 0, in order."""

    answers: Tensor  # [A] segments
    rank: Tensor  # [A] 0 the best
    record: Tensor  # [A]
    better: Tensor  # [C] places in `answers`
    worse: Tensor  # [C]
    share: Tensor  # [C] one over the comparisons of the record


def compared(batch: Forest) -> Compared:
    """All pairs of answers of one record, the better first."""
    rank = batch.columns["rank"]
    answers = (rank >= 0).nonzero()[:, 0]
    rank = rank[answers].long()
    record = (rank == 0).cumsum(0) - 1
    better, worse = ((record[:, None] == record) & (rank[:, None] < rank)).nonzero(as_tuple=True)
    return Compared(answers, rank, record, better, worse, 1.0 / torch.bincount(record[better])[record[better]])


def own_head(raw: Tensor, batch: Forest, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Of raw scores [A] or [A, heads]: those by the head that each record is about, and which that is; [A] each."""
    head = batch.columns["head"][answers].long() if raw.ndim == 2 else torch.zeros(len(answers), dtype=torch.long, device=raw.device)
    return (raw.gather(1, head[:, None])[:, 0] if raw.ndim == 2 else raw), head


def scores(model, trees: Sequence[Tree], microbatch: int, *, every: bool = False) -> list[list[Any]]:
    """Raw scores of each record's answers, the best first: by the head that it is about, or with `every` by all heads."""
    out: list[list[Any]] = [[] for _ in trees]
    with torch.no_grad():
        for index, forest in forests(trees, microbatch, count_records, model.device):
            answers = compared(forest).answers
            raw = scalar(model, forest, forest.end[answers] - 1)
            each = iter((raw if every else own_head(raw, forest, answers)[0]).tolist())
            for i in index:
                out[i] = [next(each) for segment in trees[i] if segment.labels["rank"] >= 0]
    return out


def field(record: Pair | Ranked, path: str) -> Any:
    """What a row says under a.b.c, or None; `file`: the name of its file up to the first dot."""
    value: Any = record.meta
    if path == "file":
        return Path(str(value.get("at", "")).rpartition(":")[0]).name.split(".")[0] or None
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class HeldOut:
    """Figures on comparisons kept out of training. A record's pairs share its answers, so each interval is clustered by record."""

    def __init__(
        self,
        trees: Sequence[Tree],
        records: Sequence[Pair | Ranked],
        rule: str,
        how: dict[str, float],
        sections: Sequence[str],
        microbatch: int,
    ) -> None:
        """how: the settings of the rule, and `flip`. sections: fields to break the accuracy down by."""
        self.trees, self.records, self.sections, self.microbatch = trees, records, sections, microbatch
        self.outcomes = RULES.get(rule, RULES["bradley_terry"]).outcomes
        self.how = {name: value for name, value in how.items() if name != "flip"}
        self.flip = how.get("flip", 0.0)
        self.exact = all(record.meta.keys() & {"probability", "probabilities"} for record in records)
        pairs = [
            (i, tree[-1].labels["soft"]) for i, tree in enumerate(trees) for _ in range(comb(sum(x.labels["rank"] >= 0 for x in tree), 2))
        ]
        self.record, self.soft = [i for i, _ in pairs], np.array([soft for _, soft in pairs])
        if self.exact:
            self.soft = np.array([x for r in records for x in r.meta.get("probabilities", [r.meta.get("probability")])])

    def __call__(self, model) -> tuple[dict[str, float], dict[str, Any]]:
        """(figures, for the card the reliability and the accuracy by section)"""
        gap = np.array([a - b for each in scores(model, self.trees, self.microbatch) for a, b in combinations(each, 2)])
        right = (gap > 0).astype(float)
        observed = right * self.soft + (1 - right) * (1 - self.soft)  # P(a rater agrees)
        confidence = self.confidence(np.abs(gap))
        sure = calibration(confidence, observed, self.record, low=0.5)
        found = {"held_out_accuracy": share_interval(right, self.record), "held_out_ece": sure.ece, "held_out_overconfidence": sure.gap}
        if self.exact:
            most = np.maximum(self.soft, 1 - self.soft)
            found["expected_accuracy"] = mean_interval(observed, self.record)
            found["ceiling"] = mean_interval(most, self.record)
            found["ceiling_gap"] = paired_difference(most, observed, self.record)
        out: dict[str, float] = {"held_out_pairs": len(gap)}
        for name, interval in found.items():
            out |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        table = [{**b._asdict(), "observed": b.observed.to_dict()} for b in sure.bins]
        return out, {"reliability": table, "accuracy_by": self.by_section(right)}

    def confidence(self, gap: np.ndarray) -> np.ndarray:
        """P(the label names the answer with the higher score), ties aside."""
        win, lose, _ = self.outcomes(torch.from_numpy(gap), **self.how)
        p = (win - torch.logaddexp(win, lose)).exp().numpy()
        return (1 - 2 * self.flip) * p + self.flip

    def by_section(self, right: np.ndarray) -> dict[str, dict[str, Any]]:
        """Accuracy by each field asked for."""
        out: dict[str, dict[str, Any]] = {}
        record = np.array(self.record)
        for path in self.sections:
            named = np.array([str(field(r, path)) for r in self.records])[record]
            values = sorted(set(named) - {"None"})
            out |= {path: {v: share_interval(right[named == v], record[named == v]).to_dict() for v in values}} if values else {}
        return out
