"""Weights, gradients and optimiser states spread over the ranks (FSDP2, torch.distributed.fsdp.fully_shard). Floor 3.

A module to be trained has a twin whose parameters are shards; the loop trains the twin. The module itself, which source, evaluation
and the caller know, is whole where it is looked at (`Twin.gather`) and holds no weights in between (`Twin.release`): rollouts and
evaluation run on plain weights, on any number of ranks, with nothing to wait for. Checkpoints hold the shards as each rank wrote them
(torch.distributed.checkpoint in safetensors) and are read by any number of ranks.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from temper.config import UserError
from temper.train import ranks
from temper.train.compute import blocks


class Twin:
    """A module's sharded twin."""

    def __init__(self, module: nn.Module) -> None:
        """Spreads the weights of a whole module, equal on all ranks. Raises UserError for what has no transformer blocks."""
        self.plain = module
        self.module = copy.deepcopy(module)
        models = [part for part in self.module.modules() if isinstance(part, PreTrainedModel) and hasattr(part, "forest_backend")]
        mesh = init_device_mesh(next(module.parameters()).device.type, (ranks.count(),))
        for model in models:
            _shard(model, mesh)
        if not models or not all(isinstance(p, DTensor) for p in self.module.parameters()):
            raise UserError(f"--shard full: {type(module).__name__} is not made of transformer models alone; use --shard none")
        self.whole = True

    def gather(self) -> None:
        """The plain module gets the current weights. All ranks must ask."""
        if not self.whole:
            for whole, part in zip(self.plain.parameters(), self.module.parameters(), strict=True):
                whole.data = full(part.detach())
            self.whole = True

    def release(self) -> None:
        """The plain module's weights go."""
        for p in self.plain.parameters():
            p.data = p.new_empty(0)
        self.whole = False


def _shard(model: Any, mesh: DeviceMesh) -> None:
    kind = model.precision if model.precision != model.dtype else None
    policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32 if kind else None)
    units: list[Any] = [*blocks(model), model]
    for unit in units:
        # what the model has beside its blocks stays gathered between forward and backward: the head reads its weight by itself
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=unit is not model)
        unit.set_gradient_divide_factor(1.0)  # the loop has divided
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no average
    model.trunk = MethodType(_trunk, model)
    register_fsdp_forward_method(model, "trunk")


def _trunk(model: PreTrainedModel, **inputs: Any) -> Any:
    """The base model, called through a method whose hooks gather the weights first."""
    return model.base_model(**inputs)


def own(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    """All of a tensor; all ranks must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Any, p: Tensor) -> Any:
    """A whole tensor as the parameter it belongs to is spread: equal on all ranks, so nothing is sent."""
    if isinstance(p, DTensor) and isinstance(x, Tensor) and x.shape == p.shape and x.ndim:
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x


def resume(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` of whole states, whether the parameters are spread or not."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {i: {name: like(x, params[i]) for name, x in one.items()} for i, one in state["state"].items()}
    optimizer.load_state_dict({**state, "state": spread})


def write(tensors: dict[str, Tensor], folder: Path | None = None) -> None:
    """Each rank's part of spread tensors into a file of its own in the folder that the leader names. All ranks must ask.

    Raises OSError where a rank could not write.
    """
    there = ranks.led(None if folder is None else str(folder))
    try:
        checkpoint.save(tensors, storage_writer=HuggingFaceStorageWriter(there, save_distributed=True))
    except CheckpointException as error:
        failed = next((e for e, _ in error.failures.values() if isinstance(e, OSError)), None)
        raise failed or error from None
