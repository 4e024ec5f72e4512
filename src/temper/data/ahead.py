"""A function of many pieces, in order, by several processes: a few pieces ahead and no more. Floor 2."""

from __future__ import annotations

import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

PIECE = 256  # rows of a piece
ALONE = 32  # pieces that this process works on before it has others help, which take seconds to start

P = TypeVar("P")
R = TypeVar("R")

_work: list[Callable[[Any], Any]] = []  # in a helping process


def _help(work: Callable[[Any], Any]) -> None:
    _work.append(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it


def _helped(piece: Any) -> Any:
    return _work[0](piece)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cut(rows: Iterable[P], size: int = PIECE) -> Iterator[list[P]]:
    """The rows in pieces of `size`."""
    rows = iter(rows)
    while piece := list(itertools.islice(rows, size)):
        yield piece


def ahead(work: Callable[[P], R], pieces: Iterable[P], workers: int) -> Iterator[R]:
    """`work` of each piece, in order. Beyond ALONE pieces `workers` processes do it (1: this one), which are told `work` once.

    Raises what `work` raises.
    """
    rest = iter(pieces)
    yield from map(work, itertools.islice(rest, ALONE if workers > 1 else None))
    begin = list(itertools.islice(rest, 1))
    if not begin:
        return
    waiting: deque[Future[R]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_help, initargs=(work,))
    try:
        for piece in itertools.chain(begin, rest):
            waiting.append(pool.submit(_helped, piece))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
