"""GRPO and its relatives: several answers to a prompt, each compared with the others instead of with a learned value. Floor 5.

One method with switches; `--preset` names the published settings of them (methods/switches.py). Source: arXiv:2402.03300.
Choices: the standard deviation is over n, and a group whose rewards differ by less than 1e-4 gets advantage 0; a KL in the loss of a policy
that has moved on from the sampler is weighted by the ratio; where a rollout is used for one update the ratio is exactly 1, so the policy's
log-probs are not computed beforehand and the head's gradient is taken in the forward, as in SFT.
Aggregation is in the data: a token's target is 1, 1 / (tokens of its answer) or 1 / constant, and the loop divides by tokens or answers.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from temper.config import Settings, idle, opt
from temper.forest import Forest
from temper.judges.rating import REWARDS
from temper.losses.advantage import baseline, group_std, standardised, to_go, whiten
from temper.losses.kl import k2, k3, slope
from temper.losses.policy import clipped, clipped_surrogate, ratio, sequence_logp
from temper.methods import rated, rollouts
from temper.methods.base import Job, Window
from temper.methods.rated import EQUAL, Ending, Sampled
from temper.methods.start import Plan, Ready, check_start, prepared, ready
from temper.methods.switches import Switches, resolved
from temper.models.adapt import Adapter
from temper.models.heads import token_logp, weighted_nll
from temper.models.load import export
from temper.rollout import Sampling
from temper.runs import Run
from temper.train import Compute, Loss, Optim, State, Step, Term, fit

METRICS = rated.METRICS | {
    "advantage": "mean absolute advantage of the learned tokens",
    "asked": "prompts sampled for each that is learned from (--dynamic)",
    "clipped": "share of tokens whose gradient the clipping cuts",
    "approx_kl": "k3 estimate of the KL between the policy that sampled and the current one, per token",
    "kl_loss": "the KL's estimator in the loss, aggregated as the loss is",
}
EXAMPLES = """
  temper grpo --model runs/sft --reward runs/reward --prompts prompts.jsonl --out runs/grpo
  temper grpo --model runs/sft --reward maths --prompts gsm8k.jsonl --out runs/grpo --adapter lora --max-new 256
  temper grpo --preset rloo --model runs/sft --reward runs/reward --prompts 'world:prompts?n=2000' --out runs/rloo --beta 0.05
  temper grpo --preset dapo --model runs/sft --reward runs/reward --prompts prompts.jsonl --out runs/dapo --samples-per-prompt 16
"""
ESTIMATORS = {"k2-in-loss": k2, "k3-in-loss": k3}


class GRPO(Settings):
    """Train a policy against a reward by comparing several answers to each prompt; presets: GRPO, Dr. GRPO, DAPO, RLOO, REINFORCE++, GSPO.

    When: rewards that can be asked anew (checks by program above all), no memory or patience for a value model. When not: rewards within
    an answer that must be told apart by a learned value (`temper ppo`); pairs alone (`temper dpo`). Source: arXiv:2402.03300.
    """

    model: str = opt(..., "the SFT model: policy and reference start from it")
    reward: str = opt(..., f"what rates an answer: {REWARDS}")
    prompts: str = opt(..., "prompts to answer: a file, or world:prompts")
    step_reward: str | None = opt(None, "process reward model: a token gets the compared rewards of the steps that end from it on")
    outcome_weight: float = opt(1.0, "weight of --reward beside --step-reward; 0 is process GRPO as published", ge=0)
    switches: Switches = Switches()
    plan: Plan = Plan(prompts_per_step=16, samples_per_prompt=8, epochs_per_batch=1)
    tokens_per_microbatch: int = opt(8192, "tokens computed at a time; the result does not depend on it", ge=1)
    seed: int = opt(0, "of prompts and samples", ge=0)
    ending: Ending = Ending()
    sampling: Sampling = Sampling()
    window: Window = Window()
    optim: Optim = Optim(lr=1e-4, schedule="linear", warmup=0.05, eps=1e-5)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()

    @pydantic.model_validator(mode="after")
    def _used(self) -> "GRPO":
        if self.step_reward is None:
            idle(self, ["outcome_weight"], "without --step-reward")
        return self

    @property
    def on_policy(self) -> bool:
        """Whether each rollout is used for one update and was sampled here, so that the ratio is 1."""
        return self.plan.updates == 1 and not self.plan.vllm


def settings(name: str) -> type[Settings]:
    return GRPO


class Rollouts(rollouts.Rollouts):
    """With advantages that compare the answers to a prompt. settings: resolved."""

    name = "grpo"

    def __init__(self, settings: GRPO, module: Any, given: Ready) -> None:
        super().__init__(settings, module, given)
        switches: Any = settings.switches
        self.dynamic = switches.dynamic

    def target(self, length: int) -> float:
        switches: Any = self.settings.switches
        return {"token": 1.0, "sequence": 1.0 / length, "constant": 1.0 / switches.constant}[switches.aggregation]

    def measure(self, forest: Forest, at: Tensor) -> dict[str, Tensor]:
        found = super().measure(forest, at)
        if self.settings.on_policy:
            return found
        return found | {"logp": token_logp(self.module["policy"], forest, temperature=self.settings.sampling.temperature, indices=at)}

    def columns(self, answers: Sequence[Sampled]) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
        learned = [a for a in answers if a.learned]
        for a, advantage in zip(learned, advantages(learned, self.settings), strict=True):
            a.found["advantage"] = advantage
        size = torch.cat([a.found["advantage"] for a in learned]).abs().mean() if learned else 0.0
        columns = [{"advantage": a.found.get("advantage", torch.zeros_like(a.logp)), "step_reward": a.step_reward} for a in answers]
        return columns, {"advantage": float(size)}


def advantages(answers: Sequence[Sampled], s: GRPO) -> list[Tensor]:
    """[T] of each answer, by the switches. answers: those that are learned, with their groups."""
    if not answers:
        return []
    switches: Any = s.switches
    lengths = [len(a.logp) for a in answers]
    group = torch.tensor([a.group for a in answers])
    reward = torch.tensor([a.reward for a in answers], dtype=torch.double)
    in_reward = switches.beta if switches.kl == "k1-in-reward" else 0.0
    if in_reward and switches.kl_credit == "answer":
        reward -= in_reward * torch.tensor([float(a.kl.sum()) for a in answers], dtype=torch.double)
    each = s.outcome_weight * _compared(reward, group, switches) if s.step_reward else _compared(reward, group, switches)
    out = [torch.full((n,), float(x), dtype=torch.double) for n, x in zip(lengths, each, strict=True)]
    if s.step_reward and any(a.steps for a in answers):
        where = torch.tensor([a.group for a in answers for _ in a.steps])
        values = torch.tensor([value for a in answers for _, value in a.steps], dtype=torch.double)
        steps = iter(_compared(values, where, switches).tolist())
        for a, x in zip(answers, out, strict=True):
            at_ends = torch.zeros_like(x)
            for end, _ in a.steps:
                at_ends[end] += next(steps)
            x += to_go(at_ends)
    if in_reward and switches.kl_credit == "to-go":
        out = [x - in_reward * to_go(a.kl.double()) for a, x in zip(answers, out, strict=True)]
    if switches.scale == "global":
        out = list(whiten(torch.cat(out), unbiased=switches.std == "bessel").split(lengths))
    return [x.float() for x in out]


def _compared(reward: Tensor, group: Tensor, switches: Switches) -> Tensor:
    """[n] rewards less their baselines, standardised by group where that is asked for."""
    x = reward - baseline(reward, group, switches.baseline)
    if switches.scale != "std":
        return x
    return standardised(x, group_std(reward, group, unbiased=switches.std == "bessel"), EQUAL / 2)


def make_loss(s: GRPO, *, on_policy: bool | None = None) -> Callable[[Any, Forest], Loss]:
    """s: resolved. on_policy: the ratio is 1, by default where the plan has it so."""
    switches: Any = s.switches
    temperature = s.sampling.temperature
    per = "tokens" if switches.aggregation == "token" else "answers"
    estimator = ESTIMATORS.get(switches.kl)
    fused = s.on_policy if on_policy is None else on_policy

    def at_ratio_one(module: Any, batch: Forest) -> Loss:
        at = batch.learned
        weight = batch.target[at]
        old, ref, advantage, sampler = (batch.columns[c][at] for c in ("old_logp", "ref_logp", "advantage", "sampler_logp"))
        push = advantage - switches.beta * slope(estimator, old, ref) if estimator else advantage
        total, logp = weighted_nll(module["policy"], batch, weight * push, temperature=temperature)
        terms = {"policy": Term(total - total.detach() - (weight * advantage).sum(), per)}  # the gradient of both terms, the value of this
        if estimator:
            terms["kl_loss"] = Term((weight * estimator(logp.detach(), ref)).sum(), per, switches.beta)
        return Loss(terms, {"sampler_gap": ((logp.detach() - sampler).abs().sum(), len(at))})

    def at_any(module: Any, batch: Forest) -> Loss:
        at = batch.learned
        weight = batch.target[at]
        old, ref, advantage = (batch.columns[c][at] for c in ("old_logp", "ref_logp", "advantage"))
        logp = token_logp(module["policy"], batch, temperature=temperature)
        moved = sequence_logp(logp, old, batch.segment[at]) if switches.ratio == "sequence" else logp
        clip = {"low": switches.clip, "high": switches.clip_high, "dual": switches.dual_clip}
        terms = {"policy": Term((weight * clipped_surrogate(moved, old, advantage, **clip)).sum(), per)}
        if estimator:
            drawn = ratio(logp, old).detach()  # the answers are the sampler's, the KL is the current policy's
            terms["kl_loss"] = Term((weight * drawn * estimator(logp, ref)).sum(), per, switches.beta)
        cut = clipped(moved.detach(), old, advantage, **clip)
        return Loss(terms, {"clipped": (cut.sum(), len(at)), "approx_kl": (k3(old, logp.detach()).sum(), len(at))})

    return at_ratio_one if fused else at_any


def train(settings: GRPO, module: nn.ModuleDict, source: Callable[[int], list[Forest]], resume: State | None = None) -> Iterator[Step]:
    """settings: resolved."""
    s = settings
    how: dict[str, Any] = {
        "steps": s.plan.steps,
        "optim": s.optim,
        "seed": s.seed,
        "compute": s.compute,
        "check": check_start(s.sampling.temperature),
    }
    return fit(module, source, make_loss(s), resume=resume, **how)


def prepare(settings: GRPO, run: Run) -> Job:
    s = resolved(settings)
    given = ready(s, "GRPO", run)
    module = nn.ModuleDict({"policy": given.policy})
    source = Rollouts(s, module, given)
    return Job(
        total=s.plan.steps,
        steps=lambda resume: train(s, module, source, resume),
        save=lambda path: export(given.policy, given.tokenizer, path, stop=given.stop),
        card={**given.card, "switches": {**s.switches.model_dump(), "overlong": s.ending.overlong}},
        policy=(given.policy, given.tokenizer),
        asks=[r.messages for r in given.prompts.records[:4]],
        prepared=prepared(s, given, module, make_loss(s), ("old_logp", "ref_logp", "advantage", "sampler_logp")),
    )
