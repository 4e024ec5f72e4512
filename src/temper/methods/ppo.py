"""PPO for RLHF: sample, score, estimate advantages with a learned value, take a few clipped steps; again. Floor 5.

Sources: arXiv:1707.06347 eq. 7 (clipping), arXiv:1506.02438 eq. 16 (GAE), arXiv:1909.08593 (KL-shaped reward, adaptive beta),
arXiv:2009.01325 (value model apart, initialised from the reward model), arXiv:2203.02155 eq. 2 (PPO-ptx), details of arXiv:2403.17031.
Choices: the log-probs that the ratio starts from are recomputed by the trainer, so that it is exactly 1 at first; the score stands
at the last token, the rewards of steps (arXiv:2312.08935) at theirs; no entropy bonus; policy and value have one optimiser and one cut
of the gradient. The rollouts (methods/rollouts.py) are the data source: what they wrote down (columns) is data to the loss.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from temper.config import Settings, UserError, idle, opt
from temper.data.template import written
from temper.data.trees import chat_chunk, limit_of, text_chunk
from temper.forest import Forest, Tree
from temper.judges.rating import REWARDS
from temper.losses.advantage import gae, kl_shaped_reward, whiten
from temper.losses.kl import adaptive_beta, horizon_rate, k3
from temper.losses.policy import clipped, clipped_surrogate, clipped_value
from temper.methods import rated, rollouts
from temper.methods.base import Batching, Job, Way, Whole, Window, list_left_out, offline, way, whole_of
from temper.methods.rated import Ending, Sampled, reward_model
from temper.methods.start import Plan, Ptx, Ready, check_start, prepared, ready
from temper.models.adapt import Adapter
from temper.models.adapters import linear
from temper.models.heads import scalar, token_logp, weighted_nll
from temper.models.load import export, load_scalar
from temper.rollout import Sampling
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term, fit

METRICS = rated.METRICS | {
    "beta": "weight of the KL in the reward",
    "clipped": "share of tokens whose gradient the clipping cuts",
    "approx_kl": "k3 estimate of the KL between the policy that sampled and the current one, per token",
    "explained": "1 - var(returns - values) / var(returns) over the rollout",
    "ptx": "negative log-likelihood per token of --ptx-data, in nats",
}
EXAMPLES = """
  temper ppo --model runs/sft --reward runs/reward --prompts prompts.jsonl --out runs/ppo
  temper ppo --model runs/sft --reward runs/reward --prompts 'world:prompts?n=2000' --out runs/ppo --beta 0.02
  temper ppo --model runs/sft --reward runs/reward --prompts prompts.jsonl --out runs/ptx --ptx-data documents.jsonl
"""


class PPO(Settings):
    """Train a policy against a reward, held near its start by a KL penalty, with a learned value that says what was to be expected.

    When: rewards that can be asked anew, and time to sample; credit within long answers matters (step rewards, GAE). Pairs and little
    compute: `temper dpo`. No memory for a value model, or several answers per prompt: `temper grpo`. Source: arXiv:1707.06347, 2403.17031.
    """

    model: str = opt(..., "the SFT model: policy and reference start from it")
    reward: str = opt(..., f"what rates an answer: {REWARDS}")
    prompts: str = opt(..., "prompts to answer: a file, or world:prompts")
    step_reward: str | None = opt(None, "process reward model: its rewards stand at the ends of an answer's steps; default: none")
    value_model: str | None = opt(None, "what the value model starts from; default: the reward model, or --model where there is none")
    plan: Plan = Plan()
    beta: float = opt(0.05, "weight of the KL in the reward", ge=0)
    kl_target: float | None = opt(None, "adapt beta towards this sequence KL, in nats; none: beta stays", gt=0)
    kl_rate: float = opt(0.1, "gain of that adaptation per rollout", gt=0)
    kl_horizon: int | None = opt(None, "instead: answers over which it adapts; the gain is answers per rollout / this", ge=1)
    clip: float = opt(0.2, "range of the ratio without clipping", gt=0)
    dual_clip: float | None = opt(None, "bound of the loss where A < 0, in |A| (3 in arXiv:1912.09729); none: no bound", gt=1)
    value_clip: float | None = opt(0.2, "range of a value's change without clipping; none: no clipping", gt=0)
    value_weight: float = opt(0.1, "coefficient of the value loss", gt=0)
    value_lr: float = opt(3.0, "the value model's learning rate, as a multiple of the policy's", gt=0)
    gamma: float = opt(1.0, "discount", gt=0, le=1)
    lam: float = opt(0.95, "GAE's lambda", ge=0, le=1)
    whiten: Literal["population", "bessel", "none"] = opt("population", "advantages by the variance over n, over n - 1, or not at all")
    whiten_rewards: bool = opt(False, "whiten the rewards per token, keeping their mean; it shortens answers")
    normalise: Literal["none", "once", "running"] = opt("none", "scores to mean 0, deviation 1: of the first rollout, or of all so far")
    tokens_per_microbatch: int = opt(8192, "tokens computed at a time; the result does not depend on it", ge=1)
    seed: int = opt(0, "of prompts and samples", ge=0)
    ending: Ending = Ending(missing_eos=-1.0)
    ptx: Ptx = Ptx()
    sampling: Sampling = Sampling()
    window: Window = Window()
    optim: Optim = Optim(lr=1e-4, schedule="linear", warmup=0.05, eps=1e-5)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()

    @pydantic.model_validator(mode="after")
    def _used(self) -> "PPO":
        if self.kl_target is None:
            idle(self, ["kl_rate", "kl_horizon"], "without --kl-target")
        elif not self.beta:
            raise ValueError("--kl-target cannot adapt --beta 0, of which every multiple is 0; give a --beta above 0 to begin with")
        if self.kl_horizon is not None:
            idle(self, ["kl_rate"], "beside --kl-horizon, which says the same otherwise")
        return self


def settings(name: str) -> type[Settings]:
    return PPO


class Rollouts(rollouts.Rollouts):
    """With values, advantages and returns; the weight of the KL and the scale of the scores are part of the state."""

    name = "ppo"

    def __init__(self, settings: PPO, module: Any, given: Ready, ptx: Sequence[Tree] = ()) -> None:
        super().__init__(settings, module, given)
        self.beta = settings.beta
        self.seen = (0.0, 0.0, 0.0)  # scores so far: how many, their mean, their summed squares about it
        batching = Batching(batch=settings.ptx.ptx_batch, seed=settings.seed, tokens_per_microbatch=settings.tokens_per_microbatch)
        self.other = offline(ptx, batching, _ptx_tokens) if ptx else lambda step: []

    def __call__(self, step: int) -> list[Forest]:
        return super().__call__(step) + self.other(step)

    def state(self) -> dict[str, Any]:
        return super().state() | {"beta": self.beta, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.beta, self.seen = state["beta"], tuple(state["seen"])

    def normalised(self, rated: list[float]) -> list[float]:
        how, (n, mean, squares) = self.settings.normalise, self.seen
        if how == "none" or not rated:
            return rated
        if how == "running" or not n:
            many, new = len(rated), sum(rated) / len(rated)
            squares += sum((x - new) ** 2 for x in rated) + (new - mean) ** 2 * n * many / (n + many)
            n, mean = n + many, mean + (new - mean) * many / (n + many)
            self.seen = n, mean, squares
        std = max((squares / n) ** 0.5, 1e-6)
        return [(x - mean) / std for x in rated]

    def measure(self, forest: Forest, at: Tensor) -> dict[str, Tensor]:
        logp = token_logp(self.module["policy"], forest, temperature=self.settings.sampling.temperature, indices=at)
        return super().measure(forest, at) | {"logp": logp, "value": scalar(self.module["value"], forest, forest.previous[at])}

    def columns(self, answers: Sequence[Sampled]) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
        s, lengths = self.settings, [len(a.logp) for a in answers]
        learned = torch.cat([torch.full((len(a.logp),), a.learned) for a in answers])
        shaped = [kl_shaped_reward(a.reward, a.logp, a.found["ref_logp"], self.beta) + a.step_reward for a in answers]
        if s.whiten_rewards and learned.any():
            flat = torch.cat(shaped)
            flat[learned] = whiten(flat[learned], keep_mean=True)
            shaped = list(flat.split(lengths))
        values = [a.found["value"] for a in answers]
        advantage = torch.cat([gae(r, v, gamma=s.gamma, lam=s.lam) for r, v in zip(shaped, values, strict=True)])
        returns = advantage + torch.cat(values)  # before whitening
        white = advantage
        if s.whiten != "none" and learned.any():
            white = torch.zeros_like(advantage)
            white[learned] = whiten(advantage[learned], unbiased=s.whiten == "bessel")
        found = {"old_value": torch.cat(values), "returns": returns, "advantage": white}
        parts = {name: x.split(lengths) for name, x in found.items()}
        explained = 1 - advantage[learned].var() / returns[learned].var().clamp(min=1e-8) if learned.sum() > 1 else 0.0
        columns = [{name: part[i] for name, part in parts.items()} for i in range(len(answers))]
        return columns, {"beta": self.beta, "explained": float(explained)}

    def _roll(self, rollout: int) -> list[list[Forest]]:
        s, pending = self.settings, super()._roll(rollout)
        if s.kl_target:
            answers = s.plan.prompts_per_step * s.plan.samples_per_prompt
            rate = horizon_rate(answers, s.kl_horizon) if s.kl_horizon else s.kl_rate
            self.beta = adaptive_beta(self.beta, self.last["kl"], s.kl_target, rate)
        return pending


def _ptx_tokens(trees: Sequence[Tree]) -> dict[str, float]:
    return {"ptx": float(sum(sum(segment.target or ()) for tree in trees for segment in tree))}


def make_loss(s: PPO) -> Callable[[Any, Forest], Loss]:
    def loss(module: Any, batch: Forest) -> Loss:
        if "advantage" not in batch.columns:
            return Loss({"ptx": Term(weighted_nll(module["policy"], batch)[0], per="ptx", coefficient=s.ptx.ptx_weight)}, {})
        at = batch.learned
        old, advantage, old_value, returns = (batch.columns[c][at] for c in ("old_logp", "advantage", "old_value", "returns"))
        logp = token_logp(module["policy"], batch, temperature=s.sampling.temperature)
        n = len(at)
        clip: dict[str, Any] = {"low": s.clip, "high": s.clip, "dual": s.dual_clip}
        policy = clipped_surrogate(logp, old, advantage, **clip)

        def error() -> Tensor:  # after the policy's backward pass: the activations of one model at a time
            value = scalar(module["value"], batch, batch.previous[at])
            return clipped_value(value, old_value, returns, clip=inf if s.value_clip is None else s.value_clip).sum()

        return Loss(
            {"policy": Term(policy.sum(), per="tokens"), "value": Term(error, per="tokens", coefficient=s.value_weight)},
            {
                "clipped": (clipped(logp.detach(), old, advantage, **clip).sum(), n),
                "approx_kl": (k3(old, logp.detach()).sum(), n),
            },
        )

    return loss


def train(settings: PPO, module: nn.ModuleDict, source: Callable[[int], list[Forest]], resume: State | None = None) -> Iterator[Step]:
    s = settings
    return fit(
        module,
        source,
        make_loss(s),
        steps=s.plan.steps,
        optim=s.optim,
        seed=s.seed,
        resume=resume,
        check=check_start(s.sampling.temperature),
        multipliers={"value": s.value_lr},
        compute=s.compute,
    )


def ptx(s: PPO, run: Run, given: Ready) -> Whole:
    """What is learned beside."""
    how = way(chat_chunk, given.tokenizer, given.policy, s.window, learn="all")
    if s.ptx.ptx_as == "text":
        window = limit_of(given.policy, s.window.max_length)[0] or 1024
        make = partial(text_chunk, tokenizer=given.tokenizer, window=window)
        how = Way(make, [written(given.tokenizer), window], None, s.window.skip_bad)
    return whole_of(str(s.ptx.ptx_data), s.ptx.ptx_as, how, run)


def prepare(settings: PPO, run: Run) -> Job:
    s = settings
    if s.ptx.ptx_data and s.compute.shard == "full":
        raise UserError("--ptx-data with --shard full: its batches have no values, and ranks would wait for each other; leave one out")
    given = ready(s, "PPO", run)
    weight, own = reward_model(given.reward) or (1.0, None)
    start = s.value_model or (own.name if own else s.model)
    value, _ = load_scalar(start, **s.compute.placed, adapters=s.adapters, seed=s.seed, beside=given.policy)
    scale = getattr(value.config, "temper_reward", None) or {"mean": 0.0, "std": 1.0}
    with torch.no_grad():  # values live on the scale of the rewards
        head, _ = linear(value.score)
        bias = torch.zeros(1, device=head.weight.device) if head.bias is None else head.bias
        head.weight *= weight / float(scale["std"])
        head.bias = nn.Parameter((bias - float(scale["mean"])) * weight / float(scale["std"]))
    card = dict(given.card)
    trees: Sequence[Tree] = []
    if s.ptx.ptx_data:
        trees, _, said, left = ptx(s, run, given)
        card |= {"ptx": "; ".join(said.values()), "left_out": list_left_out(run, [*given.prompts.left, *left])}
    module = nn.ModuleDict({"policy": given.policy, "value": value})
    source = Rollouts(s, module, given, trees)
    return Job(
        total=s.plan.steps,
        steps=lambda resume: train(s, module, source, resume),
        save=lambda path: export(given.policy, given.tokenizer, path, stop=given.stop),
        card=card,
        policy=(given.policy, given.tokenizer),
        asks=[r.messages for r in given.prompts.records[:4]],
        prepared=prepared(s, given, module, make_loss(s), ("old_logp", "advantage", "old_value", "returns")),
    )
