"""PPO for RLHF: sample, score, estimate advantages with a learned value, take a few clipped steps; again. Floor 5.

Sources: arXiv:1707.06347 eq. 7 (clipping), arXiv:1506.02438 eq. 16 (GAE), arXiv:1909.08593 (KL-shaped reward, adaptive beta),
arXiv:2009.01325 (value model apart, initialised from the reward model), details of arXiv:2403.17031.
Choices: the log-probs that the ratio starts from are recomputed by the trainer, so that it is exactly 1 at first; the score stands
at the last token; an answer that did not end scores at most `missing_eos`; advantages are whitened over the learned tokens of the rollout;
rewards are not whitened (it shortens answers, arXiv:2403.17031).
The rollouts are the data source: what they wrote down (columns) is data to the loss.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from temper.config import Settings, UserError, opt
from temper.data.packing import batch_indices, pack
from temper.data.sources import read
from temper.data.template import stop_ids
from temper.data.trees import prompt_ids
from temper.forest import Forest, Segment, Tree, plant
from temper.judges.reward_model import RewardModel
from temper.losses.advantage import gae, kl_shaped_reward, whiten
from temper.losses.kl import adaptive_beta, k1, k3
from temper.losses.policy import clipped, clipped_surrogate, clipped_value
from temper.methods.base import Job, Window
from temper.models.adapt import Adapter
from temper.models.adapters import adapted, linear, shifts
from temper.models.heads import scalar, slack, token_logp
from temper.models.load import export, load_policy, load_scalar
from temper.models.shared import four, without
from temper.rollout import Request, Sampling, generator, sample
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term, TrainingError, fit, ranks

CUT = 0.5  # share of answers cut off at --max-new from which on it is announced
HOPELESS = 200  # answers in a row of which none ended: fewer than 1.5% would, at 95% (3 / n)
ERRORS = 4  # standard errors that a mean KL may lie below 0
METRICS = {
    "reward": "mean score of the answers by the reward model, 0 and 1 being the mean and deviation of its training answers",
    "kl": "mean over answers of the summed log-ratio of policy over reference (k1), in nats",
    "kl_error": "standard error of kl",
    "beta": "weight of the KL in the reward",
    "entropy": "mean of -log p over the sampled tokens, in nats",
    "length": "mean tokens of an answer",
    "truncated": "share of answers that reached --max-new without ending",
    "sampler_gap": "mean absolute difference between the sampler's and the trainer's log-probs",
    "clipped": "share of tokens whose gradient the clipping cuts",
    "approx_kl": "k3 estimate of the KL between the policy that sampled and the current one, per token",
    "explained": "1 - var(returns - values) / var(returns) over the rollout",
}
EXAMPLES = """
  temper ppo --model runs/sft --reward runs/reward --prompts prompts.jsonl --out runs/ppo
  temper ppo --model runs/sft --reward runs/reward --prompts 'world:prompts?n=2000' --out runs/ppo --beta 0.02
"""


class PPO(Settings):
    """Train a policy against a reward model, held near its start by a KL penalty."""

    model: str = opt(..., "the SFT model: policy and reference start from it")
    reward: str = opt(..., "the reward model; the value model starts from it too")
    prompts: str = opt(..., "prompts to answer: a file, or world:prompts")
    rollouts: int = opt(60, "times to sample", ge=1)
    prompts_per_step: int = opt(64, "prompts per rollout", ge=1)
    samples_per_prompt: int = opt(1, "answers to each", ge=1)
    epochs_per_batch: int = opt(2, "passes over a rollout", ge=1)
    minibatches: int = opt(1, "optimiser steps per pass", ge=1)
    beta: float = opt(0.05, "weight of the KL in the reward", ge=0)
    kl_target: float | None = opt(None, "adapt beta towards this sequence KL, in nats; none: beta stays", gt=0)
    clip: float = opt(0.2, "range of the ratio without clipping", gt=0)
    value_clip: float = opt(0.2, "range of a value's change without clipping", gt=0)
    value_weight: float = opt(0.1, "coefficient of the value loss", gt=0)
    value_lr: float = opt(3.0, "the value model's learning rate, as a multiple of the policy's", gt=0)
    gamma: float = opt(1.0, "discount", gt=0, le=1)
    lam: float = opt(0.95, "GAE's lambda", ge=0, le=1)
    missing_eos: float | None = opt(-1.0, "most that an answer can score that did not end; none: its own score")
    tokens_per_microbatch: int = opt(8192, "tokens computed at a time; the result does not depend on it", ge=1)
    seed: int = opt(0, "of prompts and samples", ge=0)
    sampling: Sampling = Sampling()
    window: Window = Window()
    optim: Optim = Optim(lr=1e-4, schedule="linear", warmup=0.05, eps=1e-5)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


def settings(name: str) -> type[Settings]:
    return PPO


class Rollouts:
    """The source: step -> micro-batches. Samples anew whenever the last rollout is used up; that one is part of the state."""

    def __init__(self, settings: PPO, module: Any, reference: Any, reward: RewardModel, prompts: Sequence[list[int]], stop: Sequence[int]):
        self.settings, self.module, self.reference, self.reward, self.prompts, self.stop = (
            settings,
            module,
            reference,
            reward,
            prompts,
            stop,
        )
        self.beta = settings.beta
        self.pending: list[list[Forest]] = []  # one list of micro-batches per minibatch
        self.last: dict[str, float] = {}
        self.endless = 0  # answers since the last rollout in which one ended
        self.said: list[str] = []  # what was announced
        self.new: list[dict[str, Any]] = []  # what is to be, with the next step

    def __call__(self, step: int) -> list[Forest]:
        s = self.settings
        rollout, inner = divmod(step, s.minibatches * s.epochs_per_batch)
        if inner == 0:
            self.pending = self._roll(rollout)
        epoch, k = divmod(inner, s.minibatches)
        order = generator("ppo order", s.seed, rollout, epoch).permutation(s.minibatches)
        minibatch = self.pending[order[k]]
        return [minibatch[i] for i in ranks.share([forest.T for forest in minibatch])]

    def reads(self, step: int) -> bool:
        """Whether it samples before this step."""
        return step % (self.settings.minibatches * self.settings.epochs_per_batch) == 0

    def metrics(self, step: int) -> dict[str, float]:
        """Of the rollout that the last step learned from."""
        return self.last

    def events(self, step: int) -> list[dict[str, Any]]:
        """What the last rollout was the first to show."""
        new, self.new = self.new, []
        return new

    def state(self) -> dict[str, Any]:
        own = {"beta": self.beta, "last": self.last, "endless": self.endless, "said": list(self.said)}
        return own | {"pending": [[f.tensors() for f in minibatch] for minibatch in self.pending]}

    def restore(self, state: dict[str, Any]) -> None:
        self.beta, self.last, self.endless, self.said = state["beta"], state["last"], state["endless"], list(state["said"])
        self.pending = [[Forest.from_tensors(f) for f in minibatch] for minibatch in state["pending"]]

    def _roll(self, rollout: int) -> list[list[Forest]]:
        s = self.settings
        chosen = [self.prompts[i] for i in batch_indices(len(self.prompts), s.prompts_per_step, s.seed, rollout)]
        mine = ranks.share([len(prompt) for prompt in chosen])
        sampled = sample(
            self.module["policy"],
            Request(
                [chosen[i] for i in mine],
                sampling=s.sampling,
                stop=self.stop,
                n=s.samples_per_prompt,
                seed=("ppo", s.seed, rollout),
                index=mine,
            ),
        )
        trees = [_tree(prompt, answers) for prompt, answers in zip(chosen, ranks.whole(mine, sampled), strict=True)]
        borders = [len(trees) * k // s.minibatches for k in range(s.minibatches + 1)]
        pending = [_plant(trees[a:b], s.tokens_per_microbatch) for a, b in pairwise(borders)]
        self._annotate([f for minibatch in pending for f in minibatch])
        self._guard(len(trees) * s.samples_per_prompt)
        if s.kl_target:
            self.beta = adaptive_beta(self.beta, self.last["kl"], s.kl_target)
        return pending

    def _guard(self, answers: int) -> None:
        """Announces what makes a rollout worth little; stops where so many answers in a row were cut off that none will ever end."""
        s, m = self.settings, self.last
        self.endless = self.endless + answers if m["truncated"] == 1 else 0
        advice = f"raise --max-new (now {s.sampling.max_new}), or look whether the model learned its end token in --model {s.model}"
        if s.missing_eos is not None and self.endless >= HOPELESS:
            raise TrainingError(f"none of {self.endless} answers in a row ended: there is nothing to learn from their scores; {advice}")
        if m["truncated"] > CUT:
            self._announce("answers cut off", f"{m['truncated']:.0%} of the answers did not end within --max-new; {advice}")
        if m["kl"] < -ERRORS * m["kl_error"] - slack(self.reference, 1e-3, 0.5):
            found = f"the KL to the reference is estimated at {m['kl']:.3g} +- {m['kl_error']:.2g} nats, below 0"
            self._announce(
                "negative KL",
                f"{found}: the answers are not drawn from the policy that is trained; look at sampler_gap, and at what samples",
            )

    def _announce(self, event: str, note: str) -> None:
        if event not in self.said:
            self.said.append(event)
            self.new.append({"event": event, "note": note})

    def _annotate(self, forests: Sequence[Forest]) -> None:
        """Write old log-probs, values, whitened advantages and returns into the forests' columns; keep the rollout's metrics."""
        mine = ranks.share([forest.T for forest in forests])
        scored = ranks.whole(mine, [self._score(forests[i]) for i in mine])
        white = whiten(torch.cat([one.advantage for one in scored])).split([len(one.advantage) for one in scored])
        for forest, one, advantage in zip(forests, scored, white, strict=True):
            columns = {
                "old_logp": one.logp,
                "ref_logp": one.ref_logp,
                "old_value": one.value,
                "returns": one.advantage + one.value,
                "advantage": advantage,
            }
            for name, x in columns.items():
                forest.columns[name] = torch.zeros(forest.T).index_put((forest.learned,), x.float())
        self.last = _summary(forests, scored, self.beta)

    @torch.no_grad()
    def _score(self, forest: Forest) -> "Scored":
        s, forest = self.settings, forest.to(self.reference.device)
        logp = token_logp(self.module["policy"], forest, temperature=s.sampling.temperature)
        ref = token_logp(self.reference, forest, temperature=s.sampling.temperature)
        value = scalar(self.module["value"], forest, forest.previous[forest.learned])
        answer = (forest.columns["ended"] >= 0).nonzero()[:, 0]
        score = self.reward.score(forest, forest.end[answer] - 1)
        if s.missing_eos is not None:
            score = torch.where(forest.columns["ended"][answer] > 0, score, score.clamp(max=s.missing_eos))
        lengths = (forest.end - forest.start)[answer].tolist()
        answers, advantages = [], []
        for one, old, r, v in zip(score.tolist(), logp.split(lengths), ref.split(lengths), value.split(lengths), strict=True):
            advantages.append(gae(kl_shaped_reward(one, old, r, self.beta), v, gamma=s.gamma, lam=s.lam))
            answers.append((one, float(k1(old, r).sum()), len(old)))
        return Scored(logp.cpu(), ref.cpu(), value.cpu(), torch.cat(advantages).cpu(), answers)


class Scored(NamedTuple):
    """What is known of one forest's answers before learning from them; tensors over its learned tokens."""

    logp: Tensor
    ref_logp: Tensor
    value: Tensor
    advantage: Tensor
    answers: list[tuple[float, float, int]]  # score, summed k1, tokens


def _plant(trees: Sequence[Tree], microbatch: int) -> list[Forest]:
    """Micro-batches, at least one for each rank where there are trees enough."""
    sizes = [sum(len(segment.tokens) for segment in tree) for tree in trees]
    groups = [[part[i] for i in g] for part in ranks.shares(sizes) for g in pack([sizes[i] for i in part], microbatch)]
    return [plant([trees[i] for i in group]) for group in groups]


def _tree(prompt: list[int], answers) -> Tree:
    children = [
        Segment(a.tokens, [1.0] * len(a.tokens), parent=0, columns={"sampler_logp": a.logp}, labels={"ended": float(a.finish == "stop")})
        for a in answers
    ]
    return [Segment(prompt, [0.0] * len(prompt), columns={"sampler_logp": [0.0] * len(prompt)}, labels={"ended": -1.0}), *children]


def _summary(forests: Sequence[Forest], scored: Sequence[Scored], beta: float) -> dict[str, float]:
    score, kl, length = (torch.tensor(x, dtype=torch.double) for x in zip(*(a for one in scored for a in one.answers), strict=True))
    advantage = torch.cat([one.advantage for one in scored])
    returns = torch.cat([one.advantage + one.value for one in scored])
    old = torch.cat([f.columns["old_logp"][f.learned] for f in forests])
    sampler = torch.cat([f.columns["sampler_logp"][f.learned] for f in forests])
    ended = torch.cat([f.columns["ended"][f.columns["ended"] >= 0] for f in forests])
    return {
        "reward": float(score.mean()),
        "kl": float(kl.mean()),
        "kl_error": float(kl.std() / len(kl) ** 0.5),
        "beta": beta,
        "entropy": float(-old.mean()),
        "length": float(length.mean()),
        "truncated": float(1 - ended.mean()),
        "sampler_gap": float((old - sampler).abs().mean()),
        "explained": float(1 - advantage.var() / returns.var().clamp(min=1e-8)),
    }


def make_loss(s: PPO) -> Callable[[Any, Forest], Loss]:
    def loss(module: Any, batch: Forest) -> Loss:
        at = batch.learned
        old, advantage, old_value, returns = (batch.columns[c][at] for c in ("old_logp", "advantage", "old_value", "returns"))
        logp = token_logp(module["policy"], batch, temperature=s.sampling.temperature)
        n = len(at)

        def value() -> Tensor:  # after the policy's backward pass: the activations of one model at a time
            found = scalar(module["value"], batch, batch.previous[at])
            return clipped_value(found, old_value, returns, clip=s.value_clip).sum()

        return Loss(
            {
                "policy": Term(clipped_surrogate(logp, old, advantage, low=s.clip, high=s.clip).sum(), per="tokens"),
                "value": Term(value, per="tokens", coefficient=s.value_weight),
            },
            {
                "clipped": (clipped(logp.detach(), old, advantage, low=s.clip, high=s.clip).sum(), n),
                "approx_kl": (k3(old, logp.detach()).sum(), n),
            },
        )

    return loss


def check_start(s: PPO):
    """At step 0 the ratio is 1 and the KL to the reference 0. (But for a new soft prompt, which is something.)"""

    def check(module: Any, batches: Sequence[Forest]) -> None:
        with torch.no_grad():
            for batch in batches:
                logp = token_logp(module["policy"], batch, temperature=s.sampling.temperature)
                for name, what in ("old_logp", "ratio is not 1"), ("ref_logp", "policy is not the reference"):
                    gap = float((logp - batch.columns[name][batch.learned]).abs().max())
                    if not (name == "ref_logp" and shifts(module["policy"])) and gap > slack(module["policy"], 1e-4, 0.2):
                        raise AssertionError(f"the {what}: log-probs differ by up to {gap:.2g} nats")

    return check


def train(settings: PPO, module: nn.ModuleDict, source: Rollouts, resume: State | None = None) -> Iterator[Step]:
    s = settings
    return fit(
        module,
        source,
        make_loss(s),
        steps=s.rollouts * s.epochs_per_batch * s.minibatches,
        optim=s.optim,
        seed=s.seed,
        resume=resume,
        check=check_start(s),
        multipliers={"value": s.value_lr},
        compute=s.compute,
    )


def prepare(settings: PPO, run: Run) -> Job:
    s = settings
    if not s.sampling.temperature:
        raise UserError("--temperature 0: PPO must sample; give a temperature above 0")
    if not s.sampling.plain:
        what = s.sampling.truncates or f"repetition_penalty {s.sampling.repetition_penalty:g}"
        raise UserError(f"{what}: PPO learns from the policy's own distribution, which this changes; leave it out")
    if s.minibatches > s.prompts_per_step:
        raise UserError(f"--minibatches {s.minibatches} > --prompts-per-step {s.prompts_per_step}: each needs at least one prompt")
    placed = s.compute.placed
    if shared := four(s.model, s.reward, s.adapters, seed=s.seed, **placed):
        policy, reference, value, _, tokenizer, *_ = shared
        reward = RewardModel(s.reward, loaded=(shared.reward, shared.reward_tokenizer, shared.scale))
    else:
        policy, tokenizer = load_policy(s.model, **placed, adapters=s.adapters, seed=s.seed)
        reference = without(policy) if adapted(policy) else load_policy(s.model, **placed)[0]
        value, _ = load_scalar(s.reward, **placed, adapters=s.adapters, seed=s.seed)
        reward = RewardModel(s.reward, **placed)
    if reward.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{s.reward}: its tokenizer is not that of {s.model}; train the reward model on this model's tokenizer")
    with torch.no_grad():
        head, _ = linear(value.score)
        head.weight /= reward.std
        bias = torch.full((1,), -reward.mean / reward.std, device=head.weight.device)
        head.bias = nn.Parameter(bias)  # values live on the scale of the normalised scores
    records, report = read(s.prompts, "prompts", skip_bad=s.window.skip_bad)
    prompts, cut = prompt_ids(tokenizer, records, policy, s.window, room=s.sampling.max_new)
    module = nn.ModuleDict({"policy": policy, "value": value})
    source = Rollouts(s, module, reference, reward, prompts, stop_ids(tokenizer))
    return Job(
        total=s.rollouts * s.epochs_per_batch * s.minibatches,
        steps=lambda resume: train(s, module, source, resume),
        save=lambda path: export(policy, tokenizer, path, stop=stop_ids(tokenizer)),
        card={"source": report.summary(), "prompts": len(prompts), "kept": cut.summary()},
        policy=(policy, tokenizer),
        asks=[r.messages for r in records[:4]],
    )
