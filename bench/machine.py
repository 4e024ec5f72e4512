"""The machine: clocks, ceilings, peak memory; and what a list of timings in turn says."""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import comb
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch


class Refused(Exception):
    """The two sides did not compute the same thing: the row is not measured."""


class Timed(NamedTuple):
    """One step: its seconds, and what it computed."""

    seconds: float
    loss: float = 0.0
    grad_norm: float = 0.0


class Ratio(NamedTuple):
    """How many times as long the peer takes: the median of the turns' ratios, and an interval of that median."""

    ratio: float
    low: float
    high: float
    ours: float  # median seconds
    peer: float


def now(device: str) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Of seconds measured in turn on the same records: a turn's two share whatever the machine was doing.

    The interval is that of the sign test, the narrowest pair of order statistics that holds the median with at least 95%; of fewer
    than six turns it is all of them, 94% for five.
    """
    turns = sorted(b / a for a, b in zip(ours, peer, strict=True))
    n = len(turns)
    tails = (2 * sum(comb(n, i) for i in range(k + 1)) / 2**n for k in range(n // 2))
    out = max(0, sum(tail <= 0.05 for tail in tails) - 1)  # left out at each end
    return Ratio(median(turns), turns[out], turns[n - 1 - out], median(ours), median(peer))


def in_turn(ours: Callable[[], object], peer: Callable[[], object], times: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds of each, one after the other, after a run of both that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(times + 1):
        for side, run in zip(seconds, (ours, peer), strict=True):
            began = now(device)
            run()
            if turn:
                side.append(now(device) - began)
    return seconds


def ceilings(device: str) -> dict[str, float]:
    """The most that was measured of matrix products (GFLOP/s, float32) and of copying (GB/s, read and write together)."""

    def best(run: Callable[[], object], times: int = 7) -> float:
        run()
        seconds = []
        for _ in range(times):
            began = now(device)
            run()
            seconds.append(now(device) - began)
        return min(seconds)

    products = []
    for m, k, n in (1024, 1024, 1024), (2048, 512, 2048), (4096, 192, 768):
        a, b, out = (torch.randn(*shape, device=device) for shape in ((m, k), (k, n), (m, n)))
        products.append(2 * m * k * n / best(partial(torch.mm, a, b, out=out)))
    x = torch.zeros(1 << 26, device=device)  # 256 MB: more than any cache
    y = torch.zeros_like(x)
    return {"matmul_gflops": max(products) / 1e9, "copy_gbs": 2 * x.nbytes / best(lambda: y.copy_(x)) / 1e9}


def about(device: str, threads: int) -> dict[str, object]:
    """What the figures belong to."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return {"device": name, "threads": threads, "torch": torch.__version__, "python": platform.python_version(), **ceilings(device)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Peak:
    """Peak memory of this process (of the card, on CUDA) above what it held when `start` was called."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.held = 0.0

    def start(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self.held = _status("VmRSS")

    def mb(self) -> float:
        if self.cuda:
            return (torch.cuda.max_memory_allocated() - self.held) / 2**20
        return (_status("VmHWM") - self.held) / 2**20


def _status(name: str) -> float:
    """Bytes, from Linux' account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024.0
    raise OSError(f"no {name} in /proc/self/status")


def can_measure_memory(device: str) -> bool:
    """On CUDA always; else where Linux lets a process reset its high-water mark."""
    return device.startswith("cuda") or os.access("/proc/self/clear_refs", os.W_OK)
