"""Training rows: a method of ours beside a trainer of TRL, step by step on the same records."""

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Protocol

from transformers import PrinterCallback, TrainerCallback

from bench.data import SEED, Setup, training_flops
from bench.machine import Peak, Refused, Timed, now
from temper.data.packing import batch_indices
from temper.forest import Tree
from temper.methods.base import Batching
from temper.train import Optim, Step

WARM_UP = 2
FIRST, LATER = 1e-5, 1e-4  # tolerances of losses and gradient norms, relative; before the first update, and after it
BUDGETS = (2048, 4096, 8192)  # tokens per micro-batch that are tried for ours


@dataclass(frozen=True)
class Peer:
    """Settings of a TRL trainer. micro: rows at a time; sort: rows of like length together, within the step; more: the trainer's own."""

    micro: int
    sort: bool = True
    more: dict[str, Any] = field(default_factory=lambda: {"gradient_checkpointing": False, "max_length": None})

    def __str__(self) -> str:
        more = "".join(f", {key}={value}" for key, value in self.more.items())
        return f"float32, per_device_train_batch_size={self.micro}{', rows sorted by length within the step' if self.sort else ''}{more}"


def with_liger(peers: list[Peer], device: str) -> list[Peer]:
    """These, and on a GPU where Liger's kernels are installed the same with them."""
    there = device == "cuda" and find_spec("liger_kernel")
    return peers + ([replace(peer, more={**peer.more, "use_liger_kernel": True}) for peer in peers] if there else [])


class Task(Protocol):
    """A training row. `later`, where it has one: its tolerance after the first update. One that samples has `compare(peer)`, the largest
    difference on one rollout given to both sides, and `flops()` of a step: its timed steps sample on their own."""

    name: str
    optim: Optim
    setup: Setup
    batch: int  # records per step
    trees: list[Tree]
    default: Peer

    @property
    def candidates(self) -> Sequence[Peer]:
        """Among which the peer's best is searched."""

    def model(self) -> Any: ...
    def ours(self, model: Any, batching: Batching) -> Iterator[Step]: ...
    def trainer(self, model: Any, rows: list[int], peer: Peer, common: dict[str, Any], callback: Any) -> Any:
        """A trainer that reads `rows`, indices of records, in that order."""


def batching(task: Task, steps: int, tokens: int | None = None) -> Batching:
    """Settings of ours for so many steps; each reads the records that `records_of` says."""
    more: dict[str, Any] = {} if tokens is None else {"tokens_per_microbatch": tokens}
    return Batching(batch=task.batch, epochs=steps * task.batch / len(task.trees), seed=SEED, **more)


def records_of(task: Task, step: int) -> list[int]:
    return batch_indices(len(task.trees), task.batch, SEED, step)


class InTurn(TrainerCallback):
    """After each step of the trainer, one of ours. What the trainer does between two of its logs is its step."""

    def __init__(self, device: str, ours: Iterator[Step] | None = None, peak: Peak | None = None) -> None:
        self.device, self.steps, self.peak = device, ours, peak
        self.peer: list[Timed] = []
        self.ours: list[Timed] = []
        self.began = 0.0
        self.model: Any = None  # the peer's, as it was trained

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.peak is not None:
            self.peak.start()
        self.began = now(self.device)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return  # the summary after the last step
        self.peer.append(Timed(now(self.device) - self.began, logs["loss"], float(logs["grad_norm"])))
        if self.steps is not None:
            self.ours.append(timed(self.steps, self.device))
        self.began = now(self.device)


def timed(steps: Iterator[Step], device: str) -> Timed:
    """The next step of ours."""
    began = now(device)
    step = next(steps)
    return Timed(now(device) - began, step.metrics["loss"], step.metrics["grad_norm"])


def run_peer(task: Task, peer: Peer, steps: int, ours: Iterator[Step] | None = None, peak: Peak | None = None) -> InTurn:
    """Train for so many steps with TRL; with `ours`, in turn."""
    device = task.setup.device
    model = task.setup.plain(task.model())
    rows = []
    for step in range(steps):
        chosen = records_of(task, step)
        if peer.sort:
            chosen.sort(key=lambda i: sum(len(segment.tokens) for segment in task.trees[i]))
        rows += chosen
    turns = InTurn(device, ours, peak)
    turns.model = model
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "max_steps": steps,
            "seed": SEED,
            "use_cpu": device == "cpu",
            "bf16": False,
            "per_device_train_batch_size": peer.micro,
            "gradient_accumulation_steps": task.batch // peer.micro,
            "learning_rate": task.optim.lr,
            "adam_epsilon": task.optim.eps,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": task.optim.max_grad_norm,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        trainer = task.trainer(model, rows, peer, common | peer.more, turns)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return turns


def agree(ours: Sequence[Timed], peer: Sequence[Timed], later: float = LATER) -> float:
    """The largest relative difference of losses and gradient norms. Raises Refused above FIRST in the first step, `later` after it."""
    for step, (a, b) in enumerate(zip(ours, peer, strict=True), 1):
        for what, x, y in ("loss", a.loss, b.loss), ("gradient norm", a.grad_norm, b.grad_norm):
            if not abs(x - y) <= (FIRST if step == 1 else later) * abs(y):
                raise Refused(f"step {step}: {what} {x:.7g} of ours, {y:.7g} of the peer")
    pairs = [(x, y) for a, b in zip(ours, peer, strict=True) for x, y in ((a.loss, b.loss), (a.grad_norm, b.grad_norm))]
    return max(abs(x - y) / abs(y) for x, y in pairs)


def run_ours(task: Task, steps: int, tokens: int | None = None, peak: Peak | None = None) -> list[Timed]:
    """Train for so many steps with ours alone."""
    running = task.ours(task.model(), batching(task, steps, tokens))
    if peak is not None:
        peak.start()
    return [timed(running, task.setup.device) for _ in range(steps)]


def search(task: Task, say: Any) -> tuple[int, Peer]:
    """(tokens per micro-batch of ours, settings of the peer) that were the fastest of those tried, two steps of each.

    Of ours that are equally fast, to 3%, the least tokens, for they take the least memory.
    """
    mine = {tokens: run_ours(task, 3, tokens) for tokens in BUDGETS}
    for tokens, steps in mine.items():
        say(f"ours, tokens_per_microbatch={tokens}", least(steps))
    theirs = {}
    for i, peer in enumerate(task.candidates):
        try:
            steps = run_peer(task, peer, 3).peer
        except (RuntimeError, ImportError) as problem:  # a peer that cannot run here is not this bench's error
            say(f"{peer}: does not run here ({type(problem).__name__}: {next(iter(str(problem).splitlines()), '')})", None)
            continue
        try:
            same(task, peer, mine[BUDGETS[-1]], steps)
        except Refused as problem:
            say(f"{peer}: not counted, for it computes something else ({problem})", least(steps))
        else:
            theirs[i] = least(steps)
            say(str(peer), theirs[i])
    if not theirs:
        raise Refused("no settings of the peer compute what ours does")
    enough = 1.03 * min(map(least, mine.values()))
    return next(t for t in sorted(mine) if least(mine[t]) <= enough), task.candidates[min(theirs, key=theirs.__getitem__)]


def same(task: Task, peer: Peer, ours: Sequence[Timed], theirs: Sequence[Timed]) -> float:
    """How far apart the sides are: in these steps, or where they sample in those that `compare` makes. Raises Refused."""
    if hasattr(task, "compare"):
        return task.compare(peer)
    return agree(ours, theirs, getattr(task, "later", LATER))


def least(steps: Sequence[Timed]) -> float:
    """Seconds of the fastest step after the first."""
    return min(step.seconds for step in steps[1:])


def side_by_side(task: Task, peer: Peer, tokens: int | None, times: int) -> tuple[list[Timed], list[Timed], float, list[float]]:
    """(ours, the peer's, the largest difference, operations of each step) of `times` steps in turn, after those that warm up."""
    steps = WARM_UP + times
    model = task.model()
    if hasattr(task, "flops"):
        flops = [task.flops()] * times
    else:
        flops = [training_flops(model, [task.trees[i] for i in records_of(task, step)]) for step in range(WARM_UP, steps)]
    turns = run_peer(task, peer, steps, task.ours(model, batching(task, steps, tokens)))
    off = same(task, peer, turns.ours, turns.peer)
    return turns.ours[WARM_UP:], turns.peer[WARM_UP:], off, flops


def check(task: Task) -> float:
    """Two steps of ours beside the peer's first candidate: the largest difference. Raises Refused."""
    peer = task.candidates[0]
    if hasattr(task, "compare"):
        return task.compare(peer)
    turns = run_peer(task, peer, 2, task.ours(task.model(), batching(task, 2)))
    return same(task, peer, turns.ours, turns.peer)


def peak_mb(task: Task, who: str, peer: Peer | None, tokens: int | None) -> float:
    """Peak memory of three steps of one side, above what it held before them; in a process that does nothing else."""
    peak = Peak(task.setup.device)
    if who == "ours":
        run_ours(task, 3, tokens, peak)
    else:
        assert peer is not None
        run_peer(task, peer, 3, peak=peak)
    return peak.mb()


def quiet_peers() -> None:
    """Without the peers' progress bars and notes."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("trl").setLevel(logging.ERROR)
    import datasets
    from transformers.utils import logging as notes

    datasets.disable_progress_bars()
    notes.set_verbosity_error()
    notes.disable_progress_bar()


def twin(model: Any) -> Any:
    """A copy that shares nothing with the model."""
    return copy.deepcopy(model)
