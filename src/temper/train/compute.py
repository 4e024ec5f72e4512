"""How a step is computed: what is kept for the backward pass, on how many ranks the weights lie, how much at a time. Floor 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from temper.config import Settings, UserError, opt
from temper.models import adapters
from temper.models.load import Precision


class Compute(Settings):
    """How a step is computed; but for `precision`, the result does not depend on it beyond rounding."""

    device: Literal["cpu", "cuda", "mps"] = opt("cpu", "what computes; cuda: a GPU for each of the ranks")
    precision: Precision = opt("auto", "of the products; weights, optimiser and losses are float32; auto: bfloat16 on a GPU")
    activations: Literal["keep", "recompute", "offload"] = opt(
        "keep", "of the forward pass: keep, compute again layer by layer (less memory, a third more time), or move to the host's memory"
    )
    shard: Literal["none", "full"] = opt(
        "none", "over several ranks: each holds all weights, or its part of weights, gradients and optimiser (FSDP)"
    )
    compile: bool = opt(False, "compile the transformer blocks for training passes: takes a minute or more first, pays over many steps")
    fit_memory: bool = opt(False, "measure at the start how many tokens fit into memory, and compute no more at a time")

    @property
    def placed(self) -> dict[str, Any]:
        """Where and in what precision a model is loaded: arguments of `load_policy` and `load_scalar`.

        Raises UserError where there is no such device.
        """
        if self.device != "cpu" and not getattr(torch, self.device).is_available():
            raise UserError(f"--device {self.device}: PyTorch finds none here; use --device cpu, or install a build of PyTorch for it")
        return {"device": self.device, "precision": self.precision}


def blocks(module: nn.Module) -> list[Any]:
    """The transformer blocks of all models in a module."""
    return [part for part in adapters.parts(module) if isinstance(part, GradientCheckpointingLayer)]


class Compiled:
    """The transformer blocks of a module, compiled for any length: padding to a few lengths costs more than it saves."""

    def __init__(self, module: nn.Module) -> None:
        self.calls = [(block, torch.compile(block._call_impl, dynamic=True)) for block in blocks(module)]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it they run so; outside, where they also decode, as they are. Values and gradients stay the same up to rounding."""
        for block, call in self.calls:
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block, _ in self.calls:
                block._compiled_call_impl = None


@contextmanager
def activations(module: nn.Module, how: str) -> Iterator[None]:
    """Within it a forward pass keeps its activations in that way. Values and gradients stay the same."""
    recomputed = blocks(module) if how == "recompute" else []
    before = [block.training for block in recomputed]
    for block in recomputed:
        # transformers checkpoints a block in training mode only; its parts stay as they are, so dropout does too
        block.gradient_checkpointing = block.training = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=adapters.again)
    offload = how == "offload"
    kept: AbstractContextManager = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext()
    try:
        with kept:
            yield
    finally:
        for block, training in zip(recomputed, before, strict=True):
            block.gradient_checkpointing, block.training = False, training
