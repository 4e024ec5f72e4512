"""How tokens are drawn: the settings, each row's own uniform numbers, and the inverse-CDF draw. Floor 3.

The distribution sampled from is made in transformers' order: repetition penalty on the logits (arXiv:1909.05858 section 4.1, over prompt
and answer), temperature, top-k (arXiv:1805.04833), top-p of what is left (arXiv:1904.09751), min-p of what is left (arXiv:2407.01082).
The log-prob that is returned is none of that but log softmax(logits / temperature) of the drawn token (temperature 1 for greedy): what
the trainer recomputes. Without truncation and penalty the two are one.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from temper.config import Settings, opt


class Sampling(Settings):
    """How answers are drawn."""

    temperature: float = opt(1.0, "divides the logits before sampling; 0 takes the most likely token", ge=0)
    top_k: int = opt(0, "sample only among the k most likely tokens; 0: all", ge=0)
    top_p: float = opt(1.0, "sample only among the most likely tokens that together have this probability", gt=0, le=1)
    min_p: float = opt(0.0, "leave out tokens less likely than this share of the most likely one's probability", ge=0, lt=1)
    repetition_penalty: float = opt(1.0, "divides positive logits of tokens seen before, multiplies negative ones; 1: none", gt=0)
    max_new: int = opt(48, "tokens an answer may have at most, the end token included", ge=1)
    rows: int = opt(256, "answers decoded at the same time", ge=1)
    kernel: Literal["torch", "c"] = opt("torch", "attention of decoding; c: compiled at first use, for float32 on the CPU")
    graphs: bool = opt(True, "on CUDA, decode by recorded graphs; without, every step launches its kernels anew")

    @model_validator(mode="after")
    def _sensible(self) -> "Sampling":
        if not self.temperature and self.truncates:
            raise ValueError(f"{self.truncates} with temperature 0: greedy takes the most likely token; leave one of the two out")
        return self

    @property
    def truncates(self) -> str:
        """The settings that leave tokens out, as words; empty where none does."""
        given = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        return ", ".join(f"{name} {getattr(self, name):g}" for name, is_set in given.items() if is_set)

    @property
    def plain(self) -> bool:
        """Is a token drawn from the model's own distribution at the temperature (or greedily)?"""
        return not self.truncates and self.repetition_penalty == 1


def generator(*key: int | str) -> np.random.Generator:
    """The random numbers of a key, such as ("ppo", seed, rollout): other keys, other numbers."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def uniforms(seed: Sequence[int | str], prompts: Sequence[int], n: int, length: int) -> Tensor:
    """[prompts * n, length] numbers in [0, 1), each row from its own key. As float32: rounded later it may be 1."""
    rows = [generator(*seed, p, k).random(length, dtype=np.float32) for p in prompts for k in range(n)]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniform: Tensor | None, sampling: Sampling, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A token for each row, and its log-prob at the temperature.

    Args:
        logits: [R, V] float32.
        uniform: [R] in [0, 1); None with temperature 0.
        seen: [R, V] the tokens that the repetition penalty is for; None without one.

    Inverse CDF: `multinomial` costs 1.1 to 1.4 times as much, and its numbers would belong to the batch.
    """
    scores = logits
    if seen is not None:
        scores = torch.where(
            seen, torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty), logits
        )
    if uniform is None:
        token = scores.argmax(-1, keepdim=True)
        return token[:, 0], logits.log_softmax(-1).gather(-1, token)[:, 0]
    every = (scores / sampling.temperature).log_softmax(-1)
    p = every.exp()
    if sampling.truncates:
        p = p.mul_(_kept(p, sampling))
    cdf = p.cumsum(-1)
    total = cdf[:, -1:].contiguous()
    token = torch.searchsorted(cdf, uniform[:, None] * total, right=True)
    token = torch.minimum(token, torch.searchsorted(cdf, total))  # rounded up to the total, it would be a token of probability 0
    if seen is not None:
        every = (logits / sampling.temperature).log_softmax(-1)
    return token[:, 0], every.gather(-1, token)[:, 0]


def _kept(p: Tensor, sampling: Sampling) -> Tensor:
    """[R, V] probabilities -> which tokens may be drawn; the most likely one always. Of equal ones the lower id comes first."""
    ordered, order = p.sort(stable=True, dim=-1, descending=True)
    keep = torch.ones_like(p, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :].fill_(False)
    if sampling.top_p < 1:
        left = ordered * keep
        before = left.cumsum(-1) - left
        keep &= before < sampling.top_p * left.sum(-1, keepdim=True)
    keep &= ordered >= sampling.min_p * ordered[:, :1]
    keep[:, 0].fill_(True)
    return torch.zeros_like(keep).scatter_(-1, order, keep)
