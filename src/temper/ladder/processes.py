"""Nodes of a graph, each in a process of its own, or in several ranks: side by side where cores allow. Floor 7.

What runs side by side is decided by the nodes' threads and the machine's cores, and never changes a figure.
"""

import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from temper.config import UserError
from temper.train import ranks


@dataclass
class Node:
    """A stage, or the evaluation of one."""

    name: str
    needs: list[str]
    threads: int
    run: Callable[[], Any] = field(repr=False, default=lambda: None)
    budget: float | None = None
    ranks: int = 1

    @property
    def cores(self) -> int:
        return self.threads * self.ranks


@dataclass
class Outcome:
    """How a node ended."""

    status: str  # done, skipped, failed, interrupted
    seconds: float = 0.0
    error: str = ""
    code: int = 0  # exit code that the whole run ends with


def execute(todo: list[Node], cores: int, tell: Callable[[str, str, Outcome | None], None], tick: Callable[[], None]) -> dict[str, Outcome]:
    """Run nodes as their needs are met and cores are free; after a failure nothing new is started. tell(name, event, outcome)."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["temper.ladder.worker"])  # torch and transformers are imported once
    outcomes: dict[str, Outcome] = {}
    running: dict[str, tuple[Node, Any, Connection]] = {}
    followers: dict[str, list[Any]] = {}  # the ranks beside a node's first process
    left = list(todo)
    names = {n.name for n in todo}
    try:
        while left or running:
            healthy = all(o.status in ("done", "skipped") for o in outcomes.values())
            busy = sum(n.cores for n, _, _ in running.values())
            ready = [n for n in left if all(d not in names or d in outcomes for d in n.needs)] if healthy else []
            for node in ready:
                if running and busy + node.cores > cores:
                    break  # in order: a stage with many threads is not starved by later small ones
                here, there = processes.Pipe(duplex=False)
                meeting = tempfile.mkdtemp(prefix="temper-") if node.ranks > 1 else None
                members = [(rank, node.ranks, f"file://{meeting}/ranks") for rank in range(node.ranks)] if meeting else [None]
                group = [processes.Process(target=_child, args=(node.run, there, member), name=node.name) for member in members]
                running[node.name], followers[node.name] = (node, group[0], here), group[1:]
                for process in group:
                    process.start()
                there.close()
                left.remove(node)
                busy += node.cores
                tell(node.name, "started", None)
            if not running:
                if healthy and left:
                    raise RuntimeError(f"nothing can run: {', '.join(n.name for n in left)} wait for each other")
                break
            multiprocessing.connection.wait([c for _, _, c in running.values()], timeout=0.25)
            tick()
            for name, (_, process, here) in list(running.items()):
                if here.poll() or not process.is_alive():
                    outcomes[name] = _ended(process, here)
                    _end(followers[name], 10.0 if outcomes[name].status == "done" else 0.0)
                    del running[name]
                    tell(name, outcomes[name].status, outcomes[name])
    except KeyboardInterrupt:  # the children got the signal too: they save and end
        for _, process, _ in running.values():
            process.terminate()  # again for those that got it; the only word to them where this process alone was signalled
        for name, (_, process, _) in running.items():
            process.join()
            _end(followers[name], 0.0)
            outcomes[name] = Outcome("interrupted", code=130)
            tell(name, "interrupted", outcomes[name])
    finally:
        _end([process for name, (_, process, _) in running.items() for process in (process, *followers[name])], 0.0)
    return outcomes


def _end(processes: Sequence[Any], patience: float) -> None:
    """Wait so long, together, for processes to end; then end them."""
    until = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _ended(process: Any, here: Connection) -> Outcome:
    try:
        result = here.recv() if here.poll() else None
    except EOFError:
        result = None
    process.join()
    if result is None:
        if process.exitcode == 130:
            return Outcome("interrupted", code=130)
        return Outcome("failed", error=f"its process ended with exit code {process.exitcode}; out of memory?", code=1)
    return Outcome(**result)


def _end_with_parent() -> None:
    """A stage does not go on in the background when `temper run` was killed: the same command would find it writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _child(run: Callable[[], dict[str, Any]], there: Connection, member: tuple[int, int, str] | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if member:
        ranks.join(*member)
    if ranks.rank():
        there.close()
        try:
            run()
        except RuntimeError as e:
            if "clos" not in str(e) and "reset" not in str(e):  # the leader ended; it says why
                raise
        return
    try:
        there.send(run())
    except UserError as e:
        there.send({"status": "failed", "error": str(e), "code": e.code})
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        there.send({"status": "failed", "error": traceback.format_exc(), "code": 1})
