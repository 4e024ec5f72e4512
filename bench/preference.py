"""Answers that were compared or rated, against TRL: DPO, the reward model and KTO against its DPOTrainer, RewardTrainer and KTOTrainer."""

from typing import Any, ClassVar

from bench.data import LONGEST, OPTIM, Setup
from bench.training import Peer, twin, with_liger
from temper.methods import preference, reward, unpaired
from temper.methods.base import epoch

MICRO = (2, 4, 8)


class DPO:
    """The reference's log-probs are written before the first step, by either side, where the peer's settings say that it can."""

    name = "dpo"
    optim = OPTIM

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
        return preference.train(preference.settings("dpo")(model="", data="", batching=batching, optim=self.optim), model, self.trees)

    def reference(self, model: Any, peer: Peer) -> Any:
        """The peer's, none where it writes down what the policy says before the first step."""
        return None if peer.more.get("precompute_ref_log_probs") else twin(model)

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        pairs = [self.setup.pairs[row] for row in rows]
        data = [{"prompt": _turns(p), "chosen": _said(p.chosen), "rejected": _said(p.rejected)} for p in pairs]
        trainer = DPOTrainer(
            model,
            self.reference(model, peer),
            DPOConfig(**common),
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
    optim = OPTIM
    centring = 0.01

    def __init__(self, setup: Setup) -> None:
        self.setup, self.trees, self.batch = setup, setup.pair_trees(), setup.scale.pairs
        peers = [Peer(micro, more={"gradient_checkpointing": False}) for micro in MICRO if micro <= self.batch]
        self.candidates = with_liger(peers, setup.device)
        self.default = Peer(min(8, self.batch), sort=False, more={})

    def model(self) -> Any:
        return self.setup.scorer()

    def ours(self, model, batching):
        settings = reward.Reward(model="", data="", batching=batching, optim=self.optim, centring=self.centring)
        return reward.train(settings, model, self.trees)

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        ids, margin = [_whole(self.trees[row]) for row in rows], [self.trees[row][-1].labels["margin"] for row in rows]
        data = [{"chosen_ids": w, "rejected_ids": l, "margin": m} for (w, l), m in zip(ids, margin, strict=True)]
        return RewardTrainer(
            model,
            RewardConfig(center_rewards_coefficient=self.centring, **common),
            train_dataset=Dataset.from_list(data),
            processing_class=self.setup.tokenizer,
            callbacks=[callback],
        )


class KTO:
    """Thumbs. What an answer is compared with, z0, is the mean over the whole step here, and over the micro-batch in TRL: where the peer
    divides the step, figures agree to `later` after the first update."""

    name = "kto"
    optim = OPTIM
    later = 1e-2
    weights: ClassVar[tuple[float, float]] = (1.0, 1.0)  # of a thumb up, of a thumb down

    def __init__(self, setup: Setup) -> None:
        self.setup, self.trees, self.batch = setup, setup.thumb_trees(), 2 * setup.scale.pairs
        unpaired.weigh(self.trees, *self.weights)
        plain = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        self.candidates = [Peer(self.batch, sort=False, more=plain), *(Peer(micro, more=plain) for micro in MICRO if micro < self.batch)]
        self.default = Peer(min(8, self.batch), sort=False, more={})

    def model(self) -> Any:
        return self.setup.policy()

    def ours(self, model, batching):
        others = self.written(model, batching)
        return unpaired.train(unpaired.settings("kto")(model="", data="", batching=batching, optim=self.optim), model, self.trees, others)

    def written(self, reference: Any, batching: Any) -> list[Any]:
        """The mismatched pairs of each step; on them and on the trees what the reference says."""
        others = unpaired.mismatches(self.trees, batching, batching.steps(epoch(self.trees)), LONGEST)
        fresh = [t for t in self.trees if "ref_logp" not in t[1].labels]
        preference.with_reference(reference, fresh, batching.tokens_per_microbatch, also=others)
        return others

    def reference(self, model: Any, peer: Peer) -> Any:
        return None if peer.more.get("precompute_ref_log_probs") else twin(model)

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset
        from trl import KTOConfig, KTOTrainer

        # a prompt's mismatched answer is the next one's here and the one's before it in TRL
        rows = [row for at in range(0, len(rows), self.batch) for row in reversed(rows[at : at + self.batch])]
        thumbs = [self.setup.thumbs[row] for row in rows]
        data = [{"prompt": _turns(t), "completion": _said(t.answer), "label": t.rating > 0} for t in thumbs]
        up, down = self.weights
        trainer = KTOTrainer(
            model,
            self.reference(model, peer),
            KTOConfig(desirable_weight=up, undesirable_weight=down, **common),
            train_dataset=Dataset.from_list(data),
            processing_class=self.setup.tokenizer,
            callbacks=[callback],
        )
        assert isinstance(trainer.train_dataset, Dataset)
        for row, given in zip(rows, trainer.train_dataset, strict=True):
            assert [given["prompt_ids"], given["completion_ids"]] == [list(s.tokens) for s in self.trees[row]], f"record {row}"
        return trainer


def _turns(record: Any) -> list[dict[str, Any]]:
    return [m.model_dump() for m in record.prompt]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _whole(tree) -> list[list[int]]:
    """The two conversations of a pair, prompt included, chosen first."""
    head = [] if len(tree) == 2 else list(tree[0].tokens)
    return [[*head, *segment.tokens] for segment in tree[-2:]]
