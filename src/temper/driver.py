"""Drives a stage: consumes steps, logs, evaluates, samples, saves, resumes, stops. Floor 6.

The same command after any death goes on from the last whole checkpoint: what was logged after it is dropped and made again,
and the result is the uninterrupted run's to the last bit (same machine, same thread count).
"""

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from temper.runs import Run, load_latest, save_checkpoint, spread_tensors
from temper.train import State, Step, TrainingError, ranks, shard

LINES = 15.0  # seconds between two lines of progress where there is no terminal


class Interrupted(SystemExit):
    """Stopped by SIGINT or SIGTERM after saving; exit code 130."""

    def __init__(self) -> None:
        super().__init__(130)


def drive(
    make_steps: Callable[[State | None], Iterator[Step]],
    run: Run,
    *,
    steps: int,
    finish: Callable[[nn.Module], Any],
    evaluate: Callable[[], Mapping[str, Any]] | None = None,
    evaluate_every: int = 0,
    samples: Callable[[], Iterable[Mapping[str, Any]]] | None = None,
    samples_every: int = 0,
    save_seconds: float = 120.0,
    quiet: bool = False,
    title: str = "",
    command: str = "",
) -> dict:
    """Runs a stage to its end, from wherever it stands, and returns its summary (also in stage.json).

    make_steps(state): the steps after a snapshot, or all of them (None). run: claimed. evaluate() -> numbers and samples() ->
    rows are asked every so many steps and after the last (every = 0: only after the last); they may use random numbers and
    switch the module to eval mode without a trace. save_seconds: time between checkpoints; the last two stay. finish(module):
    writes the artefact, atomically; then the run is done and the checkpoints go. command: shown as the way to go on after an
    interruption.

    Raises Interrupted (exit code 130) after SIGINT or SIGTERM, saved; TrainingError as `fit` does, nothing saved over.
    """
    if run.done:
        run.remove_checkpoints()
        return run.stage["summary"]

    began = time.monotonic()
    state, tally, last = _standing(run, steps, title, quiet)
    before, beside, stopping = tally["seconds"], 0.0, False  # beside: the memory of the other ranks
    saved_at = time.monotonic()
    module: nn.Module | None = None
    final: dict[str, float] = next((row for row in reversed(run.rows("metrics")) if "eval" not in row), {})

    def save(step: Step) -> None:
        nonlocal saved_at
        tally["seconds"] = before + time.monotonic() - began
        tally["peak_mb"] = max(tally["peak_mb"], _peak_mb())
        state = {"fit": step.snapshot(), "tally": dict(tally)}
        if step.gather:
            ranks.order("save")
        save_checkpoint(run.checkpoints, step.n, state, spread=shard.write)
        saved_at = time.monotonic()

    ranks.led(state)
    with _signals() as stop, progress(title, steps, last, quiet) as show:
        run.set_status(phase="train", now=True, step=last, steps=steps)
        iterator = iter(make_steps(state))
        del state
        try:
            for step in iterator:
                last, module = step.n, step.module
                at_end = last >= steps
                if step.metrics:  # none: a finished run whose artefact was not yet written
                    final = _record(run, step, tally, quiet)
                    looks = evaluate if at_end or _due(last, evaluate_every) else None
                    texts = samples if at_end or _due(last, samples_every) else None
                    if step.gather and (looks or texts or at_end):
                        ranks.order("gather")
                        step.gather()
                    if looks:
                        run.set_status(phase="evaluate", now=True, step=last, steps=steps)
                    _look(run, step, looks, texts)
                    stopping = stop()  # asked once: a signal after this is for the next step
                    if at_end or stopping or time.monotonic() - saved_at >= save_seconds:
                        save(step)
                eta = show(last, step.metrics)
                run.set_status(phase="train", step=last, steps=steps, eta=eta, seconds=before + time.monotonic() - began)
                ranks.order("stop" if stopping or at_end else "next")
                if stopping or at_end:
                    beside = peak_mb() - _peak_mb()
                if stopping and not at_end:
                    run.set_status(phase="interrupted", now=True, step=last, steps=steps)
                    run.event("interrupted", after=last)
                    break
                if at_end:
                    break
        except TrainingError as error:
            run.event("stopped", after=last, what=str(error))
            run.set_status(phase="failed", now=True, step=last, steps=steps, what=str(error))
            raise
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
        if last < steps and stopping:
            how = f"the same command goes on{': ' + command if command else ''}"
            show(None, {})
            print(f"stopped after step {last} of {steps}, saved in {run.checkpoints}; {how}", file=sys.stderr)
            raise Interrupted
        if module is None or last < steps:
            raise RuntimeError(f"{run.folder}: the steps ended after {last} of {steps}")
        run.set_status(phase="finish", now=True, step=last, steps=steps)
        with _untouched(module):
            finish(module)
        stopping = stop()

    tally["seconds"] = before + time.monotonic() - began
    tally["peak_mb"] = max(tally["peak_mb"], _peak_mb()) + beside
    summary = _summary(tally, last, final)
    run.finish(summary)
    run.remove_checkpoints()
    if stopping:
        print(f"stopped; {run.folder} is done", file=sys.stderr)
        raise Interrupted
    return summary


def _standing(run: Run, steps: int, title: str, quiet: bool) -> tuple[State | None, dict[str, Any], int]:
    """From where a run goes on: the newest whole snapshot (None: from the start), what was counted up to it, its step. Later rows go."""
    tally: dict[str, Any] = {"seconds": 0.0, "tokens": 0.0, "tokens_learned": 0.0, "skipped": 0, "peak_mb": 0.0, "resumed": 0}
    step, saved, events = load_latest(run.checkpoints)
    for event in events:
        run.event(**event)
        _say(f"{event['checkpoint']} is damaged ({event['what']}); using the one before it", quiet)
    if saved is not None:
        tally |= saved["tally"]
        tally["resumed"] += 1
        _say(f"{title or run.folder}: going on after step {step} of {steps}", quiet)
    elif run.rows("metrics"):
        _say(f"{title or run.folder}: no whole checkpoint; starting at step 1", quiet)
    run.truncate_after(step)
    if run.rows("metrics") or saved is not None or events:
        run.event("resumed", after=step)
    return saved and saved["fit"], tally, step


def _record(run: Run, step: Step, tally: dict[str, Any], quiet: bool) -> dict[str, float]:
    """Writes down what a step says of itself, and counts it; its row of metrics."""
    row = {"step": step.n, **step.metrics}
    run.log("metrics", row)
    for name in "tokens", "tokens_learned", "skipped":
        tally[name] += step.metrics.get(name, 0)
    for event in step.events:
        run.event(**event, step=step.n)
        if "note" in event:
            _say(f"step {step.n}: {event['event']}: {event['note']}", quiet)
    return row


def _look(
    run: Run, step: Step, evaluate: Callable[[], Mapping[str, Any]] | None, samples: Callable[[], Iterable[Mapping[str, Any]]] | None
) -> None:
    """Writes down what the model does after a step, as far as it is asked for."""
    if evaluate:
        with _untouched(step.module):
            found = dict(evaluate())
        run.log("metrics", {"step": step.n, "eval": found})
    if samples:
        with _untouched(step.module):
            for row in samples():
                run.log("samples", {"step": step.n, **row})


def _summary(tally: Mapping[str, Any], steps: int, final: Mapping[str, float]) -> dict[str, Any]:
    """What stage.json says of a run that is done. final: the last row of its metrics."""
    summary = {
        "steps": steps,
        "seconds": round(tally["seconds"], 3),
        "tokens": int(tally["tokens"]),
        "tokens_learned": int(tally["tokens_learned"]),
        "tokens_per_second": round(tally["tokens"] / tally["seconds"], 1),
        "peak_mb": round(tally["peak_mb"], 1),
        "skipped": int(tally["skipped"]),
        "resumed": tally["resumed"],
        "last": {name: value for name, value in final.items() if name != "step"},
    }
    if torch.cuda.is_available():
        summary["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return summary


def make(
    job_make: Callable[[Path, Callable[[int, int], None]], int], artefact: Path, run: Run, *, title: str = "", quiet: bool = False
) -> dict:
    """Has a stage that trains nothing made, with progress; returns its summary (also in stage.json).

    job_make(artefact, told) returns how many tokens it sampled.
    """
    began = time.monotonic()
    run.set_status(phase="collect", now=True)
    with progress(title, 0, 0, quiet) as show:

        def told(done: int, of: int) -> None:
            run.set_status(phase="collect", step=done, steps=of, eta=show(done, {}, of))

        tokens = job_make(artefact, told)
    seconds = time.monotonic() - began
    summary = {
        "steps": 0,
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_mb": round(peak_mb(), 1),
    }
    run.finish(summary)
    return summary


def follow(make_steps: Callable[[State | None], Iterator[Step]]) -> None:
    """What the other ranks do while the leader drives: the same steps from the same state, until it says that it is enough."""
    with _signals():  # the leader decides
        for step in make_steps(ranks.led()):
            for what in ranks.orders():
                if what == "gather" and step.gather:
                    step.gather()
                elif what == "save":
                    shard.write(spread_tensors(step.snapshot()))
            if what == "stop":
                peak_mb()
                break


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Train/eval modes after are as before. (Random states need no care: every step begins with its own.)"""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM ask for a stop after the step; a second SIGINT stops at once. Gives: was a stop asked for?"""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, _: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def peak_mb() -> float:
    """Largest resident sizes of a stage's processes so far, summed over its ranks, in MB. All ranks call it together."""
    return sum(ranks.gather(_peak_mb()))


def _peak_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr)


def _numbers(metrics: Mapping[str, float]) -> str:
    shown = [f"loss {metrics['loss']:.4g}"] if "loss" in metrics else []
    return "  ".join(shown + ([f"{metrics['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in metrics else []))


@contextmanager
def progress(title: str, steps: int, done: int, quiet: bool) -> Iterator[Callable[..., float | None]]:
    """A bar on a terminal, now and then a line elsewhere, nothing when quiet. Gives show(step, metrics, of=steps) -> seconds left."""
    began, told = time.monotonic(), time.monotonic()
    bar = None
    if not quiet and sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True), transient=False)
        bar.start()
        task = bar.add_task(title or "train", total=steps, completed=done, numbers="")

    def show(step: int | None, metrics: Mapping[str, float], of: int = steps) -> float | None:
        nonlocal told
        if step is None:
            if bar:
                bar.stop()
            return None
        eta = (time.monotonic() - began) / max(1, step - done) * (of - step)
        if bar:
            bar.update(task, completed=step, total=of, numbers=_numbers(metrics))
        elif not quiet and (step == of or time.monotonic() - told >= LINES):
            told = time.monotonic()
            left = f"  {int(eta // 60)}:{int(eta % 60):02d} left" if step < of else ""
            print(f"{title or 'train'} {step}/{of}  {_numbers(metrics)}{left}", file=sys.stderr)
        return eta

    try:
        yield show
    finally:
        if bar:
            bar.stop()
