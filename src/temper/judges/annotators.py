"""The embedded world's annotators as raters of sampled answers. Floor 4."""

import numpy as np

from temper.records import Pair, Prompt
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


def ceiling(pairs: list[Pair]) -> float:
    """E max(P, 1 - P) over the pairs: the accuracy that nothing can exceed in expectation."""
    p = np.array([pair.meta["probability"] for pair in pairs])
    return float(np.maximum(p, 1 - p).mean())
