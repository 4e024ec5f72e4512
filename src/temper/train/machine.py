"""How a process uses the machine: threads, and memory that is kept. Floor 3."""

import ctypes
import sys

import torch

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3  # glibc's M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD


def use(threads: int) -> None:
    """Compute with so many threads, and keep freed memory for the next step.

    By default glibc gives every large block back to the system and asks for it again at the next step, page by page, which
    takes a fifth of the time of a small model's step on two threads. Does nothing about memory where there is no glibc.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            for option, size in ((_MMAP, 2**30), (_TRIM, 2**31 - 1), (_TOP_PAD, 2**26)):
                mallopt(option, size)
