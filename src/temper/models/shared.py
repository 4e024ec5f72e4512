"""One backbone for several models: named LoRA adapters and scalar heads on the same frozen weights. Floor 2.

PPO needs a policy, a reference, a value model and a reward model. Where policy and reward model are adapters of one base, all four are
roles of one PeftModel: the reference is the policy's adapter as it was loaded (or none), the value starts as the reward's. Each role is
what heads, rollouts, the loop and `export` take for a model; while one computes, its adapter is the one at work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import nn

from temper.config import UserError
from temper.models import adapt, load
from temper.models.adapt import Adapter
from temper.models.adapters import OWN, REFERENCE, adapted, using

VALUE, REWARD = "value_model", "reward_model"


class Role(nn.Module):
    """One adapter of a shared model, or none of them, and maybe a scalar head, as a model of its own.

    It owns the parameters of its adapter and its head; the backbone is borrowed, so it is in no checkpoint and no optimiser.
    """

    def __init__(self, backbone: Any, adapter: str | None, head: nn.Linear | None = None, *, learns: bool = False) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone
        self.adapter = adapter
        self.pace = backbone.pace if learns else 1.0
        for name, p in backbone.named_parameters():
            if adapter and f".{adapter}." in name:
                p.requires_grad = learns
                self.register_parameter(name.replace(".", "/"), p)
        self.head = head
        if head is not None:
            head.requires_grad_(learns)

    def __getattr__(self, name: str) -> Any:
        if name == "score" and self._modules.get("head") is not None:
            return self.head
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["backbone"], name)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Within it the backbone computes with this role's adapter."""
        with using(self.backbone, self.adapter):
            yield

    def borrowed(self) -> Iterator[nn.Module]:
        """The backbone's modules."""
        return self.backbone.modules()


class Four(NamedTuple):
    """PPO's models, with what else is read from the reward model's folder."""

    policy: Any
    reference: Any
    value: Any
    reward: Any
    tokenizer: Any
    reward_tokenizer: Any
    scale: dict[str, float] | None  # mean and deviation of the reward model's scores


def four(model: str, reward: str, how: Adapter, *, seed: int = 0, **placed: Any) -> Four | None:
    """Policy, reference, value and reward on one backbone; None where they are not adapters of one base.

    model: the policy's start, an adapter or, with a kind in `how`, the base itself. reward: a reward model's adapter. placed: device and
    precision. Raises UserError as `load_policy` does.
    """
    policy_folder, reward_folder = (_folder(name) for name in (model, reward))
    if reward_folder is None or not adapt.is_adapter(reward_folder) or adapt.described(reward_folder)["peft_type"] != "LORA":
        return None
    if how.adapter == "full" or (not (policy_folder and adapt.is_adapter(policy_folder)) and how.adapter not in ("lora", "dora")):
        return None
    base = adapt.base_of(policy_folder) if policy_folder and adapt.is_adapter(policy_folder) else str(policy_folder or model)
    if not adapt.same_base(base, adapt.base_of(reward_folder)):
        return None
    if adapt.described(reward_folder).get("task_type") != "SEQ_CLS":
        raise UserError(f"{reward}: a language model, not a reward model; train one from it with `temper reward`")
    backbone, tokenizer = load.load_policy(model, **placed, adapters=how, seed=seed)
    if not adapted(backbone) or getattr(backbone.active_peft_config, "num_virtual_tokens", 0):
        return None
    for name in (REWARD, VALUE):
        adapt.read_onto(backbone, reward_folder, name=name)
    nn.Module.to(backbone, placed.get("device", "cpu"))
    head = _head(reward_folder, backbone)
    return Four(
        Role(backbone, OWN, learns=True),
        Role(backbone, REFERENCE if REFERENCE in backbone.peft_config else None),
        Role(backbone, VALUE, copy.deepcopy(head), learns=True),
        Role(backbone, REWARD, head),
        tokenizer,
        load.load_tokenizer(reward_folder),
        adapt.record(reward_folder).get("temper_reward"),
    )


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    path = path / "model" if (path / "model").is_dir() else path
    return path if path.is_dir() else None


def _head(folder: Path, like: Any) -> nn.Linear:
    """The scalar head in a reward model's adapter."""
    found = {key.rpartition(".")[2]: x for key, x in load_file(folder / adapt.WEIGHTS).items() if "score" in key.split(".")}
    if "weight" not in found:
        raise UserError(f"{folder}: a reward model's adapter without its head `score`")
    head = nn.Linear(found["weight"].shape[1], 1, bias="bias" in found, device=like.device, dtype=like.dtype)
    head.load_state_dict(found)
    return head


def without(policy: Any) -> Any:
    """The reference of an adapted policy that shares no backbone with others: the policy as it was loaded, no second model."""
    return Role(policy, REFERENCE if REFERENCE in policy.peft_config else None)
