"""A reward model as a rater: one number per answer, on the scale of the answers it was trained on. Floor 4."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from temper.config import UserError
from temper.data.packing import pack
from temper.data.template import render_chat
from temper.forest import Forest, Segment, plant
from temper.judges.rating import Answer
from temper.models.heads import scalar
from temper.models.load import label_names, load_scalar
from temper.records import Message


class RewardModel:
    """Scores are (raw - mean) / std, with the mean and deviation over the answers seen in training (arXiv:2203.02155, sec. 3.5).

    With several heads each is put on its own scale, and the score is their sum, weighted as it was trained; DIR:HEAD is that head alone.
    """

    def __init__(self, folder: str | Path, *, weights: Mapping[str, float] | None = None, **how: Any) -> None:
        """weights: of heads by name, those that are not named count 0. how: device and precision, see `load_scalar`.

        Raises UserError for a folder that holds no reward model, and for a head that it lacks.
        """
        self.name = str(folder)
        place, colon, head = self.name.rpartition(":")
        if not colon or Path(self.name).exists():
            place, head = self.name, ""
        self.model, self.tokenizer = load_scalar(place, labels=None, **how)
        config: Any = self.model.config
        if not any(kind.endswith("ForSequenceClassification") for kind in config.architectures or []):
            raise UserError(f"{place}: a language model, not a reward model; train one from it with `temper reward`")
        if getattr(config, "temper_process", None):
            raise UserError(f"{place}: a process reward model, which scores steps; give a reward model")
        labels, scale = label_names(config), getattr(config, "temper_reward", None) or {}
        chosen = {head: 1.0} if head else weights if weights is not None else scale.get("weights", dict.fromkeys(labels, 1.0))
        if lacking := chosen.keys() - set(labels):
            there = f"its heads are {', '.join(labels)}" if len(labels) > 1 else "it has one, without a name"
            raise UserError(f"{place}: no head {sorted(lacking)[0]!r}; {there}")
        self.heads = labels if len(labels) > 1 else []
        mean, std = (torch.tensor(scale.get(key, float(i))).expand(len(labels)) for i, key in enumerate(("mean", "std")))
        weight = torch.tensor([float(chosen.get(label, 0.0)) for label in labels])
        if len(labels) == 1:
            self.mean, self.std = float(mean), float(std)
        else:
            self.mean, self.std = float((weight * mean / std).sum()), 1.0
        self.factor = (weight / std).to(self.model.device)  # of each head's raw score

    def score(self, forest: Forest, at: Tensor) -> Tensor:
        """Scores read at the token indices `at` [n], the last token of each answer -> [n]."""
        with torch.no_grad():
            raw = scalar(self.model, forest, at).float()
            return raw @ self.factor - self.mean if self.heads else (raw - self.mean) / self.std

    def rate(self, answers: Sequence[Answer], budget: int = 8192) -> list[float | None]:
        """One score per answer, read at its last token; answers to one prompt that stand together share it."""
        trees = [
            [Segment(list(prompt)), *(Segment(list(answer.tokens), parent=0) for answer in group)]
            for prompt, group in groupby(answers, lambda answer: answer.prompt_ids)
        ]
        found: list[list[float]] = [[] for _ in trees]
        for index in pack([sum(len(s.tokens) for s in tree) for tree in trees], budget):
            forest = plant([trees[i] for i in index]).to(self.model.device)
            scores = iter(self.score(forest, forest.end[forest.parent >= 0] - 1).tolist())
            for i in index:
                found[i] = [next(scores) for _ in trees[i][1:]]
        return [score for scores in found for score in scores]

    def score_answers(self, prompts: Sequence[Sequence[Message]], answers: Sequence[str], budget: int = 8192) -> list[float]:
        """One score per (prompt, answer), rendered as in training: read at the end of the answer's turn."""
        chats = [[*p, Message(role="assistant", content=a)] for p, a in zip(prompts, answers, strict=True)]
        trees = [[Segment(*render_chat(self.tokenizer, chat, "last"))] for chat in chats]
        out = [0.0] * len(trees)
        for group in pack([len(t[0].tokens) for t in trees], budget):
            forest = plant([trees[i] for i in group]).to(self.model.device)
            for i, value in zip(group, self.score(forest, forest.end - 1).tolist(), strict=True):
                out[i] = value
        return out


def remember_scale(model: Any, scores: Tensor, weights: Mapping[str, float] | None = None) -> None:
    """Write the mean and deviation of these raw scores [n], or of each head [n, heads], into the model's configuration; and the weights."""
    mean, std = scores.mean(0).tolist(), scores.std(0).clamp(min=1e-6).tolist()
    model.config.temper_reward = {"mean": mean, "std": std, **({"weights": dict(weights)} if weights else {})}
