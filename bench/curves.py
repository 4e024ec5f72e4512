"""How the cost grows: with the length of rows, their number, the vocabulary and the answers to a prompt; on the tiny model."""

import random
from collections.abc import Iterator
from statistics import median
from typing import Any

from bench import training
from bench.data import SEED, Setup
from bench.machine import in_turn
from bench.rollout import Generate, Rollouts
from bench.sft import SFT
from bench.training import Peer
from temper.forest import Segment
from temper.models.load import new_model

POINTS = {
    "length": (64, 128, 256, 512, 1024),  # tokens of a row; 4,096 in a step
    "batch": (1, 2, 4, 8, 16, 32),  # rows of 256 tokens
    "vocabulary": (1024, 4096, 16384, 65536),  # 8 rows of 256 tokens
    "answers": (1, 2, 4, 8),  # to each of a quarter of the prompts
}


class Synthetic(SFT):
    """SFT on rows of random tokens, every one but the first learned."""

    def __init__(self, setup: Setup, length: int, batch: int, vocabulary: int) -> None:
        draw = random.Random(SEED)
        rows = [[draw.randrange(6, vocabulary) for _ in range(length)] for _ in range(batch)]
        super().__init__(setup, [[Segment(row, [0.0] + [1.0] * (length - 1))] for row in rows], batch)
        self.vocabulary = vocabulary

    def model(self) -> Any:
        return new_model(self.setup.scale.size, self.vocabulary, self.setup.tokenizer, seed=SEED, device=self.setup.device)


def points(setup: Setup, times: int) -> Iterator[dict[str, Any]]:
    """{curve, x, ours, peer}: median seconds of a step, in turn; the peer holds about 1,024 tokens in a micro-batch."""
    vocabulary = setup.scale.vocabulary
    shapes = {
        "length": lambda x: (x, 4096 // x, vocabulary),
        "batch": lambda x: (256, x, vocabulary),
        "vocabulary": lambda x: (256, 8, x),
    }
    for curve, shape in shapes.items():
        for x in POINTS[curve]:
            length, batch, size = shape(x)
            peer = Peer(max(1, min(batch, 1024 // length)))
            ours, theirs, _, _ = training.side_by_side(Synthetic(setup, length, batch, size), peer, None, times)
            yield {"curve": curve, "x": x, "ours": median(t.seconds for t in ours), "peer": median(t.seconds for t in theirs)}
    for x in POINTS["answers"]:
        task = Rollouts(setup, each=x)
        task.prompts = task.prompts[: max(1, len(task.prompts) // 4)]
        how = Generate("static", len(task.prompts))
        ours_s, theirs_s = in_turn(task.side("ours", how), task.side("peer", how), times, setup.device)
        yield {"curve": "answers", "x": x, "ours": median(ours_s), "peer": median(theirs_s)}
