"""One backbone for several models: named adapters and scalar heads on the same frozen weights. Floor 2.

PPO needs a policy, a reference, a value model and a reward model. Where they are adapters of one base, all four are roles of one
PeftModel: the reference is the policy's adapter as it was loaded (or none), the value starts as a copy of the reward's. Each role is
what heads, rollouts, the loop and `export` take for a model; while one computes, its adapter is the one at work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from temper.models import adapt
from temper.models.adapt import Adapter
from temper.models.adapters import OWN, REFERENCE, part_of, using


class Role(nn.Module):
    """One adapter of a shared model, or none of them, and maybe a scalar head, as a model of its own.

    It owns the parameters of its adapter and its head; the backbone is borrowed, so it is in no checkpoint and no optimiser.
    """

    def __init__(self, backbone: Any, adapter: str | None, head: nn.Linear | None = None, *, pace: float = 0.0) -> None:
        """pace: the factor on the learning rate; 0: it does not learn."""
        super().__init__()
        self.__dict__["backbone"] = backbone
        self.adapter, self.head, self.pace = adapter, head, pace
        for name, p in backbone.named_parameters():
            if adapter and part_of(name, adapter):
                p.requires_grad = pace > 0
                self.register_parameter(name.replace(".", "/"), p)
        if head is not None:
            head.requires_grad_(pace > 0)
            self.config = copy.copy(backbone.config)
            self.config.architectures = ["RoleForSequenceClassification"]
        self.eval()

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


def roles(model: Any) -> tuple[Role, Role]:
    """An adapted policy as (policy, reference): the reference is the policy as it was loaded, and no second model."""
    return Role(model, OWN, pace=model.pace), Role(model, REFERENCE if REFERENCE in model.peft_config else None)


def beside(role: Any, name: str, base: str, head: Any, how: Adapter | None, *, seed: int) -> Role | None:
    """A scoring model on the backbone of a role; None where it cannot share it.

    name: the folder of an adapter, or the base itself, which gets a new adapter. head(width): its head, where the folder has none.
    how: what of it is trained; None: nothing.
    """
    if not isinstance(role, Role) or not adapt.same_base(base, str(role.get_base_model().name_or_path)):
        return None
    if role.active_peft_config.is_prompt_learning or (how and how.adapter in ("full", "prompt", "prefix")):
        return None
    backbone, called = role.backbone, f"role_{len(role.peft_config)}"
    if name != base and adapt.described(name).get("peft_type") == "LORA":
        adapt.read_onto(backbone, name, name=called)
    elif name == base and how and how.adapter in ("lora", "dora"):
        adapt.put_beside(backbone, how, called, seed=seed)
    else:
        return None
    backbone.to(role.device)
    found = adapt.head_of(name) if name != base else None
    one = (found or head(backbone.get_input_embeddings().embedding_dim)).to(role.device, backbone.dtype)
    labels = adapt.record(name).get("labels", []) if found else []
    out = Role(backbone, called, one, pace=(how.adapter_lr or adapt.PACE["lora"]) if how else 0.0)
    for key, value in adapt.record(name).items():
        if key.startswith("temper_"):
            setattr(out.config, key, value)
    out.config.num_labels = one.out_features
    if len(labels) > 1:
        out.config.id2label, out.config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    return out
