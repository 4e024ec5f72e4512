"""Supervised fine-tuning against TRL's SFTTrainer, of all weights and by LoRA: conversations, loss on the assistant's tokens."""

from typing import Any

from bench.data import OPTIM, Setup
from bench.training import Peer, with_liger
from temper.forest import Tree
from temper.methods import sft
from temper.models.adapt import Adapter

LORA = Adapter(adapter="lora", adapter_lr=1.0)  # rank 16 on all linear layers but the head, at the same rate as the peer's


class SFT:
    name = "sft"
    optim = OPTIM

    def __init__(self, setup: Setup, trees: list[Tree] | None = None, batch: int = 0) -> None:
        self.setup = setup
        self.trees = setup.chat_trees if trees is None else trees
        self.batch = batch or setup.scale.chats
        plain = {"gradient_checkpointing": False, "max_length": None}
        peers = [Peer(micro, more=plain) for micro in sorted({min(m, self.batch) for m in (2, 4, 8, 16)})]
        self.candidates = with_liger([*peers, Peer(min(4, self.batch), more={**plain, "padding_free": True})], setup.device)
        self.default = Peer(min(8, self.batch), sort=False, more={})

    def model(self) -> Any:
        return self.setup.policy()

    def ours(self, model, batching):
        return sft.train(sft.SFT(model="", data="", batching=batching, optim=self.optim), model, self.trees)

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        segments = [self.trees[row][0] for row in rows]
        data = [
            {
                "input_ids": list(s.tokens),
                "labels": [t if w else -100 for t, w in zip(s.tokens, s.target or [0.0] * len(s.tokens), strict=True)],
            }
            for s in segments
        ]
        return SFTTrainer(
            model,
            SFTConfig(**common),
            train_dataset=Dataset.from_list(data),
            processing_class=self.setup.tokenizer,
            callbacks=[callback],
        )


class LoRA(SFT):
    """The same adapter of PEFT on both sides, A drawn from one seed."""

    name = "lora"

    def model(self) -> Any:
        return self.setup.policy(LORA)
