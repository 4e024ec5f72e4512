"""Sampled answers and what they were rated: the reward that is learned from, and what a run says of it. Floor 5.

An answer that could not be rated is left out of learning, of every baseline and of the mean reward, and counted; it is never scored 0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, Protocol

import pydantic
import torch
from torch import Tensor

from temper.config import Settings, UserError, idle, opt
from temper.data.packing import pack
from temper.forest import Forest, Segment, Tree, plant
from temper.judges.process import ProcessReward
from temper.judges.rating import Answer, Rater
from temper.judges.reward_model import RewardModel
from temper.losses.kl import k1
from temper.train import ranks

EQUAL = 1e-4  # rewards of a group that differ by less are equal: one answer scored twice differs by rounding
SHOWN = 2  # of the most and of the least rewarded answers of a rollout that are written down
METRICS = {
    "reward": "mean reward of the answers; a reward model's has mean 0 and deviation 1 over its training answers",
    "unrated": "share of answers that could not be rated: they are left out of learning",
    "dead": "share of sampled groups whose rewards are all equal: they say nothing of which answer is better",
    "kl": "mean over answers of the summed log-ratio of policy over reference (k1), in nats",
    "kl_error": "standard error of kl",
    "entropy": "mean of -log p over the sampled tokens, in nats",
    "length": "mean tokens of an answer",
    "truncated": "share of answers that reached --max-new without ending",
    "sampler_gap": "mean absolute difference between the sampler's and the trainer's log-probs",
    "sampler_gap_most": "the largest such difference in the rollout",
}


class Ending(Settings):
    """What becomes of answers that did not end, or nearly."""

    missing_eos: float | None = opt(None, "what an answer that did not end gets, see --missing-eos-is; none: its own reward")
    missing_eos_is: Literal["cap", "reward", "penalty"] = opt("cap", "the most it can get, what it gets instead, or what is taken off")
    truncated: Literal["learn", "mask"] = opt("learn", "mask: answers that did not end are left out of learning")
    overlong: float | None = opt(None, "last share of --max-new over which a penalty grows to 1; none: the preset's, or 0", ge=0, le=1)

    @pydantic.model_validator(mode="after")
    def _used(self) -> "Ending":
        if self.missing_eos is None:
            idle(self, ["missing_eos_is"], "without --missing-eos")
        return self

    def of(self, reward: float, length: int, ended: bool, most: int) -> float:
        """The reward of an answer of `length` tokens out of `most`, with the soft penalty of arXiv:2503.14476 eq. 13."""
        if not ended and self.missing_eos is not None:
            changed = {"cap": min(reward, self.missing_eos), "reward": self.missing_eos, "penalty": reward - abs(self.missing_eos)}
            reward = changed[self.missing_eos_is]
        room = (self.overlong or 0.0) * most
        over = length - (most - room) if ended else room
        return reward - over / room if room and over > 0 else reward


class StepRater(Protocol):
    """A process reward model: what rates the steps of answers."""

    name: str

    def steps(self, answers: Sequence[Answer]) -> Sequence[Sequence[tuple[int, float]]]:
        """Of each answer its steps, in order, as (index of the step's last token among the answer's, its reward)."""
        ...


@dataclass
class Sampled:
    """One answer of a rollout."""

    answer: Answer
    sampler_logp: Tensor  # [T]
    rated: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)  # of the rating, by component
    steps: Sequence[tuple[int, float]] = ()
    reward: float = 0.0  # what it was rated, normalised, and what its end changed
    learned: bool = False
    group: int = 0
    found: dict[str, Tensor] = field(default_factory=dict)  # [T] ref_logp, and what else was measured: logp, value

    @property
    def logp(self) -> Tensor:
        """By the trainer; by the sampler where the trainer was not asked."""
        return self.found.get("logp", self.sampler_logp)

    @property
    def kl(self) -> Tensor:
        """[T] k1 to the reference."""
        return k1(self.logp, self.found["ref_logp"])

    @property
    def step_reward(self) -> Tensor:
        """[T] at the steps' last tokens, 0 elsewhere."""
        out = torch.zeros_like(self.sampler_logp)
        for end, reward in self.steps:
            out[end] += reward
        return out


def step_rater(folder: str, tokenizer: Any, **how: Any) -> StepRater:
    """What a --step-reward names: a process reward model. Raises UserError for anything else, and for another tokenizer."""
    model = ProcessReward(folder, **how)
    if model.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{folder}: its tokenizer is not that of the policy; train the process reward model on this model's tokenizer")
    return model


def reward_model(reward: Rater) -> tuple[float, RewardModel] | None:
    """The first reward model with one head among the parts of a reward, and its weight there."""
    parts = getattr(reward, "terms", [(1.0, reward)])
    return next(((w, part) for w, part in parts if w and isinstance(part, RewardModel) and not getattr(part, "heads", ())), None)


def rate(answers: Sequence[Sampled], reward: Rater, steps: StepRater | None) -> str:
    """Writes down what the raters say; a number that is none, or is infinite, is no rating. Why the first that has none has none, where
    the rater tells. Raises UserError for too few ratings or too many."""
    asked = [a.answer for a in answers]
    if not asked:
        return ""
    told = reward.ratings(asked) if hasattr(reward, "ratings") else None
    scores = told.scores if told else reward.rate(asked)
    parts = told.parts if told and len(told.parts) > 1 else {}
    stepwise = steps.steps(asked) if steps else [()] * len(asked)
    for what, many in (reward.name, len(scores)), (steps and steps.name, len(stepwise)):
        if many != len(asked):
            raise UserError(f"{what}: {many} ratings for {len(asked)} answers; it must give one for each")
    for i, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        answer.parts = {name: x for name, given in parts.items() if (x := given[i]) is not None}
        answer.steps = stepwise[i]
        answer.rated = None if score is None or not isfinite(score) else float(score)
    return "; ".join(f"{name}: {failure.first}" for name, failure in told.failures.items()) if told else ""


def dead(group: Sequence[Sampled]) -> bool:
    """Whether nothing tells its answers apart."""
    rewards = [a.reward for a in group if a.learned]
    return len(rewards) < 2 or max(rewards) - min(rewards) < EQUAL


def summary(answers: Sequence[Sampled], sampled: Sequence[Sequence[Sampled]]) -> dict[str, float]:
    """The metrics of a rollout. answers: measured; sampled: all groups, those that were replaced too."""
    every = [a for group in sampled for a in group]
    rated = [a for a in answers if a.rated is not None]
    kl = torch.tensor([float(a.kl.sum()) for a in answers], dtype=torch.double)
    out = {
        "reward": _mean([a.reward for a in rated]),
        "unrated": _mean([a.rated is None for a in every]),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else 0.0,
        "entropy": float(-torch.cat([a.logp for a in answers]).mean()),
        "length": _mean([len(a.answer.tokens) for a in answers]),
        "truncated": _mean([not a.answer.ended for a in answers]),
    }
    if any(len(group) > 1 for group in sampled):
        out["dead"] = _mean([dead(group) for group in sampled])
    if all("logp" in a.found for a in answers):
        gap = torch.cat([(a.logp - a.sampler_logp).abs() for a in answers])
        out |= {"sampler_gap": float(gap.mean()), "sampler_gap_most": float(gap.max())}
    names = dict.fromkeys(name for a in rated for name in a.parts)
    return out | {f"reward of {name}": _mean([a.parts[name] for a in rated if name in a.parts]) for name in names}


def extremes(answers: Sequence[Sampled]) -> dict[str, list[dict[str, Any]]]:
    """The most and the least rewarded answers, for people to read."""
    ranked = sorted((a for a in answers if a.rated is not None), key=lambda a: -a.reward)

    def row(a: Sampled) -> dict[str, Any]:
        said = {"prompt": a.answer.prompt.messages[-1].content, "answer": a.answer.text, "ended": a.answer.ended, "reward": a.reward}
        return said | ({"parts": dict(a.parts)} if a.parts else {}) | ({"steps": [list(s) for s in a.steps]} if a.steps else {})

    return {"most": [row(a) for a in ranked[:SHOWN]], "least": [row(a) for a in ranked[::-1][:SHOWN]]}


def _mean(x: Sequence[float]) -> float:
    return float(torch.tensor(x, dtype=torch.double).mean()) if x else 0.0


def own(forest: Forest) -> Tensor:
    """The tokens of answers, those without a target too."""
    return (forest.columns["row"] >= 0)[forest.segment].nonzero()[:, 0]


def trees_of(groups: Sequence[Sequence[Sampled]], target: Callable[[int], float]) -> list[Tree]:
    """A prompt and its answers under it. row: which answer of the rollout a segment is; -1 a prompt."""
    trees: list[Tree] = []
    row = 0
    for group in groups:
        prompt = list(group[0].answer.prompt_ids)
        tree = [Segment(prompt, [0.0] * len(prompt), labels={"row": -1.0, "ended": -1.0, "score": 0.0})]
        for a in group:
            n = len(a.answer.tokens)
            labels = {"row": float(row), "ended": float(a.answer.ended), "score": a.reward}
            columns = {"sampler_logp": a.sampler_logp.tolist()}
            tree.append(Segment(list(a.answer.tokens), [target(n) if a.learned else 0.0] * n, 0, columns, labels))
            row += 1
        trees.append(tree)
    return trees


def planted(trees: Sequence[Tree], microbatch: int) -> list[Forest]:
    """Micro-batches, at least one for each rank where there are trees enough. Weights: the learned tokens and answers."""
    sizes = [sum(len(segment.tokens) for segment in tree) for tree in trees]
    groups = [[part[i] for i in g] for part in ranks.shares(sizes) for g in pack([sizes[i] for i in part], microbatch)]
    return [plant([trees[i] for i in group], weights_of([trees[i] for i in group])) for group in groups]


def weights_of(trees: Sequence[Tree]) -> dict[str, float]:
    """The learned tokens, and the answers that have some."""
    learned = [segment for tree in trees for segment in tree if segment.target and segment.target[0]]
    return {"tokens": float(sum(len(segment.tokens) for segment in learned)), "answers": float(len(learned))}
