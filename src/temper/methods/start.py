"""How PPO and GRPO begin: their common settings, what they load and refuse, and the check before the first update. Floor 5."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
import torch
from torch import nn

from temper.config import Settings, UserError, idle, opt
from temper.data.template import stop_ids
from temper.forest import Forest, Segment, Tree
from temper.judges.rating import Rater, rater, reads
from temper.methods.base import Asked, Prepared, asked
from temper.methods.rated import StepRater, step_rater, weights_of
from temper.models import shared
from temper.models.adapters import adapted, shifts
from temper.models.heads import slack, token_logp
from temper.models.load import backbone, load_policy, source
from temper.runs import Run
from temper.train import Loss


class Plan(Settings):
    """How much is sampled, and how often it is learned from."""

    rollouts: int = opt(60, "times to sample", ge=1)
    prompts_per_step: int = opt(64, "prompts per rollout", ge=1)
    samples_per_prompt: int = opt(1, "answers to each", ge=1)
    epochs_per_batch: int = opt(2, "passes over a rollout", ge=1)
    minibatches: int = opt(1, "optimiser steps per pass", ge=1)
    vllm: str | None = opt(None, "URL of a vLLM server that samples instead of this process, such as http://localhost:8000")
    vllm_folder: str | None = opt(None, "with --vllm, the folder that it serves: it gets the policy's weights before each rollout")

    @property
    def updates(self) -> int:
        """Optimiser steps per rollout."""
        return self.epochs_per_batch * self.minibatches

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.rollouts * self.updates


class Ptx(Settings):
    """Likelihood of other data beside the reward (PPO-ptx), against forgetting."""

    ptx_data: str | None = opt(None, "documents or conversations, learned in every step; default: none")
    ptx_as: Literal["text", "chat"] = opt("text", "what --ptx-data holds")
    ptx_weight: float = opt(1.0, "coefficient of their mean negative log-likelihood (27.8 in arXiv:2203.02155)", gt=0)
    ptx_batch: int = opt(32, "records of it per optimiser step", ge=1)

    @pydantic.model_validator(mode="after")
    def _used(self) -> "Ptx":
        if self.ptx_data is None:
            idle(self, ["ptx_as", "ptx_weight", "ptx_batch"], "without --ptx-data")
        return self


class Ready(NamedTuple):
    """What both methods begin with."""

    policy: Any
    reference: Any
    tokenizer: Any
    prompts: Asked
    reward: Rater
    steps: StepRater | None
    stop: list[int]
    card: dict[str, Any]


def begin(s: Any, *, seed: int) -> tuple[Any, Any, Any]:
    """(policy, reference, tokenizer). With an adapter they share one backbone, and reward models on the same base can."""
    policy, tokenizer = load_policy(s.model, **s.compute.placed, adapters=s.adapters, seed=seed)
    if adapted(policy):
        return *shared.roles(policy), tokenizer
    return policy, load_policy(s.model, **s.compute.placed)[0], tokenizer


def ready(s: Any, title: str, run: Run) -> Ready:
    """Load what `s` names. Raises UserError for sampling that is not from the policy's own distribution: the ratio would be another's."""
    if not s.sampling.temperature:
        raise UserError(f"--temperature 0: {title} must sample; give a temperature above 0")
    if not s.sampling.plain:
        what = s.sampling.truncates or f"repetition_penalty {s.sampling.repetition_penalty:g}"
        raise UserError(f"{what}: {title} learns from the policy's own distribution, which this changes; leave it out")
    if s.plan.minibatches > s.plan.prompts_per_step:
        few = f"--minibatches {s.plan.minibatches} > --prompts-per-step {s.plan.prompts_per_step}"
        raise UserError(f"{few}: each needs at least one prompt")
    if (s.plan.vllm is None) != (s.plan.vllm_folder is None):
        raise UserError("--vllm and --vllm-folder belong together: the server's URL, and the folder of the model that it serves")
    if s.plan.vllm and s.compute.shard == "full":
        raise UserError("--vllm with --shard full: no rank holds all the weights that the server is to get; leave one out")
    if s.plan.vllm_folder:
        check_served(s)
    policy, reference, tokenizer = begin(s, seed=s.seed)
    stop = stop_ids(tokenizer)
    reward = rater(s.reward, tokenizer=tokenizer, **s.compute.placed, beside=policy)
    steps = step_rater(s.step_reward, tokenizer, **s.compute.placed) if s.step_reward else None
    prompts = asked(s.prompts, run, tokenizer, policy, s.window, room=s.sampling.max_new, seed=s.seed)
    return Ready(policy, reference, tokenizer, prompts, reward, steps, stop, {**prompts.card, "reward": reward.name})


def check_served(s: Any) -> None:
    """Raises UserError for a --vllm-folder, which is replaced as a whole, that holds what the run reads, or anything but a model."""
    folder = Path(s.plan.vllm_folder).expanduser().resolve()
    said = f"--vllm-folder {s.plan.vllm_folder}: it is replaced before each rollout"
    given = [Path(name).expanduser() for name in (s.model, getattr(s, "value_model", None), s.step_reward, *reads(s.reward)) if name]
    for path in (path for path in given if path.exists()):
        for name in (str(path), *([source(str(path)), backbone(str(path))] if path.is_dir() else [])):
            place = Path(name).resolve()
            if folder in (place, *place.parents):
                raise UserError(f"{said}, and {name}, which the run reads, lies there; serve a copy of the model, and give its folder")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise UserError(f"{said}, and is no model's folder now (no config.json); give the one that the server was started with")


def prepared(s: Any, given: Ready, module: nn.Module, loss: Callable[[Any, Forest], Loss], columns: Sequence[str]) -> Prepared:
    """What the checks before the first step look at: a prompt's answer is one of --max-new tokens with these columns."""

    def longest(tree: Tree) -> Tree:
        n = s.sampling.max_new
        return [*tree, Segment([tree[0].tokens[-1]] * n, [1.0] * n, 0, dict.fromkeys(columns, [0.0] * n))]

    check = check_reference(s.sampling.temperature, given.reference)
    return Prepared(given.prompts.corpus, given.tokenizer, module, loss, weights_of, check, longest)


def check_reference(temperature: float, reference: Any) -> Callable[[Any, Sequence[Forest]], None]:
    """Before anything is learned the policy is the reference. (But for a new soft prompt, which is something.)"""

    def check(module: Any, batches: Sequence[Forest]) -> None:
        if shifts(module["policy"]):
            return
        with torch.no_grad():
            for batch in batches:
                mine, theirs = (token_logp(model, batch, temperature=temperature) for model in (module["policy"], reference))
                if (gap := float((mine - theirs).abs().max())) > slack(module["policy"], 1e-4, 0.2):
                    raise AssertionError(f"the policy is not the reference: log-probs differ by up to {gap:.2g} nats")

    return check


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
