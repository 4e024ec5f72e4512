"""What the methods share: the job that a driver runs, offline batches, the settings of data and length. Floor 5."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from temper.config import Settings, opt
from temper.data import sources
from temper.data.packing import batch_indices, pack
from temper.data.sources import Kind, read
from temper.data.split import split
from temper.data.trees import Report
from temper.forest import Forest, Tree, plant
from temper.records import Message, Record
from temper.train import Compute, Loss, Optim, State, Step, fit, ranks

Weigh = Callable[[Sequence[Tree]], dict[str, float]]  # the weights of a forest's items, by name


class Window(Settings):
    """What happens to rows that are long or broken."""

    max_length: int | None = opt(None, "tokens a row may have; default: the model's window", ge=2)
    too_long: Literal["error", "drop", "cut-prompt"] = opt("error", "what to do with a longer row; the answer's end is never cut")
    skip_bad: bool = opt(False, "leave out rows that cannot be read, and list them")


class Batching(Settings):
    """How records become optimiser steps."""

    batch: int = opt(32, "records per optimiser step", ge=1)
    epochs: float = opt(1.0, "passes over the records", gt=0)
    tokens_per_microbatch: int = opt(8192, "tokens computed at a time; the result does not depend on it", ge=1)
    seed: int = opt(0, "of the order of the records and of everything random", ge=0)

    def rows(self, records: int) -> int:
        """Records in each step: no record stands in a step twice."""
        return min(self.batch, records)

    def steps(self, records: int) -> int:
        """Optimiser steps in all: as many as read `epochs` times each record; the last one reads on into the next pass."""
        return max(1, ceil(records * self.epochs / max(1, self.rows(records)) - 1e-9))


class Split(Settings):
    """What is kept out of training to be measured on."""

    held_out: float = opt(0.05, "share of the records kept out of training and reported", ge=0, lt=1)


class Corpus(NamedTuple):
    """Records and what was made of them: one tree for each that is not in `kept.dropped`, in order; of documents, their windows; of a
    prompt, its tokens alone.
    """

    records: Sequence[Record]
    trees: Sequence[Tree]
    read: sources.Report
    kept: Report


@dataclass
class Prepared:
    """What the checks before the first step look at."""

    corpus: Corpus
    tokenizer: Any
    module: torch.nn.Module  # what is trained
    loss: Callable[[Any, Forest], Loss] | None = None
    weigh: Weigh | None = None
    check: Callable[[Any, Sequence[Forest]], None] | None = None  # policy equals reference; raises AssertionError
    answered: Callable[[Tree], Tree] | None = None  # a prompt with as long an answer as may be sampled, as it will be learned from


@dataclass
class Job:
    """One run of a method, ready to go. A driver pulls `steps`, evaluates, saves and stops as it likes."""

    total: int = 0
    steps: Callable[[State | None], Iterator[Step]] = lambda resume: iter(())
    save: Callable[[Path], str | None] = lambda path: None  # writes the trained artefact, atomically; what was checked of it, in words
    make: Callable[[Path, Callable[[int, int], None]], None] | None = None  # instead of steps, where nothing is trained; told(done, of)
    card: dict[str, Any] = field(default_factory=dict)  # records, tokens, what was dropped and why
    evaluate: Callable[[], dict[str, float]] | None = None  # on the held-out records
    policy: Any = None  # (model, tokenizer) that can be asked, where there is one
    asks: Sequence[list[Message]] = ()  # a few prompts whose answers are written down along the way
    artefact: str = "model"  # the file or folder that `save` writes
    notes: Sequence[str] = ()  # said to the user before the first step
    prepared: Prepared | None = None  # what is looked at before the first step; forgotten then


class Given(NamedTuple):
    """Records as trees: those to learn from, those to be measured on, and what the run's card says of both."""

    trees: list[Tree]
    tests: list[Tree]
    out: list[Any]  # the records kept out of training
    tested: list[Any]  # those of them that `tests` were written from
    card: dict[str, Any]
    corpus: Corpus  # those that are learned from


def given(settings: Any, kind: Kind, write: Callable[[Sequence[Any]], tuple[list[Tree], Report]]) -> Given:
    """Read `settings.data`, keep some records out of training, and write the trees of either part."""
    records, report = read(settings.data, kind, skip_bad=settings.window.skip_bad)
    kept, out = split(records, settings.split.held_out, settings.batching.seed)
    (trees, cut), (tests, test_cut) = write(kept), write(out)
    card = {
        "source": report.summary(),
        "held_out": len(tests),
        "tokens": sum(len(s.tokens) for t in trees for s in t),
        "kept": cut.summary(),
        "kept_held_out": test_cut.summary() if out else "",
    }
    return Given(
        trees, tests, out, [record for i, record in enumerate(out) if i not in test_cut.dropped], card, Corpus(kept, trees, report, cut)
    )


def learn(
    model: Any, trees: Sequence[Tree], loss: Any, b: Batching, optim: Optim, resume: State | None, how: Compute, weigh: Weigh | None = None
) -> Iterator[Step]:
    """`fit` on all trees, in batches and for epochs."""
    steps = b.steps(len(trees))
    return fit(model, offline(trees, b, weigh), loss, steps=steps, optim=optim, seed=b.seed, resume=resume, compute=how)


def offline(trees: Sequence[Tree], batching: Batching, weigh: Weigh | None = None) -> Callable[[int], list[Forest]]:
    """The source of an offline method: step -> this rank's micro-batches, a pure function of (records, seed, step)."""

    def source(step: int) -> list[Forest]:
        rows = batch_indices(len(trees), batching.rows(len(trees)), batching.seed, step)
        return microbatches([trees[row] for row in rows], batching.tokens_per_microbatch, weigh)

    return source


def microbatches(trees: Sequence[Tree], budget: int, weigh: Weigh | None = None) -> list[Forest]:
    """This rank's share of one step's trees, packed into forests of at most `budget` tokens."""
    sizes = [sum(len(s.tokens) for s in tree) for tree in trees]
    mine = ranks.share(sizes)
    groups = pack([sizes[i] for i in mine], budget)
    return [plant(picked, weigh(picked) if weigh else None) for group in groups for picked in [[trees[mine[g]] for g in group]]]


def forests(
    trees: Sequence[Tree],
    microbatch: int,
    weigh: Weigh | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[list[int], Forest]]:
    """All trees once, packed: (their indices, the forest on `device`). For reference log-probs, scores and held-out losses."""
    for group in pack([sum(len(s.tokens) for s in tree) for tree in trees], microbatch):
        picked = [trees[i] for i in group]
        yield list(group), plant(picked, weigh(picked) if weigh else None).to(device)


def numbered(steps: Iterator[Step], phase: int, offset: int) -> Iterator[Step]:
    """Steps of one phase (from 1) as steps of the whole: numbered on, with a snapshot that says which phase it is of."""

    def snapshot_of(step: Step) -> Callable[[], State]:
        return lambda: {"phase": phase, "state": step.snapshot()}

    for step in steps:
        metrics = {**step.metrics, "phase": phase} if step.metrics else {}  # none: a step taken before, which only shows its module
        yield step._replace(n=step.n + offset, metrics=metrics, snapshot=snapshot_of(step))
