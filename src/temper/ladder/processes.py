"""Nodes of a graph, each in a process of its own, or in several ranks: side by side where cores allow. Floor 7.

What runs side by side is decided by the nodes' threads and the machine's cores, and never changes a figure.
"""

import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

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


class Going(NamedTuple):
    """A node that runs: its processes, by rank, and where the first of them to have something to say says it."""

    node: Node
    group: list[Any]
    here: Connection
    meeting: str | None  # folder where its ranks find each other


def execute(todo: list[Node], cores: int, tell: Callable[[str, str, Outcome | None], None], tick: Callable[[], None]) -> dict[str, Outcome]:
    """Run nodes as their needs are met and cores are free; after a failure nothing new is started. tell(name, event, outcome)."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["temper.ladder.worker"])  # torch and transformers are imported once
    outcomes: dict[str, Outcome] = {}
    running: dict[str, Going] = {}
    left = list(todo)
    names = {n.name for n in todo}
    try:
        while left or running:
            healthy = all(o.status in ("done", "skipped") for o in outcomes.values())
            busy = sum(going.node.cores for going in running.values())
            ready = [n for n in left if all(d not in names or d in outcomes for d in n.needs)] if healthy else []
            for node in ready:
                if running and busy + node.cores > cores:
                    break  # in order: a stage with many threads is not starved by later small ones
                running[node.name] = _start(node, processes)
                left.remove(node)
                busy += node.cores
                tell(node.name, "started", None)
            if not running:
                if healthy and left:
                    raise RuntimeError(f"nothing can run: {', '.join(n.name for n in left)} wait for each other")
                break
            multiprocessing.connection.wait([going.here for going in running.values()], timeout=0.25)
            tick()
            for name, going in list(running.items()):
                if going.here.poll() or not going.group[0].is_alive():
                    outcomes[name] = _ended(going)
                    del running[name]
                    tell(name, outcomes[name].status, outcomes[name])
    except KeyboardInterrupt:  # the children got the signal too: they save and end
        for going in running.values():
            going.group[0].terminate()  # again for those that got it; the only word to them where this process alone was signalled
        for name, going in running.items():
            going.group[0].join()
            outcomes[name] = Outcome("interrupted", code=130)
            tell(name, "interrupted", outcomes[name])
    finally:
        for going in running.values():
            _end(going, 0.0)
    return outcomes


def _start(node: Node, processes: Any) -> Going:
    here, there = processes.Pipe(duplex=False)
    meeting = tempfile.mkdtemp(prefix="temper-") if node.ranks > 1 else None
    group = [processes.Process(target=_child, args=(node.run, there, r, node.ranks, meeting), name=node.name) for r in range(node.ranks)]
    for process in group:
        process.start()
    there.close()
    return Going(node, group, here, meeting)


def _end(going: Going, patience: float) -> list[int]:
    """Wait so long, together, for its processes to end; then end them. The exit codes of those that ended by themselves."""
    until, codes = time.monotonic() + patience, []
    for process in going.group:
        process.join(max(0.0, until - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
        else:
            codes.append(process.exitcode)
    if going.meeting:
        shutil.rmtree(going.meeting, ignore_errors=True)
    return codes


def _ended(going: Going) -> Outcome:
    """What came of a node. The rank that failed first says why, unless one was killed, which it could not say."""
    try:
        result = going.here.recv() if going.here.poll() else None
    except EOFError:
        result = None
    codes = _end(going, 10.0)
    killed = min(codes, default=0) < 0
    if result is not None and (result["status"] != "failed" or not (killed or 130 in codes)):
        return Outcome(**result)
    if 130 in codes and not killed:
        return Outcome("interrupted", code=130)
    return Outcome("failed", error=f"its process ended with exit code {min(codes, default=0)}; out of memory?", code=1)


def _end_with_parent(meeting: str | None) -> None:
    """A stage does not go on in the background when `temper run` was killed: the same command would find it writing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if meeting:
            shutil.rmtree(meeting, ignore_errors=True)
        os._exit(1)


def _child(run: Callable[[], dict[str, Any]], there: Connection, rank: int, count: int, meeting: str | None) -> None:
    """One rank's process. All ranks tell of a failure, and the first word counts: when one ends, the others only lose touch with it."""
    threading.Thread(target=_end_with_parent, args=(meeting,), daemon=True).start()
    try:
        if meeting:
            ranks.join(rank, count, f"file://{meeting}/ranks")
        result = run()
        if rank == 0:
            there.send(result)
    except UserError as e:
        there.send({"status": "failed", "error": str(e), "code": e.code})
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception:
        there.send({"status": "failed", "error": traceback.format_exc(), "code": 1})
