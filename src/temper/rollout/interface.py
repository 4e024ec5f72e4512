"""What the engine asks of a way to run a model: `decode.py`, `graphs.py` and `lockstep.py` have such. Floor 3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from temper.rollout.sampling import Sampling, draw


class Batch(Protocol):
    """The cache of rows that were admitted together."""

    def keep(self, rows: int, moves: Sequence[tuple[int, int]]) -> None:
        """Only the first `rows` rows remain, after each (to, from) of `moves` has been moved."""


class Decoder(ABC):
    """A way to run the model."""

    @abstractmethod
    def admit(self, prompts: Sequence[Sequence[int]], n: int, room: int) -> Sequence[tuple[int, Any, Tensor]]:
        """Compute prompts that come longest first, for n rows each that will have up to `room` tokens of their own.

        Batches of consecutive prompts: (how many prompts, the cache of their n rows each, the logits [prompts, V] of what comes next).
        """

    @abstractmethod
    def step(self, batches: Sequence[Any], tokens: Tensor) -> Tensor:
        """Feed every row of all batches its next token, tokens [R] -> logits [R, V] float32 of the one after."""

    def turn(
        self, batches: Sequence[Any], tokens: Tensor, uniform: Tensor | None, sampling: Sampling, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same, and draw it (`draw`): (tokens [R], log-probs [R])."""
        return draw(self.step(batches, tokens), uniform, sampling, seen)
