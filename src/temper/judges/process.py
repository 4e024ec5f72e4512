"""Step labels, and process reward models as raters: of steps, of whole answers, in a search over steps. Floor 4.

Labels come from people (files of `Steps`), from the embedded world's exact oracle, or from rollouts (arXiv:2312.08935): a step is as good
as the chance to come from it to the right answer.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from temper.config import UserError
from temper.data.packing import pack
from temper.data.steps import STOPS, By, cut, step_ends
from temper.forest import Segment, plant
from temper.judges.rating import Answer, Rater
from temper.models.heads import scalar
from temper.models.load import load_scalar
from temper.records import Prompt, Steps
from temper.rollout import Request, Sampling, sample
from temper.stats.process import AGGREGATES, aggregate
from temper.world import Ask, correct
from temper.world.grammar import words
from temper.world.oracles import step_labels

CLASSES = ("wrong", "neutral", "right")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


# ---------------------------------------------------------------- labels


def right_answer(prompt: Prompt, text: str) -> bool:
    """Whether the answer comes to the right result: exactly on the world; elsewhere its last number against the row's `answer`.

    Raises UserError for a prompt that says neither.
    """
    if "ask" in prompt.meta:
        return correct(Ask.of(prompt), text)
    wanted = str(prompt.meta.get("answer", "")).replace(",", "")
    if not NUMBER.fullmatch(wanted):
        raise UserError(f"{prompt.meta.get('at', 'a prompt')}: no number to check answers against; give rows an `answer`, as GSM8K has it")
    found = NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(wanted)


def exact_labels(prompt: Prompt, text: str, by: By) -> list[float]:
    """The oracle's label of each step of an answer to a sum of the world: 1 where it is the next step of the solution or no step at all
    (a courtesy), else 0; the last is 1 only if the solution is then complete. Raises UserError for another prompt."""
    if "ask" not in prompt.meta or prompt.meta["ask"]["kind"] != "arithmetic":
        raise UserError(f"{prompt.meta.get('at', 'a prompt')}: the oracle knows steps of the world's sums alone; take --labels rollouts")
    spans = cut(text, by)
    ends = [len(words(text[:b])) for _, b in spans]  # in words, as the oracle counts
    labels = [1.0] * len(spans)
    at, step, found = 0, 0, 0
    for said, label in step_labels(Ask.of(prompt), text):
        at += len(said.split())
        while step + 1 < len(ends) and ends[step] < at:
            step += 1
        if label is not None:
            labels[step], found = min(labels[step], label), found + 1
    if labels and found < len(prompt.meta["ask"]["slots"]["changes"]) + 1:
        labels[-1] = 0.0
    return labels


def rollout_labels(
    policy: Any,
    tokenizer: Any,
    answers: Sequence[Answer],
    n: int,
    by: By,
    sampling: Sampling,
    stop: Sequence[int],
    seed: Sequence[int | str],
) -> list[list[float]]:
    """Of each answer's steps the share of n completions that come to the right result (arXiv:2312.08935 eq. 3; above 0 is its hard label,
    eq. 4). Of the last step it is whether the answer itself did. Equal beginnings are completed once."""
    ends = [step_ends(tokenizer, answer.tokens, by) for answer in answers]
    begun: dict[tuple[int, ...], int] = {}  # prompt and steps so far -> which answer they were met in first
    for i, (answer, here) in enumerate(zip(answers, ends, strict=True)):
        for end in here[:-1]:
            begun.setdefault((*answer.prompt_ids, *answer.tokens[: end + 1]), i)
    sampled = sample(policy, Request(list(begun), sampling=sampling, stop=stop, n=n, seed=seed))
    chance = {}
    for (ids, i), group in zip(begun.items(), sampled, strict=True):
        before = list(ids[len(answers[i].prompt_ids) :])
        texts = [tokenizer.decode(before + one.tokens, skip_special_tokens=True) for one in group]
        hits = [one.finish == "stop" and right_answer(answers[i].prompt, text) for one, text in zip(group, texts, strict=True)]
        chance[ids] = sum(hits) / n
    return [
        [
            *(chance[(*answer.prompt_ids, *answer.tokens[: end + 1])] for end in here[:-1]),
            *([float(right_answer(answer.prompt, answer.text))] if here else []),
        ]
        for answer, here in zip(answers, ends, strict=True)
    ]


def solutions(policy: Any, tokenizer: Any, prompts: Sequence[Prompt], request: Request, by: By, rollouts: int) -> list[Steps]:
    """The policy's different answers to the prompts of the request, cut into steps and labelled: by so many rollouts, or with 0 exactly.

    Answers that did not end are left out. meta: the prompt's, and whether the answer is `correct`.
    """
    found: dict[tuple[int, str], Answer] = {}
    for i, (prompt, ids, group) in enumerate(zip(prompts, request.prompts, sample(policy, request), strict=True)):
        for one in group:
            text = str(tokenizer.decode(one.tokens, skip_special_tokens=True)).strip()
            if one.finish == "stop" and cut(text, by):
                found.setdefault((i, text), Answer(prompt, ids, one.tokens, text, True))
    answers = list(found.values())
    if rollouts:
        stop = [token for token in request.stop if isinstance(token, int)]
        labels = rollout_labels(policy, tokenizer, answers, rollouts, by, request.sampling, stop, ("rollouts", *request.seed))
    else:
        labels = [exact_labels(answer.prompt, answer.text, by) for answer in answers]
    return [
        Steps(
            prompt=answer.prompt.messages,
            steps=[answer.text[a:b] for a, b in cut(answer.text, by)],
            labels=list(each),
            meta={**answer.prompt.meta, "correct": right_answer(answer.prompt, answer.text)},
        )
        for answer, each in zip(answers, labels, strict=True)
    ]


# ---------------------------------------------------------------- the model as a rater


def is_process(folder: str | Path) -> bool:
    """Whether a folder holds a process reward model."""
    stage, model = (Path(folder, *inside, "config.json") for inside in (("model",), ()))
    try:
        return "temper_process" in json.loads((stage if stage.is_file() else model).read_bytes())
    except (OSError, ValueError):
        return False


class ProcessReward:
    """A model of `temper process-reward`: P(right) of each step, and of an answer their product, minimum, last or mean.

    An outcome reward model is the same with one step, the whole answer.
    """

    def __init__(self, folder: str | Path, *, how: str | None = None, **where: Any) -> None:
        """how: the aggregation, by default the one that it was trained with. where: device and precision, see `load_scalar`.

        Raises UserError for a folder that holds no process reward model, and for an unknown aggregation.
        """
        self.name = str(folder)
        self.model, self.tokenizer = load_scalar(str(folder), labels=None, **where)
        told = getattr(self.model.config, "temper_process", None)
        if not told:
            raise UserError(f"{folder}: not a process reward model; train one with `temper process-reward`")
        self.by: By = told["by"]
        self.outcome, self.how = bool(told["outcome"]), how or str(told["aggregate"])
        if self.how not in AGGREGATES:
            raise UserError(f"{folder}: no aggregation {self.how!r}; there are {', '.join(AGGREGATES)}")

    def ends(self, answer: Answer) -> list[int]:
        """Indices of the tokens at which the answer's steps are read."""
        found = step_ends(self.tokenizer, answer.tokens, self.by)
        return found[-1:] if self.outcome else found

    def steps(self, answers: Sequence[Answer], budget: int = 8192) -> list[list[tuple[int, float]]]:
        """Of each answer its steps as (index of the last token, P(right)): what step-wise rewards of PPO and GRPO are made of.

        Answers to one prompt that stand together share it.
        """
        trees, ends = [], []
        for _, group in groupby(answers, lambda answer: answer.prompt_ids):
            here = list(group)
            ends.append([self.ends(answer) for answer in here])
            spoken = [(answer, each) for answer, each in zip(here, ends[-1], strict=True) if each]
            trees.append([Segment(list(here[0].prompt_ids)), *(Segment(list(a.tokens), parent=0) for a, _ in spoken)])
        chances: list[list[float]] = [[] for _ in trees]
        for index in pack([sum(len(s.tokens) for s in tree) for tree in trees], budget):
            forest = plant([trees[i] for i in index]).to(self.model.device)
            starts = iter(forest.start[forest.parent >= 0].tolist())
            at = [start + end for i in index for each in ends[i] if each for start in [next(starts)] for end in each]
            if at:
                p = iter(self.chance(scalar_of(self.model, forest, at)))
                for i in index:
                    chances[i] = [next(p) for each in ends[i] for _ in each]
        out = []
        for tree_ends, tree_chances in zip(ends, chances, strict=True):
            each = iter(tree_chances)
            out += [[(end, next(each)) for end in here] for here in tree_ends]
        return out

    @staticmethod
    def chance(raw: torch.Tensor) -> list[float]:
        """P(right) from raw scores: [n], or [n, 3] where neutral counts as right (arXiv:2305.20050)."""
        return (raw.sigmoid() if raw.ndim == 1 else 1 - raw.softmax(-1)[:, 0]).tolist()

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        """One aggregated score per answer in [0, 1]; None for one that says nothing."""
        return [aggregate([p for _, p in steps], self.how) if steps else None for steps in self.steps(answers)]


@torch.no_grad()
def scalar_of(model: Any, forest: Any, at: Sequence[int]) -> torch.Tensor:
    """Raw scores at the tokens `at`."""
    return scalar(model, forest, torch.tensor(at, device=forest.tokens.device)).float()


# ---------------------------------------------------------------- search over steps


@dataclass
class _Beam:
    answer: Answer
    done: bool = False
    score: float = field(default=float("-inf"))


def search(
    policy: Any,
    tokenizer: Any,
    judge: Rater,
    prompts: Sequence[tuple[Prompt, Sequence[int]]],
    *,
    by: By,
    sampling: Sampling,
    stop: Sequence[int],
    keep: int = 2,
    expand: int = 4,
    most: int = 32,
    seed: Sequence[int | str] = ("search",),
    said: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Step-guided beam search: each beam goes on with `expand` sampled steps, the `keep` best beginnings by the judge stay, until all have
    ended, `most` steps or --max-new tokens are out; the best beam of each prompt (arXiv:2408.03314, sec. 5.2).

    prompts: (prompt, its ids). said: told after each round how many prompts go on.
    """
    beams = [[_Beam(Answer(prompt, list(ids), [], "", False))] for prompt, ids in prompts]
    for number in range(most):
        live = [(i, beam) for i, group in enumerate(beams) for beam in group if not beam.done]
        room = sampling.max_new - max((len(beam.answer.tokens) for _, beam in live), default=0)
        if not live or room < 1:
            break
        request = Request(
            [[*beam.answer.prompt_ids, *beam.answer.tokens] for _, beam in live],
            sampling=sampling.model_copy(update={"max_new": room}),
            stop=[*stop, *STOPS[by]],
            n=expand,
            seed=(*seed, number),
            tokenizer=tokenizer,
        )
        grown: list[list[_Beam]] = [[beam for beam in group if beam.done] for group in beams]
        seen: list[set[tuple[int, ...]]] = [set() for _ in beams]
        for (i, beam), group in zip(live, sample(policy, request), strict=True):
            for one in group:
                tokens = [*beam.answer.tokens, *one.tokens]
                if tuple(tokens) in seen[i]:
                    continue
                seen[i].add(tuple(tokens))
                ended = one.stop_reason in stop
                text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
                grown[i].append(_Beam(beam.answer._replace(tokens=tokens, text=text, ended=ended), ended or one.finish == "length"))
        fresh = [(i, beam) for i, group in enumerate(grown) for beam in group if beam.score == float("-inf")]
        for (_, beam), score in zip(fresh, judge.rate([beam.answer for _, beam in fresh]), strict=True):
            beam.score = float("-inf") if score is None else score
        beams = [sorted(group, key=lambda beam: -beam.score)[:keep] for group in grown]
        if said:
            said(sum(any(not beam.done for beam in group) for group in beams))
    return [max(group, key=lambda beam: (beam.answer.ended, beam.score)).answer for group in beams]
