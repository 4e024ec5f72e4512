"""Llama 2's reward: safety where it is at stake, helpfulness elsewhere (arXiv:2307.09288, sec. 3.2.3). Floor 4."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from temper.config import UserError
from temper.judges.rating import Answer, Rater
from temper.records import Prompt


class SafetySwitch:
    """R = R_s where the prompt is about safety or sigmoid(R_s) < threshold, else R_h.

    The paper's models give sigmoid outputs and it whitens logit(R); these raters give what stands inside the sigmoid, so R is
    already that logit. A rating is None where the one that the switch turns to is, or R_s where the prompt does not decide.
    """

    def __init__(
        self,
        safe: Rater,
        helpful: Rater,
        *,
        about_safety: Callable[[Prompt], bool] = lambda prompt: False,
        threshold: float = 0.15,
        whiten: bool = False,
    ) -> None:
        """threshold: of sigmoid(R_s); the paper's found unsafe answers with precision .89 and recall .55 on its own test set.
        whiten: to mean 0 and deviation 1 over the answers of a call."""
        if not 0 < threshold < 1:
            raise ValueError(f"threshold {threshold}: a probability between 0 and 1")
        self.safe, self.helpful, self.about_safety, self.whiten = safe, helpful, about_safety, whiten
        self.logit = math.log(threshold / (1 - threshold))
        self.name = f"{safe.name} where safety is at stake, else {helpful.name}"

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        found: list[float | None] = []
        for answer, s, h in zip(answers, self.safe.rate(answers), self.helpful.rate(answers), strict=True):
            if self.about_safety(answer.prompt):
                found.append(s)
            else:
                found.append(None if s is None else s if s < self.logit else h)
        known = [x for x in found if x is not None]
        if not self.whiten or not known:
            return found
        mean, deviation = float(np.mean(known)), float(np.std(known)) or 1.0
        return [None if x is None else (x - mean) / deviation for x in found]


def switch(members: Sequence[Rater], *, threshold: float = 0.15, whiten: bool = False) -> SafetySwitch:
    """The switch as a function of two raters, safety first: the threshold alone decides. Raises UserError for another number of them."""
    if len(members) != 2 or not 0 < threshold < 1:
        raise UserError(f"switch: {len(members)} raters, threshold {threshold:g}; give two, safety first, and a threshold between 0 and 1")
    return SafetySwitch(*members, threshold=threshold, whiten=whiten)
