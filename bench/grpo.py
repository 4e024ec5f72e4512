"""A whole step of GRPO and of RLOO against TRL's trainers of these names: 8 sampled answers to each prompt, a reward model, one update.

Each side samples for itself while it is timed. `compare` puts our rollout in the place of the trainer's generation and compares updates.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, ClassVar

import torch

from bench.data import OPTIM, SEED, Setup, training_flops
from bench.machine import Refused, Timed
from bench.ppo import Answered, answered
from bench.rollout import PAGE, left_padded
from bench.training import LATER, InTurn, Peer, batching, run_peer
from temper.forest import Forest, Segment, Tree
from temper.methods import grpo
from temper.methods.base import Batching
from temper.methods.rated import Ending
from temper.methods.start import Plan
from temper.methods.switches import Switches
from temper.records import write_jsonl
from temper.rollout import Sampling
from temper.runs import Run
from temper.train import Step

EACH = 8  # answers to a prompt
ROWS = 16  # that the peer's reward model rates at a time, those of like length together


class GRPO:
    name = "grpo"
    optim = OPTIM
    switches: ClassVar[dict[str, Any]] = {"preset": "grpo", "std": "bessel"}
    theirs: ClassVar[dict[str, Any]] = {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}
    unit = 1000.0  # of rewards: TRL adds 1e-4 to a group's deviation, which is nothing then
    updates = 1  # on each rollout
    rollouts = 1  # that are compared
    losses = True  # whether the loss's value is compared, too

    def __init__(self, setup: Setup) -> None:
        self.setup, self.batch = setup, max(2, setup.scale.prompts // 4)
        self.prompts, self.asked = setup.prompts[: self.batch], setup.asked[: self.batch]
        self.trees: list[Tree] = [[Segment(prompt)] for prompt in self.prompts]
        plain = {"gradient_checkpointing": False}
        rows = self.batch * EACH
        blocks = rows * ((max(map(len, self.prompts)) + setup.scale.max_new) // PAGE + 2)
        paged = {"page_size": PAGE, "num_blocks": blocks, "max_batch_tokens": 2048}
        together = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": paged}
        self.candidates = [
            *(Peer(micro, sort=False, more=plain) for micro in (8, 16, 32) if micro <= rows),
            Peer(min(16, rows), sort=False, more=plain | {"cache_implementation": "static"}),
            Peer(min(16, rows), sort=False, more=plain | together),
        ]
        self.default = Peer(8, sort=False, more={})
        self.given: list[Answered] = []  # rollouts that the peer is to learn from, instead of its own

    def model(self) -> Any:
        return self.setup.policy()

    def ours(self, model: Any, batching: Batching) -> Iterator[Step]:
        """model: not used; the method loads it, as a stage does."""
        folder = self.setup.folder
        write_jsonl(folder / "prompts.jsonl", self.asked)
        settings = grpo.GRPO(
            model=str(folder / "policy"),
            reward=f"{self.unit:g}*{folder / 'reward'}",
            prompts=str(folder / "prompts.jsonl"),
            switches=Switches(**self.switches),
            plan=Plan(
                rollouts=ceil(batching.steps(len(self.trees)) / self.updates),
                prompts_per_step=self.batch,
                samples_per_prompt=EACH,
                epochs_per_batch=self.updates,
            ),
            tokens_per_microbatch=batching.tokens_per_microbatch,
            sampling=Sampling(max_new=self.setup.scale.max_new),
            ending=Ending(overlong=0.0),
            window=self.setup.window,
            seed=SEED,
            optim=self.optim,
        )
        return grpo.prepare(settings, Run(self.setup.folder / "run")).steps(None)

    def classes(self) -> tuple[Any, Any]:
        """The peer's trainer and its settings."""
        from trl import GRPOConfig, GRPOTrainer

        return GRPOTrainer, GRPOConfig

    def trainer(self, model, rows, peer, common, callback):
        from datasets import Dataset

        trainer, config = self.classes()
        own = {
            "gradient_accumulation_steps": self.batch * EACH // peer.micro,
            "num_generations": EACH,
            "num_iterations": self.updates,
            "max_completion_length": self.setup.scale.max_new,
            "shuffle_dataset": False,
        }
        data = [{"prompt": [m.model_dump() for m in self.asked[row].messages], "ids": self.prompts[row]} for row in rows]
        made = trainer(
            model,
            self.rater(),
            config(**self.theirs, **common | own),
            train_dataset=Dataset.from_list(data),
            processing_class=self.setup.tokenizer,
            callbacks=[callback],
        )
        if self.given:
            rollouts = iter(self.given)
            made._generate_single_turn = lambda prompts, *_: _said(next(rollouts), prompts, self.name)
        return made

    def rater(self) -> Callable[..., list[float]]:
        """The reward model as a function of tokens, as TRL calls it: the same tokens that ours rates."""
        model = self.setup.plain(self.setup.scorer())
        pad = model.config.pad_token_id

        @torch.inference_mode()
        def reward(completion_ids: list[list[int]], ids: list[list[int]], **_: Any) -> list[float]:
            rows = [p + a for p, a in zip(ids, completion_ids, strict=True)]
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
            found = [0.0] * len(rows)
            for at in range(0, len(order), ROWS):
                chosen = order[at : at + ROWS]
                tokens, mask = left_padded([rows[i] for i in chosen], pad, self.setup.device)
                position = (mask.cumsum(-1) - 1).clamp(min=0)
                states = model.model(input_ids=tokens, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
                for i, score in zip(chosen, (states[:, -1] @ model.score.weight[0]).tolist(), strict=True):
                    found[i] = self.unit * score
            return found

        return reward

    def beside(self, peer: Peer) -> tuple[list[Timed], Any, InTurn]:
        """(our updates, our module, the peer's run) on rollouts of ours."""
        mine: list[Timed] = []
        given: list[Answered] = []
        module: Any = None
        for step in self.ours(None, batching(self, self.rollouts * self.updates)):
            if len(mine) % self.updates == 0:
                given.append(answered(Forest.from_tensors(f) for f in step.snapshot()["source"]["pending"][0]))
            mine.append(Timed(0.0, step.metrics["loss"], step.metrics["grad_norm"]))
            module = step.module
        self.given = given
        try:
            return mine, module, run_peer(self, peer, len(mine))
        finally:
            self.given = []

    def compare(self, peer: Peer) -> float:
        """The largest difference of loss and gradient norm on a rollout of ours. Raises Refused. The norm's is relative; the loss is near
        0, a mean of compared rewards: its difference is in the unit of advantages."""
        mine, _, turns = self.beside(peer)
        off = 0.0
        for a, b in zip(mine, turns.peer, strict=True):
            for what, x, y, unit in ("loss", a.loss, b.loss, 1.0), ("gradient norm", a.grad_norm, b.grad_norm, b.grad_norm):
                if what == "loss" and not self.losses:
                    continue
                gap = abs(x - y) / unit
                if not gap <= LATER:
                    raise Refused(f"{what} {x:.7g} of ours, {y:.7g} of the peer")
                off = max(off, gap)
        return off

    def flops(self) -> float:
        """Operations of a step that cannot be saved: sampling, the reference's and the reward model's forwards once, one update."""
        step = next(self.ours(None, batching(self, 1)))
        rollout = answered(Forest.from_tensors(f) for f in step.snapshot()["source"]["pending"][0])
        trees = [
            [Segment(rollout.prompts[i]), *(Segment(a, [1.0] * len(a), parent=0) for a in rollout.answers[i : i + EACH])]
            for i in range(0, len(rollout.prompts), EACH)
        ]
        update, bare = training_flops(self.model(), trees), training_flops(self.model(), trees, learned=0)
        return update + 2 * update / 3 + bare / 3


class RLOO(GRPO):
    """Its loss has the same gradient and another value: at ratio 1 TRL counts each answer's advantage once, ours at every token."""

    name = "rloo"
    switches: ClassVar[dict[str, Any]] = {"preset": "rloo"}
    theirs: ClassVar[dict[str, Any]] = {"beta": 0.03}
    unit = 1.0
    losses = False

    def classes(self) -> tuple[Any, Any]:
        from trl import RLOOConfig, RLOOTrainer

        return RLOOTrainer, RLOOConfig


def _said(rollout: Answered, prompts: list[list[int]], name: str) -> Any:
    """The rollout's answers to these prompts, as a trainer's generation returns them."""
    answers: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, answer in zip(rollout.prompts, rollout.answers, strict=True):
        answers.setdefault(tuple(prompt), []).append(answer)
    said = [answers[tuple(prompt)].pop(0) for prompt in prompts]
    return (said, None) if name == "grpo" else said
