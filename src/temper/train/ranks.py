"""Ranks: processes that train one model together, each on its share of every batch. Floor 3.

Rank 0 leads: it writes, evaluates, saves and decides when to stop; the others follow. All hold the whole model, and sum their
gradients before the update, so their weights stay equal to the last bit. Without `join` there is one rank and all of this is
nothing. Launched by torchrun, or by `temper run` for a stage with `ranks`.
"""

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

T = TypeVar("T")
K = TypeVar("K")
ORDERS = ("next", "stop", "gather", "save")  # of a step: it is over, it was the last, its weights are looked at, it is saved
ROOM = 4096  # bytes of a small message between ranks
PATIENCE = timedelta(hours=24)  # the leader may evaluate for long; one that died is noticed by its closed connection


def join(rank: int, count: int, address: str = "env://") -> None:
    """Become rank `rank` of `count`. address: as torch.distributed's init_method."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    distributed.init_process_group(backend, init_method=address, rank=rank, world_size=count, timeout=PATIENCE)


def join_torchrun() -> None:
    """Join the ranks of torchrun, when it launched this process as one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and not distributed.is_initialized():
        join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def leave() -> None:
    """The opposite of `join`."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this process is; 0 leads."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def beside() -> int:
    """How many ranks run on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count()))


def gather(value: T) -> list[T]:
    """What each rank gave, by rank."""
    if count() == 1:
        return [value]
    mine = pickle.dumps(value)
    room = torch.zeros(ROOM, dtype=torch.uint8)
    if len(mine) <= ROOM:  # one message instead of the two of all_gather_object: every step waits for it
        room[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    rooms = [torch.empty_like(room) for _ in range(count())]
    distributed.all_gather(rooms, room)
    if all(bool(theirs[0]) for theirs in rooms):  # a pickle begins with its protocol's mark; a room that was too small is empty
        return [pickle.loads(theirs.numpy().tobytes()) for theirs in rooms]
    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value)
    return found


def all_sum(values: Mapping[K, float]) -> dict[K, float]:
    """Sums by name over the ranks; a rank that lacks a name adds nothing to it."""
    return summed(gather(dict(values)))


def summed(parts: Iterable[Mapping[K, float]]) -> dict[K, float]:
    """Sums by name, in the order of the parts: equal on every rank."""
    total: dict[K, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def sum_tensor(x: torch.Tensor) -> None:
    """In place, over the ranks."""
    if count() > 1:
        distributed.all_reduce(x)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every parameter's gradient becomes the sum over the ranks; one that no rank has stays None."""
    if count() == 1:
        return
    params = list(parameters)
    for device, dtype in dict.fromkeys((p.device, p.dtype) for p in params):
        group = [p for p in params if (p.device, p.dtype) == (device, dtype)]
        has = torch.tensor([float(p.grad is not None) for p in group], dtype=dtype, device=device)
        flat = torch.cat([has, *(p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in group)])
        distributed.all_reduce(flat)
        at = len(group)
        for p, n in zip(group, flat[:at].tolist(), strict=True):
            p.grad = flat[at : at + p.numel()].view_as(p) if n else None
            at += p.numel()


def shares(sizes: Sequence[int]) -> list[list[int]]:
    """The ranks' items of those with these sizes: their indices, ascending. Each item is one rank's; loads are about equal."""
    loads: list[int] = [0] * count()
    found: list[list[int]] = [[] for _ in loads]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        loads[least] += sizes[i]
        found[least].append(i)
    return [sorted(part) for part in found]


def share(sizes: Sequence[int]) -> list[int]:
    """This rank's part of `shares`."""
    return shares(sizes)[rank()]


def whole(mine: Sequence[int], items: Sequence[T]) -> list[T]:
    """What all ranks made of their shares, put together again: this rank made items[k] of the item mine[k]."""
    found = {i: item for where, part in gather((list(mine), list(items))) for i, item in zip(where, part, strict=True)}
    return [found[i] for i in range(len(found))]


def led(value: T | None = None) -> T:
    """The leader's value, on every rank."""
    box: list[Any] = [value]
    if count() > 1:
        distributed.broadcast_object_list(box, src=0)
    return box[0]


def order(what: str) -> None:
    """The leader has the others do something with it: one of ORDERS. They read it from `orders`."""
    if count() > 1:
        distributed.broadcast(torch.tensor([ORDERS.index(what)]), src=0)


def orders() -> Iterator[str]:
    """What the leader orders, up to and including "next" or "stop"."""
    what = ""
    while what not in ("next", "stop"):
        box = torch.tensor([0])
        distributed.broadcast(box, src=0)
        what = ORDERS[int(box)]
        yield what


@contextmanager
def leader_first() -> Iterator[None]:
    """The leader goes through the block before the others do: what it wrote there, they find."""
    if count() > 1 and rank() > 0:
        distributed.barrier()
    try:
        yield
    finally:
        if count() > 1 and rank() == 0:
            distributed.barrier()


def agree(problem: str | None) -> str | None:
    """The first rank's problem where any rank has one: all must stop together."""
    return next((p for p in gather(problem) if p), None)
