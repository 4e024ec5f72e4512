"""What the methods share: the job that a driver runs, offline batches, the settings of data and length. Floor 5."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from temper.config import Settings, opt
from temper.data.packing import Order, pack
from temper.data.sharing import shared
from temper.data.sources import Kind, stream
from temper.data.sources import Report as Read
from temper.data.split import held_out
from temper.data.store import Make, Records, Rows, Store, Trees, kept, parts, sizes_of
from temper.data.template import written
from temper.data.trees import Report, limit_of, prompt_chunk
from temper.forest import Forest, Tree, plant
from temper.records import Message, Prompt, Record
from temper.runs import Run, atomic_write
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
    together: bool = opt(False, "records that open with the same question follow each other, so that steps compute what they share once")
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
    read: Read
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
    whole: Corpus | None = None  # all of it, where `corpus` is a part


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


TOKENS = ".tokens"  # where runs beside each other keep what they tokenised
LOOKED = 10_000  # records of each set that are looked at before the first step, of sets that are kept on disk
LEFT_OUT = "left_out.jsonl"  # every row that was skipped, dropped or cut, and why


class Given(NamedTuple):
    """Records as trees on disk: those to learn from, those to be measured on, and what the run's card says of both."""

    trees: Trees
    tests: Trees
    out: list[Any]  # a few of the records kept out of training
    records: tuple[int, int]  # how many there are to learn from, and how many are kept out
    card: dict[str, Any]
    corpus: Corpus  # those that are learned from, of each set at most LOOKED
    whole: Corpus | None  # all of them, where that is a part


class Way(NamedTuple):
    """How a method makes trees of records: a `Make`, and all that it depends on beside the code of `data`."""

    make: Make
    by: Sequence[Any]
    max_length: int | None
    skip_bad: bool


def way(make: Callable[..., Any], tokenizer: Any, model: Any, window: Window, **more: Any) -> Way:
    """Of functions like `trees.chat_chunk`. Raises UserError where --max-length is more than the model's window."""
    context = getattr(model.config, "max_position_embeddings", None)
    limit_of(context, window.max_length)
    by = [make.__name__, written(tokenizer), context, window.model_dump(), more]
    return Way(partial(make, tokenizer=tokenizer, model=context, window=window, **more), by, window.max_length, window.skip_bad)


def stores_of(spec: str, kind: Kind, how: Way, run: Run, *, every: bool = False) -> list[Store]:
    """Each data set of a spec, tokenised once into `.tokens` beside the run. every: with all records."""
    given: dict[str, Any] = {"by": how.by, "skip_bad": how.skip_bad, "given": how.max_length is not None, "every": every}
    with ranks.leader_first():
        return [kept(run.folder.parent / TOKENS, one, kind, how.make, **given) for one in parts(spec)]


def given(settings: Any, run: Run, kind: Kind, how: Way, *, every: bool = False) -> Given:
    """Read `settings.data`, keep some records out of training, and give the trees of either part; sets may be larger than the memory."""
    weights, b = parts(settings.data), settings.batching
    stores = stores_of(settings.data, kind, how, run, every=every)
    masks = held_out_of([s.arrays["keys"] for s in stores], settings.split.held_out, b.seed)
    halves: list[list[tuple[Store, np.ndarray]]] = [[], []]
    reports, groups, out = [], [], []
    for store, mask in zip(stores, masks, strict=True):
        records = store.arrays["records"]
        of = [np.flatnonzero(mask[records] == test) for test in (False, True)]
        for half, rows in zip(halves, of, strict=True):
            half.append((store, rows))
        reports.append([_part(store, rows, mask == test) for test, rows in enumerate(of)])
        reports[-1][0].settle(how.max_length is not None)
        if b.together:
            groups.append(_groups(store.arrays["keys"][records[of[0]]]))
        out += [r for r, test in zip(store.sample(), mask, strict=False) if test]
    trees, tests = Trees(halves[0], list(weights.values()), groups or None), Trees(halves[1], [1.0] * len(stores), mixed=False)
    reads = [s.read for s in stores]
    held = sum(int(mask.sum()) for mask in masks)
    card = {
        "source": " | ".join(report.summary() for report in reads),
        "mixture": mixture(settings.data, trees),
        "held_out": len(tests),
        "kept": " | ".join(train.summary() for train, _ in reports),
        "kept_held_out": " | ".join(test.summary() for _, test in reports) if settings.split.held_out else "",
        "left_out": list_left_out(run, left_out(reads, [part for pair in reports for part in pair])),
        "tokens": trees.count("sizes"),
        "learned_tokens": trees.count("learned"),
    }
    looked = _looked_at(settings.data, kind, how.skip_bad, stores, masks, trees)
    return Given(trees, tests, out, (sum(map(len, masks)) - held, held), card, *looked)


class Asked(NamedTuple):
    """Prompts that fit, as a model is given them; read when they are asked for. order: which comes when, see `packing.Order`."""

    records: Sequence[Prompt]
    ids: Sequence[list[int]]
    order: Order
    card: dict[str, Any]
    corpus: Corpus
    left: list[dict[str, str]]  # the rows that were left out or cut

    def every(self) -> tuple[list[Prompt], list[list[int]]]:
        """All of them, once; of a mixture as many as it gives without repeats. In memory."""
        rows = range(len(self.ids)) if self.order.n == len(self.ids) else sorted(self.order.rows(self.order.n, 0))
        return [self.records[i] for i in rows], [self.ids[i] for i in rows]


class _Ids(Sequence[list[int]]):
    """The tokens of prompts."""

    def __init__(self, trees: Trees) -> None:
        self.trees = trees

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, i: Any) -> Any:
        return self.trees[i][0].tokens if isinstance(i, int) else [tree[0].tokens for tree in self.trees[i]]


class Whole(NamedTuple):
    """All trees of a spec, as far as its weights let them be learned; left: the rows that were left out or cut."""

    trees: Trees
    stores: list[Store]
    card: dict[str, Any]
    left: list[dict[str, str]]


def whole_of(spec: str, kind: Kind, how: Way, run: Run, *, every: bool = False) -> Whole:
    """What a spec names, with nothing kept out. every: with all records."""
    stores = stores_of(spec, kind, how, run, every=every)
    trees = Trees([(s, np.arange(len(s))) for s in stores], list(parts(spec).values()))
    card = {"source": " | ".join(s.read.summary() for s in stores), "kept": " | ".join(s.report.summary() for s in stores)}
    mixed = {"mixture": mixture(spec, trees)} if len(stores) > 1 else {}
    return Whole(trees, stores, card | mixed, left_out([s.read for s in stores], [s.report for s in stores]))


def asked(spec: str, run: Run, tokenizer: Any, model: Any, window: Window, *, room: int, seed: int = 0) -> Asked:
    """Prompts that leave `room` tokens for an answer. The rows that do not are listed in the run. Raises UserError as reading does."""
    trees, stores, card, left = whole_of(spec, "prompts", way(prompt_chunk, tokenizer, model, window, room=room), run, every=True)
    card |= {"prompts": len(trees), "left_out": list_left_out(run, left)}
    records = Records([(s, np.arange(s.report.rows)) for s in stores])
    corpus = Corpus(records, trees, _read(spec, [s.read for s in stores]), _joined([s.report for s in stores]))
    return Asked(trees.records(), _Ids(trees), Order(trees.have, trees.take, seed), card, corpus, left)


def mixture(spec: str, trees: Trees) -> str:
    """How many rows of each data set an epoch reads; "" where there is only one."""
    each = [f"{take} of {have} rows of {one}" for one, have, take in zip(parts(spec), trees.have, trees.take, strict=True)]
    return f"an epoch: {', '.join(each)}" if len(each) > 1 else ""


def left_out(reads: Sequence[Read], reports: Sequence[Report]) -> list[dict[str, str]]:
    """Every row that was skipped, dropped or cut, and why."""
    rows = [{"at": at, "what": "skipped", "why": why} for read in reads for at, why in read.skipped]
    for part in reports:
        rows += [{"what": what, "why": why} for what, texts in (("dropped", part.dropped), ("cut", part.cut)) for why in texts.values()]
    return rows


def list_left_out(run: Run, rows: Sequence[dict[str, str]]) -> str:
    """List such rows in a file of the run; what the card says of them."""
    if run.stage and rows and ranks.rank() == 0:  # checks prepare a run that is never claimed
        atomic_write(run.file(LEFT_OUT), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return f"{len(rows)} rows, listed in {LEFT_OUT}" if rows else ""


def _looked_at(
    data: str, kind: Kind, skip_bad: bool, stores: Sequence[Store], masks: Sequence[np.ndarray], learned: Trees
) -> tuple[Corpus, Corpus | None]:
    """The records that are learned from, of each set the first ones and then all; read when they are looked at."""

    def corpus(most: int | None) -> Corpus:
        uses = [~mask[:most] for mask in masks]

        def records() -> Iterator[Record]:
            for spec, use in zip(parts(data), uses, strict=True):
                yield from (r for used, r in zip(use, stream(spec, kind, Read(spec), skip_bad), strict=False) if used)

        rows, reports = [], []
        for store, use in zip(stores, uses, strict=True):
            of = store.arrays["records"]
            first = np.arange(np.searchsorted(of, len(use)))
            rows.append(first[use[of[first]]])
            reports.append(_part(store, rows[-1], use))
        begins = np.cumsum([0, *learned.have])
        at = [begin + np.arange(len(own)) for begin, own in zip(begins, rows, strict=False)]
        trees = Trees([(learned, np.concatenate(at))], [1.0])  # with whatever labels it is given
        kept_ = _joined([_renumbered(report, use) for report, use in zip(reports, uses, strict=True)])
        return Corpus(Rows(kept_.rows, records), trees, _read(data, [s.read for s in stores]), kept_)

    return corpus(LOOKED), corpus(None) if max(map(len, masks)) > LOOKED else None


def _read(data: str, found: Sequence[Read]) -> Read:
    """What became of the rows of several sets."""
    return found[0] if len(found) == 1 else Read(data, skipped=[row for report in found for row in report.skipped])


BY_ROW = ("dropped", "cut", "long")  # what a report says by number of the record


def _renumbered(report: Report, mask: np.ndarray) -> Report:
    """With the records numbered among those that the mask names."""
    place = np.cumsum(mask) - 1
    moved: dict[str, Any] = {name: {int(place[i]): x for i, x in getattr(report, name).items()} for name in BY_ROW}
    return replace(report, **moved)


def _joined(reports: Sequence[Report]) -> Report:
    """Reports on records that stand one after the other, as one."""
    whole = Report()
    for part in reports:
        whole.add(part)
    return whole


def _part(store: Store, rows: np.ndarray, mask: np.ndarray) -> Report:
    """The report on the records of a store that the mask names, whose trees are `rows`."""
    tokens, unshared = (int(x.sum(dtype=np.int64)) for x in (store.sizes(rows), store.arrays["unshared"][rows]))
    own: dict[str, Any] = {name: {i: x for i, x in getattr(store.report, name).items() if i < len(mask) and mask[i]} for name in BY_ROW}
    return replace(store.report, rows=int(mask.sum()), tokens=tokens, tokens_unshared=unshared, **own)


def held_out_of(keys: Sequence[np.ndarray], share: float, seed: int) -> list[np.ndarray]:
    """Of each data set which records are kept out of training: chosen together, so that no opening stands on both sides."""
    return np.split(held_out(np.concatenate(keys), share, seed), np.cumsum([len(k) for k in keys])[:-1])


def _groups(keys: np.ndarray) -> np.ndarray:
    return np.unique(keys, return_inverse=True)[1]


def epoch(trees: Sequence[Tree]) -> int:
    """How many records an epoch reads: all, or of a mixture as many as it gives without repeats."""
    return sum(getattr(trees, "take", (len(trees),)))


def learn(
    model: Any,
    trees: Sequence[Tree],
    loss: Any,
    b: Batching,
    optim: Optim,
    resume: State | None,
    how: Compute,
    weigh: Weigh | None = None,
    join: bool = False,
) -> Iterator[Step]:
    """`fit` on all trees, in batches and for epochs. join: as `offline` takes it; always so where tokens are what is weighed."""
    source = offline(trees, b, weigh, join=(join or weigh is None) and not how.fit_memory)  # what is joined cannot be divided to fit
    return fit(model, source, loss, steps=b.steps(epoch(trees)), optim=optim, seed=b.seed, resume=resume, compute=how)


def offline(trees: Sequence[Tree], batching: Batching, weigh: Weigh | None = None, *, join: bool = False) -> Callable[[int], list[Forest]]:
    """The source of an offline method: step -> this rank's micro-batches, a pure function of (records, seed, step).

    join: records of a step that begin alike become one tree (`data.sharing`); `weigh` must count what they hold, not the trees.
    """
    rows = rows_of(trees, batching)

    def source(step: int) -> list[Forest]:
        chosen = [trees[row] for row in rows(step)]
        if join:
            chosen = shared(chosen, batching.tokens_per_microbatch)
        return microbatches(chosen, batching.tokens_per_microbatch, weigh)

    return source


def rows_of(trees: Sequence[Tree], batching: Batching) -> Callable[[int], list[int]]:
    """step -> which trees it learns from, on all ranks together."""
    have = getattr(trees, "have", (len(trees),))
    order = Order(have, getattr(trees, "take", None), batching.seed, getattr(trees, "together", None))
    return lambda step: order.rows(batching.rows(order.n), step)


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
    for group in pack(sizes_of(trees), microbatch):
        picked = [trees[i] for i in group]
        yield list(group), plant(picked, weigh(picked) if weigh else None).to(device)


def numbered(steps: Iterator[Step], phase: int, offset: int) -> Iterator[Step]:
    """Steps of one phase (from 1) as steps of the whole: numbered on, with a snapshot that says which phase it is of."""

    def snapshot_of(step: Step) -> Callable[[], State]:
        return lambda: {"phase": phase, "state": step.snapshot()}

    for step in steps:
        metrics = {**step.metrics, "phase": phase} if step.metrics else {}  # none: a step taken before, which only shows its module
        yield step._replace(n=step.n + offset, metrics=metrics, snapshot=snapshot_of(step))
