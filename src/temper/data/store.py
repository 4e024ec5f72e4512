"""Tokenised data on disk: made once, kept by the content of all that it depends on, read row by row. Floor 2.

So a set may be larger than the memory, and a run that starts again, or another on the same data, need not tokenise it. A store is a
folder of plain arrays and a report; what is read of a row is its part of the file of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import operator
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch

from temper.config import UserError
from temper.data import ahead, hub, sources
from temper.data.packing import counts, epoch_order
from temper.data.sharing import size, unshared
from temper.data.sources import Kind, _files
from temper.data.sources import Report as Read
from temper.data.split import key
from temper.data.trees import Report
from temper.forest import Segment, Tree
from temper.runs import ASIDE, code_version, disk, fingerprint, fsync
from temper.world.streams import VERSION

WORLD = "temper.world.datasets"  # the module that decides what `world:` gives
CODE = ("temper.data.trees", "temper.data.sources", "temper.data.store")  # the modules that decide what a store holds
LINES, SAMPLE = "records.jsonl", 512  # the file of the records that are kept as they are; how many where not all are
LEARNED = 1 << 31  # the bit of a token that is learned
ARRAYS = {
    "tokens": "<u4", "segments": "<i8", "parents": "<i4", "trees": "<i8", "records": "<i8", "learned": "<u4", "unshared": "<i8",
    "keys": "<u8", "lines": "<i8",
}  # fmt: skip
LABEL, FLOAT = "label.", "<f8"  # what files of labels are called, and what they hold: of each segment a number, or none (NaN)
_PART = re.compile(r"(.+)=([0-9]*\.?[0-9]+)")

Make = Callable[[Sequence[Any]], tuple[list[tuple[int, Tree]], Report]]  # records -> (number, tree) of each


def parts(spec: str) -> dict[str, float]:
    """The data sets that a spec names, with their weights: `a.jsonl=0.7,b.jsonl=0.3` is two of them, most specs are one.

    Raises UserError for one that comes twice, or has no weight.
    """
    found = [_PART.fullmatch(part.strip()) for part in spec.split(",")]
    if len(found) < 2 or Path(spec).exists() or not any(found):
        return {spec: 1.0}
    if not all(found):
        raise UserError(f"{spec}: each data set of a mixture needs its weight, as in a.jsonl=0.7,b.jsonl=0.3")
    weights = {m[1].strip(): float(m[2]) for m in found if m}
    if len(weights) < len(found) or not all(weights.values()):
        raise UserError(f"{spec}: each data set of a mixture is named once, with a weight of more than 0")
    return weights


def mixed(spec: str, kind: Kind, skip_bad: bool, seed: int) -> sources.Records:
    """`sources.read` of a spec that may name several data sets: then as many records of each as their weights give without repeats."""
    weights = parts(spec)
    found = {name: sources.read(name, kind, skip_bad) for name in weights}
    if len(found) == 1:
        return found[spec]
    take = counts(weights, {name: len(each.records) for name, each in found.items()}, None)
    chosen = {name: sorted(epoch_order(len(each.records), seed, 0)[: take[name]].tolist()) for name, each in found.items()}
    report = Read(spec, "a mixture", ", ".join(f"{take[name]} of {len(each.records)} records of {name}" for name, each in found.items()))
    for _, part in found.values():
        report.rows += part.rows
        report.skipped += part.skipped
        report.conversions.update(part.conversions)
    report.used = sum(take.values())
    return sources.Records([each.records[i] for name, each in found.items() for i in chosen[name]], report)


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    return fingerprint(path)


def content(spec: str) -> str:
    """By the content of what is read: the rows' files; of the embedded world its version, its code and the request; of the hub what its
    library says. What is not there counts as its name.
    """
    if len(several := parts(spec)) > 1:
        return fingerprint({name: [content(name), weight] for name, weight in several.items()})
    if spec.startswith("world:"):
        return fingerprint([VERSION, code_version(WORLD), spec])
    if not Path(spec).exists():
        return spec
    return fingerprint([_digest(p, p.stat().st_size, p.stat().st_mtime_ns) for p in _files(spec)])


# ---------------------------------------------------------------- writing


@dataclass
class Encoded(sources.Made):
    """What a piece gave, as trees. records: as lines, where they are kept. labels: of each segment, by name."""

    arrays: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    report: Report


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _encode(make: Make, every: bool, numbered: tuple[int, sources.Piece]) -> Encoded:
    """A piece of a data set as arrays: tokens with their bit, lengths of segments, their parents, segments of each tree, ..."""
    number, piece = numbered
    made = sources.make(piece)
    found, report = make(made.records)
    segments = [s for _, tree in found for s in tree]
    targets = [np.zeros(len(s.tokens), np.float32) if s.target is None else np.array(s.target, np.float32) for s in segments]
    target = np.concatenate([np.zeros(0, np.float32), *targets])
    if ((target != 0) & (target != 1)).any() or any(s.columns for s in segments):
        raise ValueError("a store holds tokens that are learned or not, without columns")
    sizes, trees = np.array([len(x) for x in targets], np.int64), np.array([len(tree) for _, tree in found], np.int64)
    ids = np.concatenate([np.zeros(0, np.uint32), *(np.array(s.tokens, np.uint32) for s in segments)])
    arrays = {
        "tokens": ids | (target.astype(np.uint32) << np.uint32(31)),
        "segments": sizes,
        "parents": np.array([s.parent for s in segments], np.int32),
        "trees": trees,
        "records": np.array([i for i, _ in found], np.int64),
        "learned": np.diff(_ends(target)[_ends(sizes)[_ends(trees)]]),
        "unshared": np.array([unshared(tree) for _, tree in found], np.int64),
        "keys": np.fromiter(map(key, made.records), np.uint64, len(made.records)),
    }
    names = dict.fromkeys(name for s in segments for name in s.labels)
    labels = {LABEL + name: np.array([s.labels.get(name, np.nan) for s in segments]) for name in names}
    lines = [f"{r.model_dump_json()}\n".encode() for r in made.records] if every or number < ahead.ALONE else []
    return Encoded(**{**vars(made), "records": lines}, arrays=arrays, labels=labels, report=report)


def _write(folder: Path, found: Iterable[Encoded], kind: Kind, read: Read, given: bool, keep: int | None) -> None:
    """keep: how many records are kept as they are; None: all."""
    report, told, ends, lines = Report(), time.monotonic(), {"segments": 0, "trees": 0, "lines": 0}, 0
    labels: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in (*ARRAYS, LINES)}
        for name in ends:
            files[name].write(np.zeros(1, ARRAYS[name]).tobytes())
        before = 0  # segments
        for one in found:
            arrays, n = one.arrays, len(one.arrays["parents"])
            arrays["records"] += report.rows
            report.add(one.report)
            said = one.records[: None if keep is None else keep - lines]
            files[LINES].writelines(said)
            arrays["lines"], lines = np.array([len(x) for x in said], np.int64), lines + len(said)
            for name, x in arrays.items():
                if name in ends:
                    x = _ends(x)[1:] + ends[name]
                    ends[name] = int(x[-1]) if len(x) else ends[name]
                files[name].write(x.astype(ARRAYS[name]).tobytes())
            for name in one.labels.keys() - labels.keys():
                labels[name] = stack.enter_context((folder / name).open("wb"))
                labels[name].write(np.full(before, np.nan).tobytes())
            for name, file in labels.items():
                file.write(one.labels.get(name, np.full(n, np.nan)).astype(FLOAT).tobytes())
            before += n
            if time.monotonic() - told > 15:
                told = time.monotonic()
                print(f"{read.spec}: {report.rows:,} rows tokenised", file=sys.stderr)
    report.settle(given)
    sizes = {name: (folder / name).stat().st_size for name in (*ARRAYS, LINES, *sorted(labels))}
    (folder / "card.json").write_text(json.dumps({"kind": kind, "report": asdict(report), "read": vars(read), "bytes": sizes}))
    for path in (*folder.iterdir(), folder):
        fsync(path)


def kept(folder: Path, spec: str, kind: Kind, make: Make, *, by: Any, skip_bad: bool, given: bool = True, every: bool = False) -> Store:
    """What `make` makes of a data set, from `folder` where it is kept, else made now and kept there.

    by: whatever else it depends on (tokenizer, template, settings). given: the user gave --max-length, for messages. every: with all
    records beside their trees. Raises UserError as reading and `make` do; nothing is kept then.
    """
    known = hub.content(spec) if hub.is_name(spec) else content(spec)
    place = folder / fingerprint([known, spec, kind, skip_bad, by, every, code_version(*CODE)])[:32]  # spec: its messages name files
    with contextlib.suppress(OSError, ValueError, KeyError):
        return Store(place)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with disk(folder, "nothing was trained yet"):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
        try:
            read = Read(spec)
            pieces = enumerate(sources.pieces(spec, kind, read))
            found = ahead.ahead(partial(_encode, make, every), pieces, torch.get_num_threads())
            _write(aside, sources.settle(found, read, skip_bad), kind, read, given, None if every else SAMPLE)
            if place.exists():  # damaged
                shutil.rmtree(place)
            aside.rename(place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):  # a folder that holds something stays
                for path in new:
                    path.rmdir()
    return Store(place)


# ---------------------------------------------------------------- reading


@functools.cache
def _reads(kind: str) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(functools.reduce(operator.or_, sources.KINDS[kind]))


class Store(Sequence[Tree]):
    """A tokenised data set on disk. report, read: what became of its records on the way, and of its rows."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError, ValueError or KeyError where it is not there or not whole."""
        card = json.loads((folder / "card.json").read_text())
        for name, length in card["bytes"].items():
            if (folder / name).stat().st_size != length:
                raise ValueError(f"{folder / name} is not whole")
        self.kind = card["kind"]
        names = {name: {int(i): x for i, x in card["report"][name].items()} for name in ("dropped", "cut", "long")}
        self.report = Report(**{**card["report"], **names})
        more = {"skipped": [(at, why) for at, why in card["read"]["skipped"]], "conversions": Counter(card["read"]["conversions"])}
        self.read = Read(**{**card["read"], **more})
        self.arrays = {
            name: np.memmap(folder / name, ARRAYS.get(name, FLOAT), "r") if length else np.zeros(0, ARRAYS.get(name, FLOAT))
            for name, length in card["bytes"].items()
            if name not in ("tokens", LINES)
        }
        self.labels = {name.removeprefix(LABEL): x for name, x in self.arrays.items() if name.startswith(LABEL)}
        self.tokens, self.lines = ((folder / name).open("rb", buffering=0) for name in ("tokens", LINES))

    def __len__(self) -> int:
        return len(self.arrays["records"])

    def __getitem__(self, i: Any) -> Any:
        first, end = (int(x) for x in self.arrays["trees"][i : i + 2])
        borders = [int(x) for x in self.arrays["segments"][first : end + 1]]
        data = np.frombuffer(os.pread(self.tokens.fileno(), 4 * (borders[-1] - borders[0]), 4 * borders[0]), "<u4")
        ids, target = (data & (LEARNED - 1)).tolist(), (data >> 31).astype(float).tolist()
        spans = [(a - borders[0], b - borders[0]) for a, b in itertools.pairwise(borders)]
        parents = self.arrays["parents"][first:end].tolist()
        tree = [Segment(ids[a:b], target[a:b], parent) for (a, b), parent in zip(spans, parents, strict=True)]
        for name, x in self.labels.items():
            for segment, value in zip(tree, x[first:end].tolist(), strict=True):
                if value == value:
                    segment.labels = {**segment.labels, name: value}
        return tree

    def record(self, number: int) -> Any:
        """A record that is kept as it is."""
        begin, end = (int(x) for x in self.arrays["lines"][number : number + 2])
        return _reads(self.kind).validate_json(os.pread(self.lines.fileno(), end - begin, begin))

    def sample(self) -> list[Any]:
        """The first records, SAMPLE at most."""
        return [self.record(i) for i in range(min(SAMPLE, len(self.arrays["lines"]) - 1))]

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the trees of these numbers."""
        trees, segments = self.arrays["trees"], self.arrays["segments"]
        return segments[trees[rows + 1]] - segments[trees[rows]]


class Rows(Sequence[Any]):
    """So many records, read into memory when one of them is first looked at."""

    def __init__(self, count: int, read: Callable[[], Iterable[Any]]) -> None:
        self._count, self._read = count, read

    @functools.cached_property
    def _rows(self) -> list[Any]:
        return list(self._read())

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return self._rows[i]


class Records(Sequence[Any]):
    """Records that stores keep, read when they are asked for."""

    def __init__(self, blocks: Sequence[tuple[Store, np.ndarray]]) -> None:
        """blocks: of each store the numbers of the records that are meant."""
        self.blocks, self._ends = list(blocks), np.cumsum([len(numbers) for _, numbers in blocks])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        (store, numbers), k = _place(self, i)
        return store.record(int(numbers[k]))


def _place(of: Trees | Records, i: int) -> tuple[tuple[Any, np.ndarray], int]:
    """The block that holds item i, and where in it."""
    i = range(len(of))[i]
    block = int(np.searchsorted(of._ends, i, side="right"))
    return of.blocks[block], i - int(of._ends[block]) + len(of.blocks[block][1])


class Trees(Sequence[Tree]):
    """Trees of one data set or of several that are mixed: read when they are asked for, or a list that is in memory.

    have, take, together: as `packing.Order` takes them.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Sequence[Tree], np.ndarray]],
        weights: Sequence[float],
        together: Sequence[np.ndarray] | None = None,
        *,
        mixed: bool = True,
    ) -> None:
        """blocks: of each data set its trees, and the numbers of those that are meant. mixed: by the weights; else all of each."""
        self.blocks = list(blocks)
        self.have = [len(rows) for _, rows in blocks]
        names = [str(k) for k in range(len(blocks))]
        self.take = self.have
        if mixed and len(blocks) > 1:
            taken = counts(dict(zip(names, weights, strict=True)), dict(zip(names, self.have, strict=True)), None)
            self.take = [taken[name] for name in names]
        self.together = together
        self._ends = np.cumsum(self.have)
        self.labels: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by name: a number for each segment, where those of each tree end

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        (trees, rows), k = _place(self, i)
        tree = trees[int(rows[k])]
        for name, (values, ends) in self.labels.items():
            i = range(len(self))[i]
            given = values[ends[i] : ends[i + 1]].tolist()
            tree = [replace(s, labels={**s.labels, name: x}) for s, x in zip(tree, given, strict=True)]
        return tree

    def sizes(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Tokens of each tree, or of those of these numbers."""
        every = [
            trees.sizes(rows) if isinstance(trees, Store | Trees) else np.array([size(trees[int(k)]) for k in rows], np.int64)
            for trees, rows in self.blocks
        ]
        return np.concatenate(every)[slice(None) if rows is None else rows]

    def records(self) -> Records:
        """The records that the trees were made of."""
        return Records([(store, store.arrays["records"][rows]) for store, rows in self.blocks if isinstance(store, Store)])

    def count(self, name: str) -> int:
        """Sum of an array of the stores ("learned"), or of their sizes ("sizes"), over these trees."""
        total = 0
        for trees, rows in self.blocks:
            assert isinstance(trees, Store)
            total += int((trees.sizes(rows) if name == "sizes" else trees.arrays[name][rows]).sum(dtype=np.int64))
        return total


def sizes_of(trees: Sequence[Tree]) -> list[int]:
    """Tokens of each tree."""
    return trees.sizes().tolist() if isinstance(trees, Trees) else [size(tree) for tree in trees]


def label(trees: Sequence[Tree], name: str, values: Sequence[Sequence[float]]) -> None:
    """Give every segment of every tree a label: on the segments, or beside trees that are read when they are asked for."""
    if isinstance(trees, Trees):
        ends = np.cumsum([0, *map(len, values)])
        trees.labels[name] = np.fromiter((x for each in values for x in each), np.float64, int(ends[-1])), ends
        return
    for tree, each in zip(trees, values, strict=True):
        for segment, value in zip(tree, each, strict=True):
            segment.labels = {**segment.labels, name: value}
