"""A reward model as a rater: one number per answer, on the scale of the answers it was trained on. Floor 4."""

from collections.abc import Sequence
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
from temper.models.load import load_scalar
from temper.records import Message


class RewardModel:
    """Scores are (raw - mean) / std, with the mean and deviation over the answers seen in training (arXiv:2203.02155, sec. 3.5)."""

    def __init__(self, folder: str | Path, **how: Any) -> None:
        """how: device and precision, see `load_scalar`."""
        self.name = str(folder)
        self.model, self.tokenizer = load_scalar(str(folder), **how)
        if not any(kind.endswith("ForSequenceClassification") for kind in self.model.config.architectures or []):
            raise UserError(f"{folder}: a language model, not a reward model; train one from it with `temper reward`")
        scale = getattr(self.model.config, "temper_reward", None) or {"mean": 0.0, "std": 1.0}
        self.mean, self.std = float(scale["mean"]), float(scale["std"])

    def score(self, forest: Forest, at: Tensor) -> Tensor:
        """Scores read at the token indices `at` [n], the last token of each answer -> [n]."""
        with torch.no_grad():
            return (scalar(self.model, forest, at).float() - self.mean) / self.std

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


def remember_scale(model: Any, scores: Tensor) -> None:
    """Write the mean and deviation of these raw scores [n] into the model's configuration."""
    model.config.temper_reward = {"mean": float(scores.mean()), "std": float(scores.std().clamp(min=1e-6))}
