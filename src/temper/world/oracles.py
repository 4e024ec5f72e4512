"""Exact answers on enumerable prompts: the frontier of reward and KL, best-of-n, preference ceilings, Borda scores. Floor 1.

On a finite set of answers nothing has to be sampled. With a reference p (renormalised over the set) and scores g, the policy
that maximises E g - beta KL(q | p) is q ~ p exp(g / beta) (2205.11275); its points over all beta are the frontier that no policy
can pass. Everything here is numpy in float64; log-probs are natural.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from temper.config import UserError
from temper.world import answers
from temper.world.annotators import Annotator, Panel, matrix
from temper.world.asks import MOST, Ask, keeper, result
from temper.world.crafts import CRAFTS, HARMS, UNSAFE
from temper.world.datasets import dataset, demonstrated
from temper.world.gold import features
from temper.world.grammar import Form
from temper.world.lookups import RELATIONS
from temper.world.phrases import COURTESY, FLOURISH, ORDERS, SMALLTALK, grammar
from temper.world.registers import EXPOSURE_DOCUMENTS, exposure
from temper.world.streams import Draw, stream
from temper.world.town import town


class Point(NamedTuple):
    """A policy on the plane of the frontier: KL from the reference in nats, expected score."""

    kl: float
    gold: float


def normalise(logp: np.ndarray) -> np.ndarray:
    """logp [K] -> log-probs that sum to 1 over the set. Raises ValueError where nothing has mass."""
    logp = np.asarray(logp, dtype=np.float64)
    top = logp.max(initial=-np.inf)
    if not np.isfinite(top):
        raise ValueError("no answer of the set has a finite log-prob")
    return logp - top - np.log(np.exp(logp - top).sum())


def _kl(logq: np.ndarray, logp: np.ndarray) -> float:
    q = np.exp(logq)
    inside = q > 0
    return max(0.0, float((q[inside] * (logq[inside] - logp[inside])).sum()))


def tilt(ref_logp: np.ndarray, gold: np.ndarray, beta: float) -> np.ndarray:
    """ref_logp, gold [K] -> log-probs [K] of the optimum p exp(gold / beta) / Z.

    beta 0: the reference on the best answers; inf: the reference itself. Raises ValueError below 0.
    """
    ref, gold = normalise(ref_logp), np.asarray(gold, dtype=np.float64)
    if beta < 0:
        raise ValueError(f"beta {beta} < 0")
    if beta == 0:
        held = np.isfinite(ref)
        return normalise(np.where(held & (gold >= gold[held].max()), ref, -np.inf))
    return normalise(ref + (gold - gold.max()) / beta)


def kl_gold_of(policy_logp: np.ndarray, ref_logp: np.ndarray, gold: np.ndarray) -> Point:
    """The point of a policy, both distributions renormalised over the set. KL is infinite where the reference has no mass."""
    policy, ref = normalise(policy_logp), normalise(ref_logp)
    return Point(_kl(policy, ref), float(np.exp(policy) @ np.asarray(gold, dtype=np.float64)))


@dataclass(frozen=True)
class Enumerated:
    """One prompt's answers: reference log-probs [K] (any normalisation) and gold scores [K]."""

    ref_logp: np.ndarray
    gold: np.ndarray


def frontier_point(prompts: Sequence[Enumerated], beta: float) -> Point:
    """The frontier of a set of prompts, all tilted with one beta: mean KL and mean score over prompts."""
    points = [kl_gold_of(tilt(p.ref_logp, p.gold, beta), p.ref_logp, p.gold) for p in prompts]
    return Point(float(np.mean([p.kl for p in points])), float(np.mean([p.gold for p in points])))


def frontier(ref_logp: np.ndarray, gold: np.ndarray, betas: Sequence[float]) -> list[Point]:
    """The exact frontier of one prompt at the betas given (0 allowed)."""
    return [frontier_point([Enumerated(ref_logp, gold)], beta) for beta in betas]


def frontier_at(prompts: Sequence[Enumerated], kl: float) -> Point:
    """The frontier at a KL: bisection for beta in the exact one-parameter family (KL falls with beta). Past its end: its end."""
    end = frontier_point(prompts, 0.0)
    if kl >= end.kl:
        return end
    low, high = -60.0, 60.0  # log beta: from the end of the frontier to the reference, whatever the unit of the score
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if frontier_point(prompts, float(np.exp(middle))).kl > kl:
            low = middle
        else:
            high = middle
    return frontier_point(prompts, float(np.exp(low)))


def above_frontier(
    policy_logp: np.ndarray | Sequence[np.ndarray],
    ref_logp: np.ndarray | Sequence[np.ndarray],
    gold: np.ndarray | Sequence[np.ndarray],
    tol: float = 1e-9,
) -> float:
    """How far a policy lies above the frontier at its own KL, in units of gold: 0 within `tol`, negative below it.

    One prompt: [K] arrays. Several: equally long sequences of them, compared at the mean KL. A positive result is a bug somewhere.
    """
    single = isinstance(gold, np.ndarray) and gold.ndim == 1
    rows = [(policy_logp, ref_logp, gold)] if single else list(zip(policy_logp, ref_logp, gold, strict=True))
    points = [kl_gold_of(np.asarray(p), np.asarray(r), np.asarray(g)) for p, r, g in rows]
    kl, mean = float(np.mean([p.kl for p in points])), float(np.mean([p.gold for p in points]))
    gap = mean - frontier_at([Enumerated(np.asarray(r), np.asarray(g)) for _, r, g in rows], kl).gold
    return 0.0 if abs(gap) <= tol else gap


def best_of_n(ref_logp: np.ndarray, score: np.ndarray, n: int) -> np.ndarray:
    """Exact distribution [K] (log-probs) of the best of n independent answers by `score`, by order statistics.

    P(best in group s) = F(s)^n - F(<s)^n; answers with one score share it as the reference does (any fair tie-break).
    """
    if n < 1:
        raise ValueError(f"best of {n}: n must be at least 1")
    ref, score = normalise(ref_logp), np.asarray(score, dtype=np.float64)
    p = np.exp(ref)
    _, group = np.unique(score, return_inverse=True)
    mass = np.bincount(group, weights=p)
    upto = np.minimum(np.cumsum(mass), 1.0)
    upto[-1] = 1.0
    below = np.concatenate([[0.0], upto[:-1]])
    chance = upto**n - below**n
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(mass[group] > 0, p / mass[group], 0.0)
        return np.log(chance[group] * share)


def preferences(rater: Annotator | Panel, ask: Ask, texts: Sequence[str]) -> np.ndarray:
    """Exact P(row preferred to column) for all pairs of answers: [K, K]; the diagonal is 1/2."""
    x = matrix([features(ask, text) for text in texts])
    k = len(texts)
    rows, columns = np.divmod(np.arange(k * k), k)
    return rater.probabilities(x[rows], x[columns]).reshape(k, k)


def ceiling(probabilities: np.ndarray) -> float:
    """E max(P, 1 - P): the accuracy of a perfect model against one label per pair."""
    p = np.asarray(probabilities, dtype=np.float64)
    return float(np.maximum(p, 1 - p).mean())


def borda(preference: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Chance of each item to beat another one: preference [K, K] -> [K] (2312.08358). weights [K]: how often each is the opponent."""
    k = len(preference)
    w = np.broadcast_to(np.ones(k) if weights is None else np.asarray(weights, dtype=np.float64), (k, k)) * (1 - np.eye(k))
    return (preference * w).sum(1) / w.sum(1)


# ---------------------------------------------------------------- enumerable prompts


def renderings(form: Form) -> list[str]:
    """Every sentence that says the form (held-out templates aside)."""
    text = grammar()

    def phrases_of(value: Form) -> list[str]:
        out = []
        for literals, slots, _ in text.seen[value[0]]:
            parts = [[literals[0]]]
            for k, (symbol, index) in enumerate(slots):
                inner = [value[index]] if symbol in text.vocabulary else phrases_of(value[index])
                parts += [inner, [literals[k + 1]]]
            out += ["".join(choice) for choice in itertools.product(*parts)]
        return out

    return [phrase[0].upper() + phrase[1:] for phrase in phrases_of(form)]


def _clauses(entity: str, relation: str) -> list[Form]:
    """("say", clause) with every value that the relation can have, the true one first."""
    facts = town()
    values = facts.people if relation == "keeper" else RELATIONS[relation].values
    truth = facts.value(entity, relation)
    return [("say", (relation, entity, value)) for value in sorted(values, key=lambda v: v != truth)]


def _cores(ask: Ask) -> list[tuple[Form, ...]]:
    """The bodies that an answer of the ask's kind may have, right and wrong, as forms; the most to the point first."""
    slots = ask.slots
    if ask.kind in ("lookup", "unknown", "persona", "limits", "belief", "two_hop", "shorten"):
        entity = keeper(slots) if ask.kind == "two_hop" else slots["entity"]
        unsure: Form = ("idk", (f"k_{slots['relation']}", entity))
        stances: list[tuple[Form, ...]] = [(), (("agree",),), (("disagree",),)] if ask.kind == "belief" else [()]
        claims = [(*stance, say) for say in _clauses(entity, slots["relation"]) for stance in stances]
        return [*claims, (unsure,), (("dunno",),), *stances[1:]]
    if ask.kind == "compare":
        a, b, relation = slots["a"], slots["b"], slots["relation"]
        both: tuple[Form, ...] = ((f"both_{relation}", a, b), (f"both_{relation}", b, a))
        differ: tuple[Form, ...] = ((f"differ_{relation}", a, b), (f"differ_{relation}", b, a))
        return [*[(("yes", form),) for form in both], *[(("no", form),) for form in differ], (("dunno",),)]
    if ask.kind == "facts":
        known = [say for relation in town().relations(slots["entity"]) for say in _clauses(slots["entity"], relation)]
        true = [say for say in known if town().true(say[1])]
        return [*itertools.permutations(true, slots["count"]), *[(say,) for say in known], (("dunno",),)]
    if ask.kind == "residents":
        people = sorted(town().people, key=lambda p: town().value(p, "street") != slots["street"])
        return [(("residents", a, b, slots["street"]),) for a, b in itertools.permutations(people[:8], 2)] + [(("dunno",),)]
    if ask.kind == "arithmetic":
        right = result(slots)
        totals = sorted(range(MOST + 1), key=lambda n: (n != right, abs(n - right)))
        final: list[Form] = [("now", slots["person"], str(n), slots["thing"]) for n in totals]
        return [tuple(answers.solution(slots)), *[(form,) for form in final], (("dunno",),)]
    if ask.kind in ("unsafe", "safe_twin", "wrapped"):
        craft = CRAFTS[slots["task"]]
        comply: list[tuple[Form, ...]] = [(("how", craft.task, craft.first), ("then", craft.then)), (("how", craft.task, craft.first),)]
        harms = [UNSAFE[craft.task].harm] if craft.task in UNSAFE else HARMS[:1]
        tails: list[tuple[Form, ...]] = [(), *[(("reason", harm),) for harm in harms]]
        heads: list[Form] = [("decline", craft.task), ("decline_that",)]
        refuse = [(head, *tail) for head in heads for tail in tails]
        return [*comply, *refuse, (("dunno",),)]
    if ask.kind == "polite":
        return [(("please", slots["order"], slots["item"]),), *[(("please", order, slots["item"]),) for order in ORDERS]]
    if ask.kind == "smalltalk":
        return [((act,),) for act in sorted(SMALLTALK.values(), key=lambda act: act != SMALLTALK[slots["act"]])]
    if ask.kind == "summary":
        verbs = [(f"v_{r}", town().value(slots["entity"], r)) for r in slots["relations"]]
        joins: list[tuple[Form, ...]] = [
            (("join_two" if k == 2 else "join_three", slots["entity"], *choice),)
            for k in range(len(verbs), 1, -1)
            for choice in itertools.permutations(verbs, k)
        ]
        return [*joins, *[(("say", town().fact(slots["entity"], r)),) for r in slots["relations"]]]
    raise UserError(f"the answers of a {ask.kind!r} prompt can not be listed")


def _frames(limit: int) -> list[tuple[str, str]]:
    """(before, after) of an answer: at most one courtesy, up to four flourishes; plain ones first."""
    opens, closes = renderings((COURTESY,)), renderings((FLOURISH,))
    runs = [" ".join(closes[(i + k) % len(closes)] for k in range(n)) for n in range(2, 5) for i in range(len(closes))]
    few = len(closes)
    out = [("", ""), *[(o, "") for o in opens], *[("", c) for c in closes], *[("", run) for run in runs[:few]]]
    out += [(o, c) for c in closes for o in opens]
    out += [("", run) for run in runs[few:]] + [(o, run) for run in runs for o in opens]
    return list(dict.fromkeys(out))[:limit]


def enumerate_answers(ask: Ask, limit: int = 2000) -> list[str]:
    """Distinct answers to the ask: openings x bodies x flourishes, bodies being every paraphrase of every candidate. At most `limit`.

    The limit drops the rarer openings and flourishes first, then further paraphrases of each candidate.
    """
    said = [
        [" ".join(choice) for choice in itertools.islice(itertools.product(*map(renderings, core)), limit)] for core in _cores(ask)[:limit]
    ]
    bodies = [body for turn in itertools.zip_longest(*said) for body in turn if body is not None]  # one paraphrase of each, then the next
    bodies = list(dict.fromkeys(bodies))
    room = max(1, limit // max(len(bodies), 1))
    frames = _frames(max(room, 20)) if len(bodies) * 20 > limit else _frames(room)
    bodies = bodies[: max(1, limit // len(frames))]
    return [" ".join(part for part in (before, body, after) if part) for body in bodies for before, after in frames][:limit]


# ---------------------------------------------------------------- tables of the world


class Exposure(NamedTuple):
    """One fact: its value (None: never stated), how often documents state it, what sailors say instead, the split of its entity."""

    entity: str
    relation: str
    value: str | None
    stated: float
    rumour: str | None
    split: str


def exposure_table(documents: int | None = None) -> list[Exposure]:
    """Every fact of the town with its expected number of statements in so many documents, the best known first."""
    facts, n = town(), EXPOSURE_DOCUMENTS if documents is None else documents
    rows = [
        Exposure(e, r, facts.value(e, r), exposure(e, r, n) if (e, r) in facts.truth else 0.0, facts.rumour.get((e, r)), facts.split(e))
        for e in facts.entities
        for r in facts.relations(e)
    ]
    return sorted(rows, key=lambda row: -row.stated)


def step_labels(ask: Ask, text: str) -> list[tuple[str, float | None]]:
    """Each sentence of a worked sum with its exact label: 1 where it is the next step of the right solution, 0 where it is another step.

    Sentences that are no step have None. After a wrong step the right solution is still the measure. ask: kind "arithmetic".
    """
    tokens, sentences = grammar().parse(text)
    wanted = answers.solution(ask.slots)
    out: list[tuple[str, float | None]] = []
    done = 0
    for sentence in sentences:
        words = " ".join(tokens[sentence.start : sentence.end])
        if sentence.form is None or sentence.form[0] not in ("add", "take", "now"):
            out.append((words, None))
            continue
        out.append((words, float(done < len(wanted) and sentence.form == wanted[done])))
        done += 1
    return out


# ---------------------------------------------------------------- what raters see


MISSUM = 0.5  # share of sums that a model of this size gets wrong


def typical_answer(ask: Ask, draw: Draw) -> str:
    """An answer such as a model trained on the demonstrations samples: their styles, their faults, and slips in sums."""
    core, _ = demonstrated(ask, draw)
    if ask.kind == "arithmetic" and draw.chance(MISSUM):
        core = answers.slipped(ask.slots, draw)
    dressed = answers.dress(ask.kind, ask.slots, core, draw, answers.style(ask.kind, ask.slots, draw))
    return answers.render(ask.kind, ask.slots, dressed, draw)


@lru_cache(maxsize=4)
def reference_pairs(n: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, F] of two different typical answers to each of n training prompts: on these, agreement and ceilings are quoted."""
    draw = Draw(stream("reference_pairs"))
    first, second = [], []
    for record in dataset("prompts", n=n, seed=0, split="reference"):
        ask = Ask.of(record)
        a = b = typical_answer(ask, draw)
        while a == b:
            b = typical_answer(ask, draw)
        first.append(features(ask, a))
        second.append(features(ask, b))
    return matrix(first), matrix(second)
