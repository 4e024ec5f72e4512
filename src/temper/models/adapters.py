"""PEFT adapters as far as computing must know of them: the model beneath, what they add to the head, what stands before the tokens,
and which one is at work. Floor 2.

Nothing here needs PEFT itself: a model that was never wrapped goes through unchanged. Making, reading and writing adapters is in `adapt`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from temper.config import UserError

OWN = "default"  # the adapter that is trained and saved, by PEFT's own name for it
REFERENCE = "reference_model"  # the same as it was loaded, where training goes on from an adapter


class LowRank(NamedTuple):
    """What LoRA adds to a product: scale · down(x) upᵀ (arXiv:2106.09685, sec. 4.1)."""

    down: Callable[[Tensor], Tensor]  # [n, d] -> [n, r]
    up: Tensor  # [V, r]
    scale: float


class Soft(NamedTuple):
    """What stands before every root: embeddings (arXiv:2104.08691), or keys and values of each layer (arXiv:2101.00190)."""

    many: int  # virtual tokens
    embeds: Tensor | None  # [k, d]
    prefix: Tensor | None  # [layers, 2, k, G, D]


def adapted(model: Any) -> bool:
    """Whether PEFT has wrapped it."""
    return hasattr(model, "get_base_model")


def beneath(model: Any) -> Any:
    """The transformers model, with the adapter's layers in it where it has such."""
    return model.get_base_model() if adapted(model) else model


def part_of(parameter: str, adapter: str) -> bool:
    """Whether a parameter of that name is the adapter's. (What LoRA adds to embeddings ends in the adapter's name.)"""
    return adapter in parameter.split(".")


def shifts(model: Any) -> bool:
    """Whether its adapter stands before the tokens: then a new one changes what the model computes from the start."""
    return adapted(model) and model.active_peft_config.is_prompt_learning


def soft(model: Any) -> Soft | None:
    """What the adapter at work puts before the tokens, with its gradient; None where there is nothing.

    Raises UserError for kinds of soft prompts other than prompt tuning and prefix tuning.
    """
    if not shifts(model) or model._adapters_disabled:
        return None
    config = model.active_peft_config
    encoder, k, kind = model.prompt_encoder[model.active_adapter], config.num_virtual_tokens, config.peft_type.value
    if kind not in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise UserError(f"an adapter of kind {kind}; of those that stand before the tokens, prompt tuning and prefix tuning can be used")
    # an adapter for inference only holds what the projection gave
    made = encoder.embedding.weight if config.inference_mode else encoder(model.prompt_tokens[model.active_adapter].to(model.device))
    made = made.to(beneath(model).dtype)
    if kind == "PROMPT_TUNING":
        return Soft(k, made, None)
    heads = config.num_attention_heads
    return Soft(k, None, made.view(k, config.num_layers, 2, heads, config.token_dim // heads).permute(1, 2, 0, 3, 4))


@contextmanager
def using(model: Any, name: str | None) -> Iterator[None]:
    """Inside, the adapter of that name is at work; None: none is. Which parameters learn stays as it was.

    PEFT's own switches change `requires_grad` along the way, so its layers are switched here one by one.
    """
    if hasattr(type(model), "borrowed"):  # a role: it switches the backbone when it acts
        own, model.adapter = model.adapter, name
        try:
            yield
        finally:
            model.adapter = own
        return
    layers = _switched(model)
    before = [(m, vars(m).get("_active_adapter"), m._disable_adapters) for m in layers]
    whole = model.active_adapter, model._adapters_disabled
    for m in layers:
        m._disable_adapters = name is None
        if name is not None:
            m._active_adapter = [name]
    model.active_adapter, model._adapters_disabled = name or whole[0], name is None
    _at_work.append((model, name))
    try:
        yield
    finally:
        _at_work.pop()
        model.active_adapter, model._adapters_disabled = whole
        for m, active, disabled in before:
            m._disable_adapters = disabled
            if active is not None:
                m._active_adapter = active


def _switched(model: Any) -> list[Any]:
    """PEFT's layers in the model, looked for again when an adapter was added."""
    known = vars(model).get("_switched", (0, []))
    if known[0] != len(model.peft_config):
        known = len(model.peft_config), [m for m in model.modules() if "_disable_adapters" in vars(m)]
        vars(model)["_switched"] = known
    return known[1]


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Inside, an adapted model computes what it did before this training: with its adapter off, or with the one that training went on
    from. A reference that needs no second model."""
    with using(model, REFERENCE if REFERENCE in model.peft_config else None) if adapted(model) else nullcontext():
        yield


def acting(model: Any) -> AbstractContextManager:
    """Within it a model that shares its weights with others (`temper.models.shared`) has its own adapter at work."""
    return model.acting() if hasattr(type(model), "acting") else nullcontext()


_at_work: list[tuple[Any, str | None]] = []  # of shared models, innermost last


def again() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For torch's checkpoint: within what a layer is computed now, and within what once more in the backward pass: with the adapter that
    is at work now."""
    return nullcontext(), using(*_at_work[-1]) if _at_work else nullcontext()


def parts(module: nn.Module) -> Iterator[nn.Module]:
    """All modules that compute, those that a role of a shared model only borrows included; each once."""
    seen: set[int] = set()
    for own in module.modules():
        for part in (own, *cast(Any, own).borrowed()) if hasattr(type(own), "borrowed") else (own,):
            if id(part) not in seen:
                seen.add(id(part))
                yield part


@contextmanager
def dropping(module: nn.Module) -> Iterator[None]:
    """Within it the adapters' dropout is on. It is off everywhere else: rollouts, references and evaluation see the same model."""
    drops = [d for part in parts(module) for d in getattr(part, "lora_dropout", {}).values() if "lora_dropout" in part._modules]
    for drop in drops:
        drop.train()
    try:
        yield
    finally:
        for drop in drops:
            drop.eval()


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
