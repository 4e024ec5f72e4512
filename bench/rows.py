"""What a row is, how each is measured, and one side of it in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import training
from bench.data import Setup
from bench.grpo import GRPO, RLOO
from bench.machine import Peak, Refused, can_measure_memory, in_turn, now, ratio
from bench.ppo import PPO
from bench.preference import DPO, KTO, Reward
from bench.rollout import CompiledRollouts, Rollouts
from bench.sft import SFT, LoRA

TRAINING: dict[str, Any] = {task.name: task for task in (SFT, LoRA, DPO, Reward, KTO, GRPO, RLOO)}
CALLS: dict[str, Any] = {task.name: task for task in (Rollouts, CompiledRollouts, PPO)}
NAMES = (*TRAINING, *CALLS)

Say = Callable[[str, float | None], None]  # one setting that was tried, and its seconds


@dataclass(frozen=True)
class Row:
    """Ours beside a peer. ours, peer: median seconds of a step; peaks in MB above what was held before; share of the matrix ceiling."""

    name: str
    model: str
    against: str  # best, default; of rollouts also the best with a static cache
    ratio: float
    ratio_low: float
    ratio_high: float
    ours: float
    peer: float
    unit: str
    ours_peak_mb: float | None
    peer_peak_mb: float | None
    roofline_share: float
    peer_settings: str


def measure(name: str, setup: Setup, times: int, ceiling: float, say: Say) -> Iterator[Row]:
    """The row against the peer at its best, then at its defaults. ceiling: GFLOP/s. Raises Refused where the sides differ."""
    if name in TRAINING:
        yield from _training(name, setup, times, ceiling, say)
    else:
        yield from _calls(name, setup, times, ceiling, say)


def check(name: str, setup: Setup) -> float:
    """How far the sides are apart, on little work. Raises Refused."""
    if name in TRAINING:
        return training.check(TRAINING[name](setup))
    task = CALLS[name](setup)
    return task.compare(task.candidates[0])


def _training(name: str, setup: Setup, times: int, ceiling: float, say: Say) -> Iterator[Row]:
    task = TRAINING[name](setup)
    tokens, best = training.search(task, say)
    for against, peer, budget in ("best", best, tokens), ("default", task.default, None):
        ours, theirs, _, flops = training.side_by_side(task, peer, budget, times if against == "best" else 5)
        of = ratio([t.seconds for t in ours], [t.seconds for t in theirs])
        share = median(f / t.seconds for f, t in zip(flops, ours, strict=True)) / (ceiling * 1e9)
        peaks = alone(task, "ours", peer, budget), alone(task, "peer", peer, budget)
        yield Row(name, setup.name, against, *of, "s per step", *peaks, share, str(peer))


def _calls(name: str, setup: Setup, times: int, ceiling: float, say: Say) -> Iterator[Row]:
    task = CALLS[name](setup)
    task.compare(task.candidates[0])  # which warms both up, too
    seconds: dict[int, float] = {}
    for i, how in enumerate(task.candidates):
        run = task.side("peer", how)
        began = now(setup.device)
        try:
            run()
        except Exception as problem:  # a peer that cannot run here is not this bench's error
            say(f"{how}: does not run here ({type(problem).__name__}: {next(iter(str(problem).splitlines()), '')})", None)
            continue
        seconds[i] = now(setup.device) - began
        say(str(how), seconds[i])
    best = task.candidates[min(seconds, key=seconds.__getitem__)]
    flops = task.flops()
    named = {name: [i for i in seconds if test(task.candidates[i])] for name, test in task.named.items()}
    others = [
        (name, task.candidates[min(found, key=seconds.__getitem__)])
        for name, found in named.items()
        if found and best not in map(task.candidates.__getitem__, found)
    ]
    default = [("default", task.default)] if task.default else []
    for against, how in ("best", best), *others, *default:
        task.compare(how)
        of = ratio(*in_turn(task.side("ours", how), task.side("peer", how), times if against == "best" else 5, setup.device))
        peaks = alone(task, "ours", how, None), alone(task, "peer", how, None)
        share = flops / of.ours / (ceiling * 1e9)
        unit = "s per rollout" if isinstance(task, Rollouts) else "s per step"
        yield Row(name, setup.name, against, *of, unit, *peaks, share, str(how))


def alone(task: Any, who: str, peer: Any, tokens: int | None) -> float | None:
    """Peak memory in MB of one side in a process of its own; None where it cannot be measured."""
    setup = task.setup
    if not can_measure_memory(setup.device):
        return None
    what = {
        "name": task.name,
        "model": setup.name,
        "folder": str(setup.folder),
        "device": setup.device,
        "threads": torch.get_num_threads(),
        "who": who,
        "peer": -1 if peer == task.default else task.candidates.index(peer),
        "tokens": tokens,
    }
    command = [sys.executable, "-m", "bench", "--alone", json.dumps(what)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"{task.name}: {who} alone ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])


def run_alone(what: dict[str, Any]) -> float:
    """In the process that `alone` starts."""
    setup = Setup(what["model"], what["folder"], what["device"])
    task = (TRAINING | CALLS)[what["name"]](setup)
    peer = task.default if what["peer"] < 0 else task.candidates[what["peer"]]
    if what["name"] in TRAINING:
        return training.peak_mb(task, what["who"], peer, what["tokens"])
    run, peak = task.side(what["who"], peer), Peak(setup.device)
    peak.start()
    run()
    return peak.mb()


def scaling(setup: Setup, times: int) -> Iterator[dict[str, Any]]:
    """Ours on one thread and on two, in turn on the same records."""
    before = torch.get_num_threads()
    try:
        for kind in SFT, DPO, Reward:
            task: Any = kind(setup)
            running = {threads: task.ours(task.model(), training.batching(task, times + 1)) for threads in (1, 2)}
            yield {"name": task.name, **_threads(setup, {k: partial(next, steps) for k, steps in running.items()}, times)}
        task = Rollouts(setup)
        model = setup.policy()
        yield {"name": task.name, **_threads(setup, dict.fromkeys((1, 2), lambda: task.ours(model)), times)}
    finally:
        torch.set_num_threads(before)


def _threads(setup: Setup, runs: dict[int, Callable[[], object]], times: int) -> dict[str, Any]:
    def on(threads: int) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(threads)
            return runs[threads]()

        return run

    of = ratio(*reversed(in_turn(on(1), on(2), times, setup.device)))
    return {
        "model": setup.name,
        "threads": 2,
        "ratio": of.ratio,
        "ratio_low": of.low,
        "ratio_high": of.high,
        "one": of.peer,
        "two": of.ours,
    }


def fields(row: Row) -> dict[str, Any]:
    return asdict(row)
