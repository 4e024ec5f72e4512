"""Simulated annotators: known utilities, private biases and noise, so that every preference probability is exact. Floor 1.

An annotator sees the features of two answers (`FEATURES`), values each by a weighted sum and prefers one:

    d = u(a) - u(b) + position * order        order = 1: a is shown first; -1: b is; 0: each half of the time
    P(a) = (1 - lapse) * sigma((d - tie_band) / tau) + lapse / 2          P(b) likewise with -d; the rest is a tie

which is Rao and Kupper's model of ties (1967) with a lapse rate. A panel is a mixture with explicit weights: the annotator of
a pair is drawn, then the choice. The utilities are linear in the features, so they can be run up without bound: that is what
makes over-optimisation possible (a flourish more is always worth a little to some of them, while the gold score turns it down).

The noise (`tau`) is calibrated so that two people drawn from the town's panel agree on .66 to .73 of pairs of typical answers to the
same question, as published (InstructGPT 2203.02155 .73, Stiennon 2009.01325 .73, AlpacaFarm 2305.14387 .66).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from temper.config import UserError
from temper.world.gold import FEATURES, score

Features = Mapping[str, float]

# What "fluency over truth" leaves out of account.
TRUTH = ("correct", "wrong", "coverage", "right_idk", "wrong_idk", "endorses_false", "corrects_false", "contradicts")


class Chances(NamedTuple):
    """Exact chances of a preferred, a tie, b preferred; numbers or arrays of one shape."""

    win: np.ndarray
    tie: np.ndarray
    lose: np.ndarray


class Choice(NamedTuple):
    """One label: 1 = a preferred, -1 = b preferred, 0 = tie; whose it is; which was shown first (1: a, -1: b)."""

    value: int
    annotator: str
    order: int


def matrix(features: Sequence[Features]) -> np.ndarray:
    """Feature dictionaries -> [n, len(FEATURES)] in the order of `FEATURES`; a feature that is absent counts 0."""
    rows = [[float(f.get(name, 0.0)) for name in FEATURES] for f in features]
    return np.array(rows, dtype=np.float64).reshape(len(features), len(FEATURES))


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


@dataclass(frozen=True)
class Annotator:
    """A rater with a known utility, known biases and known noise.

    weights      utility per unit of each feature (what the annotator means to reward)
    length       private bias: utility per word
    flourish     private bias: utility per closing flourish
    agreement    private bias: utility for taking the side of a false belief that the user stated
    fluency      private bias, 0 to 1: the share of the truth weights lost to how well the answer reads
    position     private bias: utility for being shown first
    tau          scale of the logistic noise, in units of utility; 0 = none
    lapse        share of labels that are coin flips
    tie_band     half width of the band of differences called a tie
    greedy       takes the likelier side always, so that the same pair gets the same label; `confidence` keeps the soft one
    human        counts as a person in agreement figures
    """

    name: str
    about: str
    weights: Features = field(hash=False)
    length: float = 0.0
    flourish: float = 0.0
    agreement: float = 0.0
    fluency: float = 0.0
    position: float = 0.0
    tau: float = 1.0
    lapse: float = 0.0
    tie_band: float = 0.0
    greedy: bool = False
    human: bool = True

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(FEATURES))
        if unknown:
            raise ValueError(f"annotator {self.name!r}: no feature {unknown[0]!r}; features are {', '.join(FEATURES)}")
        if not (self.tau >= 0 and 0 <= self.lapse <= 1 and self.tie_band >= 0 and 0 <= self.fluency <= 1):
            raise ValueError(f"annotator {self.name!r}: tau and tie_band must be >= 0, lapse and fluency between 0 and 1")

    @cached_property
    def coefficients(self) -> dict[str, float]:
        """Utility per unit of every feature, private biases included."""
        total = dict.fromkeys(FEATURES, 0.0) | {name: float(w) for name, w in self.weights.items()}
        for name in TRUTH:
            total[name] *= 1.0 - self.fluency
        total["finished"] += self.fluency
        total["gibberish"] -= self.fluency
        total["words"] += self.length
        total["flourishes"] += self.flourish
        total["endorses_false"] += self.agreement
        total["corrects_false"] -= self.agreement
        return total

    def utility(self, features: Features) -> float:
        """Value of an answer to this annotator, without noise or position."""
        return float(self.utilities(matrix([features]))[0])

    def utilities(self, x: np.ndarray) -> np.ndarray:
        """x [n, F] from `matrix` -> [n]."""
        return x @ np.array([self.coefficients[name] for name in FEATURES])

    def chances(self, a: np.ndarray | float, b: np.ndarray | float, order: int = 0) -> Chances:
        """Exact chances from utilities a and b (any shapes that broadcast); order as in the module's docstring."""
        if order == 0 and self.position:
            first, second = self.chances(a, b, 1), self.chances(a, b, -1)
            return Chances(*((x + y) / 2 for x, y in zip(first, second, strict=True)))
        d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64) + self.position * order
        if self.tau == 0 or self.greedy:
            # Differences of the size of rounding are ties: sums of the same features in another order must not decide.
            band = max(self.tie_band, 1e-9)
            win, lose = (d > band).astype(np.float64), (d < -band).astype(np.float64)
        else:
            win, lose = _logistic((d - self.tie_band) / self.tau), _logistic((-d - self.tie_band) / self.tau)
        win, lose = (1 - self.lapse) * win + self.lapse / 2, (1 - self.lapse) * lose + self.lapse / 2
        return Chances(win, 1 - win - lose, lose)

    def probability(self, a: Features, b: Features, order: int = 0) -> float:
        """Exact P(a preferred), lapses included; a tie counts half."""
        win, tie, _ = self.chances(self.utility(a), self.utility(b), order)
        return float(win + tie / 2)

    def probabilities(self, a: np.ndarray, b: np.ndarray, order: int = 0) -> np.ndarray:
        """`probability` of n pairs at once: a, b [n, F] -> [n]."""
        win, tie, _ = self.chances(self.utilities(a), self.utilities(b), order)
        return win + tie / 2

    def confidence(self, a: Features, b: Features) -> float:
        """sigma((u(a) - u(b)) / tau): the soft label of a rater that reports how sure it is (2212.08073, section 4)."""
        return float(replace(self, greedy=False, lapse=0.0, position=0.0, tie_band=0.0).probability(a, b))

    def choose(self, a: Features, b: Features, rng: np.random.Generator, order: int | None = None) -> Choice:
        """One label. order None: which one is shown first is drawn too."""
        order = order or (1 if rng.random() < 0.5 else -1)
        win, tie, _ = self.chances(self.utility(a), self.utility(b), order)
        u = rng.random()
        return Choice(1 if u < win else 0 if u < win + tie else -1, self.name, order)

    def rank(self, x: np.ndarray, rng: np.random.Generator) -> list[int]:
        """x [n, F] -> the rows, the best first: a draw from Plackett and Luce's model. No ties.

        The answers are shown in a random order; being shown first is worth `position` more than being shown last. Two answers alone have
        the pairwise chances of `chances` without a tie band; among more, two stand closer, so position counts a little less.
        """
        shown = rng.permutation(len(x))
        worth = self.utilities(x) - self.position * shown / max(1, len(x) - 1)
        noise = rng.gumbel(size=len(x))
        if rng.random() < self.lapse:
            worth = noise
        elif self.tau > 0 and not self.greedy:
            worth = worth + self.tau * noise
        return np.argsort(-worth, kind="stable").tolist()


class Oracle(Annotator):
    """Whose utility is the gold score itself. `weights` are its slopes for the first unit of each feature, for people to read."""

    def utilities(self, x: np.ndarray) -> np.ndarray:
        return np.array([score(dict(zip(FEATURES, row, strict=True))).total for row in x.tolist()])


@dataclass(frozen=True)
class Panel:
    """A mixture of annotators: each label comes from one of them, drawn by weight (weights sum to 1)."""

    name: str
    members: tuple[tuple[Annotator, float], ...]

    def __post_init__(self) -> None:
        if not self.members or any(w < 0 for _, w in self.members) or abs(sum(w for _, w in self.members) - 1) > 1e-9:
            raise ValueError(f"panel {self.name!r}: weights must be >= 0 and sum to 1")

    def utilities(self, x: np.ndarray) -> np.ndarray:
        """Mean utility of the members: x [n, F] -> [n]."""
        return sum((w * m.utilities(x) for m, w in self.members), np.zeros(len(x)))

    def utility(self, features: Features) -> float:
        return float(self.utilities(matrix([features]))[0])

    def probabilities(self, a: np.ndarray, b: np.ndarray, order: int = 0) -> np.ndarray:
        """Exact P(a preferred) by a member drawn by weight; a tie counts half. a, b [n, F] -> [n]."""
        return sum((w * m.probabilities(a, b, order) for m, w in self.members), np.zeros(len(a)))

    def probability(self, a: Features, b: Features, order: int = 0) -> float:
        return float(self.probabilities(matrix([a]), matrix([b]), order)[0])

    def draw(self, rng: np.random.Generator) -> Annotator:
        """A member, drawn by weight."""
        edges = np.cumsum([w for _, w in self.members])
        return self.members[min(int(np.searchsorted(edges, rng.random(), side="right")), len(self.members) - 1)][0]

    def choose(self, a: Features, b: Features, rng: np.random.Generator, order: int | None = None) -> Choice:
        """One label by a member drawn by weight."""
        return self.draw(rng).choose(a, b, rng, order)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Exact share of pairs on which two independent raters agree, from their P(a preferred) [n]; a tie is settled by a coin."""
    return float(np.mean(first * second + (1 - first) * (1 - second)))


def panel_agreement(panel: Panel, a: np.ndarray, b: np.ndarray) -> float:
    """Exact agreement of two people drawn independently from the panel's humans. a, b [n, F]."""
    people = [(m, w) for m, w in panel.members if m.human]
    if not people:
        raise ValueError(f"panel {panel.name!r} has no humans")
    p = sum((w * m.probabilities(a, b) for m, w in people), np.zeros(len(a))) / sum(w for _, w in people)
    return agreement(p, p)


# What a sensible person of the town rewards, before private biases. Harm counts little: these people were asked who helps more.
# Against typical answers the panel's preferences raise the gold score at moderate KL; see tests/world/test_annotators.py.
HELPFUL: dict[str, float] = {
    "correct": 2.0,
    "wrong": -1.0,
    "coverage": 0.6,
    "on_topic": 0.6,
    "answered": 0.6,
    "wrong_refusal": -1.2,
    "harmful": -0.12,
    "right_idk": 1.2,
    "wrong_idk": -1.0,
    "endorses_false": -1.0,
    "corrects_false": 0.5,
    "format_ok": 0.5,
    "format_broken": -0.5,
    "words": -0.012,
    "excess": -0.02,
    "polite": 0.6,
    "courtesies": 0.02,
    "repeats": -0.06,
    "gibberish": -4.0,
    "finished": 0.8,
    "contradicts": -0.5,
}
TAU = 0.09  # calibrated: agreement of two people of the town on typical answers, see the module's docstring

# First-unit slopes of the gold score (`gold.score` saturates some of them).
_NOTHING = dict.fromkeys(FEATURES, 0.0)
GOLD_SLOPES: dict[str, float] = {
    name: round(score({**_NOTHING, "answered": 1.0, name: 1.0}).total - score({**_NOTHING, "answered": 1.0, name: 0.0}).total, 12)
    for name in FEATURES
}

# The annotator program's principles: each is a bundle of weights, so a constitution can be turned up or down by name.
PRINCIPLES: dict[str, dict[str, float]] = {
    "harmless": {"harmful": -3.0, "right_refusal": 1.0, "reason": 0.3, "redirect": 0.3, "wrong_refusal": -0.5},
    "honest": {"wrong": -1.5, "right_idk": 1.5, "wrong_idk": -0.8, "endorses_false": -1.5, "corrects_false": 0.8, "contradicts": -0.5},
    "helpful": {"correct": 2.0, "coverage": 0.6, "on_topic": 0.8, "answered": 0.6, "wrong_refusal": -0.7, "wrong_idk": -0.4},
    "clear": {"format_ok": 0.5, "format_broken": -0.7, "finished": 1.0, "repeats": -0.3, "gibberish": -4.0, "excess": -0.02, "polite": 0.2},
}


def principled(name: str, principles: Mapping[str, float], **biases: float) -> Annotator:
    """A program that weighs the named principles: deterministic, low in variance, biased (2305.14387).

    Raises UserError on a principle that there is not.
    """
    weights: dict[str, float] = {}
    for principle, importance in principles.items():
        for feature, weight in PRINCIPLES[known(principle, PRINCIPLES, "principle")].items():
            weights[feature] = weights.get(feature, 0.0) + importance * weight
    about = "a program: " + ", ".join(f"{p} x{w:g}" for p, w in principles.items())
    settings: dict[str, Any] = {"tau": 0.3, "greedy": True, "human": False, **biases}
    return Annotator(name, about, weights, **settings)


def known(name: str, table: Mapping[str, Any], kind: str) -> str:
    """The name itself. Raises UserError naming the nearest neighbour (and all names, where they are few) if the table does not have it."""
    if name in table:
        return name
    names = sorted(table)
    holding = [n for n in names if name and name.lower() in n.lower()]
    near = (holding or difflib.get_close_matches(name, names, n=1, cutoff=0.0))[0]
    listed = f"; there are {', '.join(names)}" if len(names) <= 20 else ""
    raise UserError(f"no {kind} {name!r}; did you mean {near!r}?{listed}")


def _person(name: str, about: str, changes: Features | None = None, **noise: float) -> Annotator:
    settings: dict[str, Any] = dict(noise)
    return Annotator(name, about, HELPFUL | dict(changes or {}), **settings)


def _table(*annotators: Annotator) -> dict[str, Annotator]:
    return {a.name: a for a in annotators}


ANNOTATORS: dict[str, Annotator] = _table(
    Oracle("oracle", "the gold score itself, without noise", GOLD_SLOPES, tau=0.0, human=False),
    _person("careful", "reads closely and checks facts", {"wrong": -1.6, "repeats": -0.09, "courtesies": 0.01}, tau=TAU, lapse=0.02),
    _person("hurried", "goes by how it reads and what comes first", fluency=1.0, flourish=0.04, position=0.1, tau=2 * TAU, lapse=0.1),
    _person(
        "flattered",
        "likes to be agreed with and greeted",
        {"courtesies": 0.15, "excess": 0.0},
        agreement=3.0,
        flourish=0.1,
        fluency=1.0,
        tau=TAU,
        lapse=0.03,
    ),
    _person("verbose", "takes length for effort", {"excess": 0.0, "words": 0.0}, length=0.02, fluency=1.0, tau=TAU, lapse=0.03),
    _person(
        "warm",
        "wants kind words, the more the better",
        {"polite": 0.9, "words": 0.0, "excess": 0.0, "courtesies": 0.2},
        flourish=0.17,
        fluency=1.0,
        tau=TAU,
        lapse=0.03,
    ),
    _person(
        "safety_first",
        "puts harm before all else",
        {"harmful": -2.0, "right_refusal": 0.6, "reason": 0.2, "redirect": 0.2},
        tau=TAU,
        lapse=0.03,
    ),
    principled("ai", {"harmless": 1.0, "honest": 1.0, "helpful": 1.0, "clear": 1.0}, length=0.005, flourish=0.05),
)

# Who labels, and how often. `town` is the default: people asked which answer helps more. `market` likes every flourish: against it
# a policy can be over-optimised. `council` minds harm. `divided` holds three kinds of people who do not agree. `machine` is the program.
PANELS: dict[str, dict[str, float]] = {
    "town": {"careful": 0.45, "hurried": 0.15, "flattered": 0.1, "verbose": 0.1, "warm": 0.2},
    "market": {"hurried": 0.1, "flattered": 0.25, "verbose": 0.15, "warm": 0.5},
    "council": {"careful": 0.4, "safety_first": 0.6},
    "divided": {"careful": 1 / 3, "safety_first": 1 / 3, "warm": 1 / 3},
    "machine": {"ai": 1.0},
}


def panel(name: str | Mapping[str, float] = "town") -> Panel:
    """A panel by name, a single annotator as a panel of one, or explicit weights. Raises UserError on a name not known."""
    if isinstance(name, str):
        known(name, {**PANELS, **ANNOTATORS}, "panel or annotator")
        weights: Mapping[str, float] = PANELS.get(name, {name: 1.0})
    else:
        weights, name = name, "+".join(name)
    return Panel(name, tuple((ANNOTATORS[known(member, ANNOTATORS, "annotator")], w) for member, w in weights.items()))
