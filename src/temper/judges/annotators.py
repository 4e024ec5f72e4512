"""The embedded world's annotators as raters of sampled answers. Floor 4."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from temper.records import Pair, Prompt, Ranked
from temper.world import Ask, features, gold, stream
from temper.world.annotators import Panel, matrix, panel


class Annotators:
    """A panel of the town: each label comes from one member, drawn by weight, with that member's noise and biases."""

    def __init__(self, name: str, seed: int) -> None:
        self.panel: Panel = panel(name)
        self.seed = seed

    def label(self, prompt: Prompt, a: str, b: str, index: int) -> Pair:
        """One noisy preference. meta: the exact P(chosen preferred) over the panel, who chose, and the gap in gold."""
        ask = Ask.of(prompt)
        fa, fb = features(ask, a), features(ask, b)
        choice = self.panel.choose(fa, fb, stream(f"label/{self.seed}", index))
        p = float(self.panel.probabilities(matrix([fa]), matrix([fb]))[0])
        gap = gold(ask, a).total - gold(ask, b).total
        first = choice.value >= 0
        if not first:
            a, b, p, gap = b, a, 1 - p, -gap
        meta = {
            **prompt.meta,
            "probability": p,
            "annotator": choice.annotator,
            "order": choice.order if first else -choice.order,
            "gold_gap": gap,
        }
        return Pair(prompt=prompt.messages, chosen=a, rejected=b, soft=0.5 if choice.value == 0 else 1.0, meta=meta)

    def rank(self, prompt: Prompt, answers: Sequence[str], index: int) -> Ranked:
        """One noisy ranking by one member. meta: for every pair of answers, the better first and in the order of
        `itertools.combinations`, the exact P that someone drawn from the panel prefers the better; who ranked; the answers' gold.
        """
        ask = Ask.of(prompt)
        x = matrix([features(ask, answer) for answer in answers])
        rng = stream(f"rank/{self.seed}", index)
        member = self.panel.draw(rng)
        order = member.rank(x, rng)
        better, worse = zip(*combinations(order, 2), strict=True)
        meta = {
            **prompt.meta,
            "probabilities": self.panel.probabilities(x[list(better)], x[list(worse)]).tolist(),
            "annotator": member.name,
            "gold": [gold(ask, answers[i]).total for i in order],
        }
        return Ranked(prompt=prompt.messages, answers=[answers[i] for i in order], meta=meta)


def extremes(ranking: Ranked) -> Pair:
    """The best and the worst of a ranking as a pair."""
    meta = dict(ranking.meta)
    last = len(ranking.answers) - 1
    probabilities, worth = meta.pop("probabilities"), meta.pop("gold")
    meta |= {"probability": probabilities[last - 1], "gold_gap": worth[0] - worth[last]}
    return Pair(prompt=ranking.prompt, chosen=ranking.answers[0], rejected=ranking.answers[last], meta=meta)


def ceiling(rankings: Sequence[Ranked]) -> float:
    """E max(P, 1 - P) over all comparisons: the accuracy that nothing can exceed in expectation."""
    p = np.array([p for ranking in rankings for p in ranking.meta["probabilities"]])
    return float(np.maximum(p, 1 - p).mean())
