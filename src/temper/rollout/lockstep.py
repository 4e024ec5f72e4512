"""Several models decoded in lockstep, each with a cache of its own; every token is drawn from their mixed log-probs. Floor 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from temper.models.mix import mixed_logp
from temper.rollout.interface import Batch, Decoder


class LockstepBatch:
    """The caches of the same rows in every model."""

    def __init__(self, parts: Sequence[Batch]) -> None:
        self.parts = parts

    def keep(self, rows: int, moves: Sequence[tuple[int, int]]) -> None:
        for part in self.parts:
            part.keep(rows, moves)


class Lockstep(Decoder):
    """A decoder of decoders (see `temper.rollout.decode`), all of one kind: how they cut prompts into batches depends on lengths alone."""

    def __init__(self, decoders: Sequence[Decoder], weights: Sequence[float]) -> None:
        self.decoders, self.weights = decoders, weights

    def admit(self, prompts: Sequence[Sequence[int]], n: int, room: int) -> list[tuple[int, LockstepBatch, Tensor]]:
        admitted = zip(*(decoder.admit(prompts, n, room) for decoder in self.decoders), strict=True)
        return [
            (parts[0][0], LockstepBatch([batch for _, batch, _ in parts]), mixed_logp([first for _, _, first in parts], self.weights))
            for parts in admitted
        ]

    def step(self, batches: Sequence[Any], tokens: Tensor) -> Tensor:
        logits = [decoder.step([batch.parts[k] for batch in batches], tokens) for k, decoder in enumerate(self.decoders)]
        return mixed_logp(logits, self.weights)
