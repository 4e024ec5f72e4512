"""A PPO step against the same step as one would write it on transformers: `generate`, then padded forwards of policy, reference,
value and reward, then padded updates. The peer is here, whole and plain; `compare` gives it our rollout and compares every update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.data import SEED, Setup, training_flops
from bench.machine import Refused, Timed
from bench.rollout import EACH, Generate, generate, left_padded
from bench.training import LATER
from temper.forest import Forest, Segment
from temper.methods import ppo
from temper.methods.start import Plan
from temper.records import write_jsonl
from temper.rollout import Sampling
from temper.runs import Run
from temper.train import Optim, Step

OPTIM = Optim(lr=1e-5, schedule="constant", warmup=0.0, eps=1e-5)
EPOCHS = 2


@dataclass(frozen=True)
class Padded:
    """Settings of the peer: how it samples, and rows of like length computed at a time."""

    generate: Generate
    rows: int

    def __str__(self) -> str:
        return f"{self.generate}; padded forwards of {self.rows} rows, sorted by length"


class Answered(NamedTuple):
    """Prompts with one answer each, and whether it ended."""

    prompts: list[list[int]]
    answers: list[list[int]]
    ended: list[bool]


class Part(NamedTuple):
    """Rows at the right edge, so that all answers end in the last column; A is the longest answer. Values [R, A]."""

    ids: Tensor
    mask: Tensor
    position: Tensor
    own: Tensor  # bool: where an answer's tokens stand
    data: dict[str, Tensor]


class PPO:
    name = "ppo"
    named: ClassVar[dict[str, Any]] = {}

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        half = max(1, setup.scale.prompts // 2)
        self.prompts, self.asked = setup.prompts[:half], setup.asked[:half]
        self.candidates = [Padded(Generate("static", max(1, half // 2)), rows) for rows in (4, 8, 16)]
        self.default = Padded(Generate("dynamic"), 8)

    def ours(self, steps: int) -> Iterator[Step]:
        """A Step for each update, EPOCHS of them to a PPO step."""
        if self.setup.device != "cpu":
            raise Refused("methods/ppo.py computes on the CPU")
        write_jsonl(self.setup.folder / "prompts.jsonl", self.asked)
        return ppo.prepare(self.settings(steps), Run(self.setup.folder / "run")).steps(None)

    def settings(self, steps: int) -> ppo.PPO:
        return ppo.PPO(
            model=str(self.setup.folder / "policy"),
            reward=str(self.setup.folder / "reward"),
            prompts=str(self.setup.folder / "prompts.jsonl"),
            plan=Plan(rollouts=steps, prompts_per_step=len(self.prompts), samples_per_prompt=EACH, epochs_per_batch=EPOCHS),
            sampling=Sampling(max_new=self.setup.scale.max_new),
            window=self.setup.window,
            seed=SEED,
            optim=OPTIM,
        )

    def side(self, who: str, how: Padded) -> Callable[[], object]:
        """A PPO step of one side; each call is the next one."""
        if who == "peer":
            return Peer(self, how).step
        steps = self.ours(1000)
        return lambda: [next(steps) for _ in range(EPOCHS)]

    def compare(self, how: Padded) -> float:
        """The largest difference of loss and gradient norm over one PPO step on our rollout. Raises Refused.

        The norm's is relative. The loss is near 0, a mean of whitened advantages: its difference is in their unit, a deviation.
        """
        peer, off = Peer(self, how), 0.0
        rollout: Answered | None = None
        mine: list[Timed] = []
        for step in self.ours(1):
            if rollout is None:
                rollout = answered(Forest.from_tensors(f) for f in step.snapshot()["source"]["pending"][0])
            mine.append(Timed(0.0, step.metrics["loss"], step.metrics["grad_norm"]))
        assert rollout is not None
        for a, b in zip(mine, peer.learn(peer.annotate(rollout)), strict=True):
            for what, x, y, unit in ("loss", a.loss, b.loss, 1.0), ("gradient norm", a.grad_norm, b.grad_norm, b.grad_norm):
                gap = abs(x - y) / unit
                if not gap <= LATER:
                    raise Refused(f"{what} {x:.7g} of ours, {y:.7g} of the peer")
                off = max(off, gap)
        return off

    def flops(self) -> float:
        """Operations of a step that cannot be saved: sampling, the four models' forwards once, EPOCHS updates of two models."""
        peer = Peer(self, self.candidates[0])
        rollout, model = peer.roll(), self.setup.policy()
        trees = [
            [Segment(rollout.prompts[i]), *(Segment(a, [1.0] * len(a), parent=0) for a in rollout.answers[i : i + EACH])]
            for i in range(0, len(rollout.prompts), EACH)
        ]
        with_head, without = training_flops(model, trees) / 3, training_flops(model, trees, learned=0) / 3
        return with_head + 2 * (with_head + without) + EPOCHS * 3 * (with_head + without)


def answered(forests: Any) -> Answered:
    """Our rollout as plain lists."""
    out = Answered([], [], [])
    for forest in forests:
        pieces = forest.tokens.split(forest.length.tolist())
        for s, parent in enumerate(forest.parent.tolist()):
            if parent >= 0:
                out.prompts.append(pieces[parent].tolist())
                out.answers.append(pieces[s].tolist())
                out.ended.append(bool(forest.columns["ended"][s] > 0))
    return out


class Peer:
    """PPO on padded rows (arXiv:2403.17031), with the settings of ours."""

    def __init__(self, task: PPO, how: Padded) -> None:
        self.task, self.how, self.settings = task, how, task.settings(1)
        setup = task.setup
        self.policy, self.reference = setup.plain(setup.policy()), setup.plain(setup.policy())
        self.value, self.reward = setup.plain(setup.scorer()), setup.plain(setup.scorer())
        self.value.score.bias = nn.Parameter(torch.zeros(1, device=setup.device))
        groups = [{"params": m.parameters(), "lr": OPTIM.lr * f} for m, f in ((self.policy, 1.0), (self.value, self.settings.value_lr))]
        self.optimizer = torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, weight_decay=0.0, fused=True)
        self.turn = 0

    def step(self) -> Answered:
        """One PPO step; the rollout."""
        rollout = self.roll()
        for _ in self.learn(self.annotate(rollout)):
            pass
        return rollout

    def roll(self) -> Answered:
        setup, self.turn = self.task.setup, self.turn + 1
        torch.manual_seed(self.turn)
        length = setup.scale.max_new
        answers = generate(self.policy, self.task.prompts, self.how.generate, each=EACH, stop=setup.stop, max_new=length, greedy=False)
        prompts = [prompt for prompt in self.task.prompts for _ in range(EACH)]
        return Answered(prompts, answers, [answer[-1] in setup.stop for answer in answers])

    @torch.no_grad()
    def annotate(self, rollout: Answered) -> list[Part]:
        """Micro-batches with old log-probs, values, whitened advantages and returns."""
        s, parts = self.settings, []
        order = sorted(range(len(rollout.answers)), key=lambda i: len(rollout.prompts[i]) + len(rollout.answers[i]))
        for at in range(0, len(order), self.how.rows):
            chosen = order[at : at + self.how.rows]
            part = self._part([rollout.prompts[i] for i in chosen], [rollout.answers[i] for i in chosen])
            logp, ref = self._logp(self.policy, part), self._logp(self.reference, part)
            value = self._value(part)
            score = self._states(self.reward, part)[:, -1] @ self.reward.score.weight[0]
            ended = torch.tensor([rollout.ended[i] for i in chosen], device=score.device)
            score = torch.where(ended, score, score.clamp(max=s.ending.missing_eos))
            shaped = -s.beta * (logp - ref) * part.own
            shaped[:, -1] += score
            advantage, running, after = torch.zeros_like(value), torch.zeros_like(score), torch.zeros_like(score)
            for t in range(value.shape[1] - 1, -1, -1):
                running = shaped[:, t] + s.gamma * after - value[:, t] + s.gamma * s.lam * running
                advantage[:, t], after = running, value[:, t]
            part.data.update(logp=logp, value=value, advantage=advantage, returns=advantage + value)
            parts.append(part)
        every = torch.cat([part.data["advantage"][part.own] for part in parts])
        for part in parts:
            part.data["advantage"] = (part.data["advantage"] - every.mean()) * (every.var(unbiased=False) + 1e-8).rsqrt()
        return parts

    def learn(self, parts: list[Part]) -> Iterator[Timed]:
        """EPOCHS updates; the loss and the gradient norm of each."""
        s, tokens = self.settings, sum(int(part.own.sum()) for part in parts)
        for _ in range(EPOCHS):
            total = 0.0
            for part in parts:
                old, own = part.data, part.own
                rho, advantage = (self._logp(self.policy, part) - old["logp"]).exp(), old["advantage"]
                policy = torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - s.clip, 1 + s.clip))[own].sum()
                value = self._value(part)
                clip = float(s.value_clip or 0)
                near = value.clamp(old["value"] - clip, old["value"] + clip)
                off = torch.maximum((value - old["returns"]) ** 2, (near - old["returns"]) ** 2)[own].sum() / 2
                loss = (policy + s.value_weight * off) / tokens
                loss.backward()
                total += float(loss.detach())
            trainable = [*self.policy.parameters(), *self.value.parameters()]
            norm = nn.utils.clip_grad_norm_(trainable, OPTIM.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield Timed(0.0, total, float(norm))

    def _part(self, prompts: list[list[int]], answers: list[list[int]]) -> Part:
        device = self.task.setup.device
        ids, mask = left_padded([p + a for p, a in zip(prompts, answers, strict=True)], self.policy.config.pad_token_id, device)
        lengths = torch.tensor([len(a) for a in answers], device=device)
        longest = int(lengths.max())
        own = torch.arange(longest, device=device) >= longest - lengths[:, None]
        return Part(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), own, {})

    def _logp(self, model: Any, part: Part) -> Tensor:
        """[R, A] log-probs of the answers' tokens; logits only where an answer is predicted."""
        a = part.own.shape[1]
        out = model(input_ids=part.ids, attention_mask=part.mask, position_ids=part.position, logits_to_keep=a + 1, use_cache=False)
        logits = out.logits[:, :-1].float()
        return -F.cross_entropy(logits.flatten(0, 1), part.ids[:, -a:].flatten(), reduction="none").view(-1, a)

    def _states(self, model: Any, part: Part) -> Tensor:
        return model.model(input_ids=part.ids, attention_mask=part.mask, position_ids=part.position, use_cache=False).last_hidden_state

    def _value(self, part: Part) -> Tensor:
        """[R, A] values, each read at the token that predicts its own."""
        return self.value.score(self._states(self.value, part)[:, -part.own.shape[1] - 1 : -1])[..., 0]
