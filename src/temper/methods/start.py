"""How PPO and GRPO begin: their common settings, what they load and refuse, and the check before the first update. Floor 5."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from temper.config import Settings, UserError, opt
from temper.data.sources import read
from temper.data.template import stop_ids
from temper.data.trees import prompt_ids
from temper.forest import Forest
from temper.judges.rating import Rater
from temper.methods.rated import StepRater, rater
from temper.models import shared
from temper.models.adapters import adapted, shifts
from temper.models.heads import slack, token_logp
from temper.models.load import load_policy
from temper.records import Prompt


class Plan(Settings):
    """How much is sampled, and how often it is learned from."""

    rollouts: int = opt(60, "times to sample", ge=1)
    prompts_per_step: int = opt(64, "prompts per rollout", ge=1)
    samples_per_prompt: int = opt(1, "answers to each", ge=1)
    epochs_per_batch: int = opt(2, "passes over a rollout", ge=1)
    minibatches: int = opt(1, "optimiser steps per pass", ge=1)

    @property
    def updates(self) -> int:
        """Optimiser steps per rollout."""
        return self.epochs_per_batch * self.minibatches

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.rollouts * self.updates


class Ready(NamedTuple):
    """What both methods begin with. records and prompts: those that fit."""

    policy: Any
    reference: Any
    tokenizer: Any
    records: list[Prompt]
    prompts: list[list[int]]
    reward: Rater
    steps: StepRater | None
    stop: list[int]
    card: dict[str, Any]


def ready(s: Any, title: str) -> Ready:
    """Load what `s` names. Raises UserError for sampling that is not from the policy's own distribution: the ratio would be another's."""
    if not s.sampling.temperature:
        raise UserError(f"--temperature 0: {title} must sample; give a temperature above 0")
    if not s.sampling.plain:
        what = s.sampling.truncates or f"repetition_penalty {s.sampling.repetition_penalty:g}"
        raise UserError(f"{what}: {title} learns from the policy's own distribution, which this changes; leave it out")
    if s.plan.minibatches > s.plan.prompts_per_step:
        few = f"--minibatches {s.plan.minibatches} > --prompts-per-step {s.plan.prompts_per_step}"
        raise UserError(f"{few}: each needs at least one prompt")
    policy: Any
    reference: Any
    policy, tokenizer = load_policy(s.model, **s.compute.placed, adapters=s.adapters, seed=s.seed)
    stop = stop_ids(tokenizer)
    if adapted(policy):  # its reference needs no second model, nor does a reward model that is an adapter of the same base
        policy, reference = shared.roles(policy)
    else:
        reference, _ = load_policy(s.model, **s.compute.placed)
    reward = rater(s.reward, tokenizer, **s.compute.placed, beside=policy)
    steps: Any = rater(s.step_reward, tokenizer, **s.compute.placed) if s.step_reward else None
    if steps and not hasattr(steps, "rate_steps"):
        raise UserError(f"--step-reward {s.step_reward}: rates whole answers, not their steps; give a process reward model")
    records, report = read(s.prompts, "prompts", skip_bad=s.window.skip_bad)
    prompts, cut = prompt_ids(tokenizer, records, policy, s.window, room=s.sampling.max_new)
    kept = [record for i, record in enumerate(records) if i not in cut.dropped]
    card = {"source": report.summary(), "prompts": len(prompts), "kept": cut.summary(), "reward": reward.name}
    return Ready(policy, reference, tokenizer, kept, prompts, reward, steps, stop, card)


def check_start(temperature: float) -> Callable[[Any, Sequence[Forest]], None]:
    """At step 0 the ratio is 1 and the KL to the reference 0. (But for a new soft prompt, which is something.)"""

    def check(module: Any, batches: Sequence[Forest]) -> None:
        for batch in (b for b in batches if "old_logp" in b.columns):
            logp = token_logp(module["policy"], batch, temperature=temperature)
            for name, what in ("old_logp", "ratio is not 1"), ("ref_logp", "policy is not the reference"):
                gap = float((logp - batch.columns[name][batch.learned]).abs().max()) if len(logp) else 0.0
                if not (name == "ref_logp" and shifts(module["policy"])) and gap > slack(module["policy"], 1e-4, 0.2):
                    raise AssertionError(f"the {what}: log-probs differ by up to {gap:.2g} nats")

    return check
