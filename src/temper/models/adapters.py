"""PEFT adapters as far as Temper must know of them: the model beneath, what they add to the head, and their absence. Floor 2.

Nothing here needs PEFT itself: a model that was never wrapped goes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from temper.config import UserError


class LowRank(NamedTuple):
    """What LoRA adds to a product: scale · down(x) upᵀ (arXiv:2106.09685, sec. 4.1)."""

    down: Callable[[Tensor], Tensor]  # [n, d] -> [n, r]
    up: Tensor  # [V, r]
    scale: float


def beneath(model: Any) -> Any:
    """The transformers model with the adapter's layers in it. Raises UserError for soft prompts, which come before the tokens."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UserError(f"a {model.active_peft_config.peft_type.value} adapter puts states before the tokens; take one that changes layers")
    return model.get_base_model()


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Inside, an adapted model computes what it did before its adapter was added: a reference that needs no second model."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        yield


def linear(layer: Any) -> tuple[nn.Linear, list[LowRank]]:
    """A language-model head as its plain linear layer and what adapters add to it.

    Raises UserError for a layer that is anything else (DoRA, quantised weights), whose product cannot be taken apart.
    """
    if hasattr(layer, "modules_to_save"):  # trained as a whole beside the original
        active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.modules_to_save]
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    added = []
    if hasattr(layer, "base_layer"):
        for name in [] if layer.disable_adapters or layer.merged else layer.active_adapters:
            down, up = (getattr(layer, part, {}) for part in ("lora_A", "lora_B"))
            if name not in down or name in layer.lora_variant or up[name].bias is not None:
                raise UserError(f"{name}: a {type(layer).__name__} adapter on the language-model head; only plain LoRA can stand there")
            added.append(LowRank(_down(down[name], layer.lora_dropout[name]), up[name].weight, float(layer.scaling[name])))
        layer = layer.base_layer
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise UserError(f"a language-model head of type {type(layer).__name__}; it must be a linear layer that is not quantised")
    return layer, added


def _down(layer: nn.Linear, dropout: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(dropout(x.to(layer.weight.dtype)))
