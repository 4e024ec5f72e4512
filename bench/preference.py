"""Pairs of answers against TRL: DPO against its DPOTrainer, the reward model against its RewardTrainer."""

from typing import Any

from bench.data import OPTIM, Setup
from bench.training import Peer, twin, with_liger
from temper.methods import preference, reward

MICRO = (2, 4, 8)


class DPO:
    """The reference's log-probs are written before the first step, by either side, where the peer's settings say that it can."""

    name = "dpo"

    def __init__(self, setup: Setup) -> None:
        self.setup, self.trees, self.batch = setup, setup.pair_trees(), setup.scale.pairs
        plain = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        peers = [Peer(micro, more=plain) for micro in MICRO if micro <= self.batch]
        self.candidates = with_liger([*peers, Peer(min(4, self.batch), more={"gradient_checkpointing": False})], setup.device)
        self.default = Peer(min(8, self.batch), sort=False, more={})

    def model(self) -> Any:
        return self.setup.policy()

    def ours(self, model, batching):
        if "ref_logp" not in self.trees[0][0].labels:
            preference.with_reference(model, self.trees, batching.tokens_per_microbatch)
        return preference.train(preference.settings("dpo")(model="", data="", batching=batching, optim=OPTIM), model, self.trees)

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        pairs = [self.setup.pairs[row] for row in rows]
        said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
        data = [{"prompt": [m.model_dump() for m in p.prompt], "chosen": said(p.chosen), "rejected": said(p.rejected)} for p in pairs]
        trainer = DPOTrainer(
            model,
            None if peer.more.get("precompute_ref_log_probs") else twin(model),
            DPOConfig(beta=0.1, **common),
            train_dataset=Dataset.from_list(data),
            processing_class=self.setup.tokenizer,
            callbacks=[callback],
        )
        assert isinstance(trainer.train_dataset, Dataset)  # as it was given; with a stream nothing could be compared
        for row, given in zip(rows, trainer.train_dataset, strict=True):
            ids = [[*given["prompt_ids"], *given[side]] for side in ("chosen_ids", "rejected_ids")]
            assert ids == _whole(self.trees[row]), f"record {row}: TRL has other tokens"
        return trainer


class Reward:
    """A scalar head on the policy, centring included on both sides."""

    name = "reward"

    def __init__(self, setup: Setup) -> None:
        self.setup, self.trees, self.batch = setup, setup.pair_trees(), setup.scale.pairs
        peers = [Peer(micro, more={"gradient_checkpointing": False}) for micro in MICRO if micro <= self.batch]
        self.candidates = with_liger(peers, setup.device)
        self.default = Peer(min(8, self.batch), sort=False, more={})

    def model(self) -> Any:
        return self.setup.scorer()

    def ours(self, model, batching):
        return reward.train(reward.Reward(model="", data="", batching=batching, optim=OPTIM), model, self.trees)

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        ids = [_whole(self.trees[row]) for row in rows]
        return RewardTrainer(
            model,
            RewardConfig(center_rewards_coefficient=0.01, **common),
            train_dataset=Dataset.from_list([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in ids]),
            processing_class=self.setup.tokenizer,
            callbacks=[callback],
        )


def _whole(tree) -> list[list[int]]:
    """The two conversations of a pair, prompt included, chosen first."""
    head = [] if len(tree) == 2 else list(tree[0].tokens)
    return [[*head, *segment.tokens] for segment in tree[-2:]]
