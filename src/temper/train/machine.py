"""How a process uses the machine: threads, and memory that is kept. Floor 3."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from temper.models.load import out_of_memory as out_of_memory
from temper.train import ranks

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def use(threads: int) -> None:
    """Compute with so many threads, on cores of their own where ranks fill the machine, and keep freed memory for the next step.

    Ranks that wander over the cores wait for each other: on two, a step of a small model takes a sixth longer.

    By default glibc gives every large block back to the system and asks for it again at the next step, page by page, which
    takes a fifth of the time of a small model's step on two threads. Does nothing about memory where there is no glibc.
    """
    torch.set_num_threads(threads)
    if ranks.beside() > 1 and not torch.cuda.is_available():
        _stay(threads)
    if mallopt := _glibc("mallopt"):
        for option, size in ((_MMAP, 2**30), (_TRIM, 2**31 - 1), (_TOP_PAD, 2**26)):
            mallopt(option, size)


def _stay(threads: int) -> None:
    """This rank's threads keep to their part of the cores, if the ranks on this machine need exactly as many as there are."""
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) == threads * ranks.beside():
        first = threads * int(os.environ.get("LOCAL_RANK", ranks.rank()))
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), cores[first : first + threads])


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device, its own unused ones included; None where that cannot be known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not (found := _kilobytes("/proc/meminfo", "MemAvailable")):
        return None
    try:  # a container may have less than the machine
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        return min(found, limit - used)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return found


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `run` takes at most beyond what is held before it; None where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if trim := _glibc("malloc_trim"):
        trim(0)  # or blocks that were kept would not count
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew (proc(5))
    except OSError:
        return None
    before = _kilobytes("/proc/self/status", "VmRSS")
    run()
    return _kilobytes("/proc/self/status", "VmHWM") - before


def _kilobytes(file: str, name: str) -> int:
    """Bytes under this name in a file of "name: n kB"; 0 where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
