"""Tokenised data on disk: made once, kept by the content of all that it depends on, read row by row. Floor 2.

So a set may be larger than the memory, and a run that starts again, or another on the same data, need not tokenise it. A store is a
folder of plain arrays and a report; what is read of a row is its part of the file of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from temper.config import UserError
from temper.data import hub
from temper.data.packing import counts
from temper.data.sharing import size
from temper.data.sources import Kind, _files, stream
from temper.data.sources import Report as Read
from temper.data.split import key
from temper.data.trees import Report
from temper.forest import Segment, Tree
from temper.records import Record, read_jsonl
from temper.runs import ASIDE, code_version, disk, fingerprint, fsync
from temper.world.streams import VERSION

WORLD = "temper.world.datasets"  # the module that decides what `world:` gives
CODE = ("temper.data.trees", "temper.data.sources", "temper.data.store")  # the modules that decide what a store holds
SAMPLES, SAMPLE = "sample.jsonl", 512  # the file and the number of the records that are kept as they are
CHUNK = 256  # records that are tokenised at a time
ALONE = 32  # chunks that this process makes before it has others help
LEARNED = 1 << 31  # the bit of a token that is learned
ARRAYS = {"tokens": "<u4", "segments": "<i8", "parents": "<i4", "trees": "<i8", "records": "<i8", "learned": "<u4", "keys": "<u8"}
_PART = re.compile(r"(.+)=([0-9]*\.?[0-9]+)")

R = TypeVar("R", bound=Record)
Make = Callable[[Sequence[Any], int], tuple[list[tuple[int, Tree]], Report]]  # (records, number of the first) -> (number, tree) of each


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


def _encode(make: Make, records: Sequence[Any], first: int) -> tuple[dict[str, np.ndarray], Report]:
    """A chunk of records as arrays: tokens with their bit, lengths of segments, their parents, segments of each tree, ..."""
    found, report = make(records, first)
    segments = [s for _, tree in found for s in tree]
    learned = [np.asarray(s.target if s.target is not None else np.zeros(len(s.tokens)), np.float32) for s in segments]
    if any(((x != 0) & (x != 1)).any() or s.columns or s.labels for x, s in zip(learned, segments, strict=True)):
        raise ValueError("a store holds tokens that are learned or not, without columns and labels")
    tokens = [np.asarray(s.tokens, np.uint32) | (x.astype(np.uint32) << 31) for x, s in zip(learned, segments, strict=True)]
    return {
        "tokens": np.concatenate(tokens) if tokens else np.zeros(0, np.uint32),
        "segments": np.array([len(x) for x in tokens], np.int64),
        "parents": np.array([s.parent for s in segments], np.int32),
        "trees": np.array([len(tree) for _, tree in found], np.int64),
        "records": np.array([i for i, _ in found], np.int64),
        "learned": np.array([sum(1 for s in tree for w in s.target or () if w) for _, tree in found], np.uint32),
        "keys": np.fromiter(map(key, records), np.uint64, len(records)),
    }, report


_making: list[Make] = []  # in a helping process


def _help(make: Make) -> None:
    _making.append(make)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it


def _helped(records: Sequence[Any], first: int) -> tuple[dict[str, np.ndarray], Report]:
    return _encode(_making[0], records, first)


def _chunks(records: Iterator[Any]) -> Iterator[tuple[list[Any], int]]:
    for first in itertools.count(0, CHUNK):
        chunk = list(itertools.islice(records, CHUNK))
        if not chunk:
            return
        yield chunk, first


def encoded(records: Iterator[Any], make: Make, workers: int) -> Iterator[tuple[dict[str, np.ndarray], Report]]:
    """`_encode` of chunks of the records, in order; beyond ALONE chunks by several processes, a few chunks ahead and no more."""
    chunks = _chunks(records)
    for chunk in itertools.islice(chunks, ALONE if workers > 1 else None):
        yield _encode(make, *chunk)
    rest = next(chunks, None)
    if rest is None:
        return
    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_help, initargs=(make,))
    try:
        for chunk in itertools.chain([rest], chunks):
            waiting.append(pool.submit(_helped, *chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _sampled(records: Iterator[Any], path: Path) -> Iterator[Any]:
    """The records; the first SAMPLE of them are written down on the way."""
    first = list(itertools.islice(records, SAMPLE))
    path.write_text("".join(f"{r.model_dump_json()}\n" for r in first))
    yield from first
    yield from records


def _write(folder: Path, found: Iterable[tuple[dict[str, np.ndarray], Report]], read: Read, given: bool) -> None:
    report, told, ends = Report(), time.monotonic(), {"segments": 0, "trees": 0}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in ARRAYS}
        for name in ends:
            files[name].write(np.zeros(1, ARRAYS[name]).tobytes())
        for arrays, part in found:
            report.add(part)
            for name, x in arrays.items():
                if name in ends:
                    x = np.cumsum(x) + ends[name]
                    ends[name] = int(x[-1]) if len(x) else ends[name]
                files[name].write(x.astype(ARRAYS[name]).tobytes())
            if time.monotonic() - told > 15:
                told = time.monotonic()
                print(f"{read.spec}: {report.rows:,} rows tokenised", file=sys.stderr)
    report.settle(given)
    card = {"report": asdict(report), "read": vars(read), "bytes": {name: (folder / name).stat().st_size for name in ARRAYS}}
    (folder / "card.json").write_text(json.dumps(card))
    for path in (*folder.iterdir(), folder):
        fsync(path)


def kept(folder: Path, spec: str, kind: Kind, make: Make, *, by: Any, skip_bad: bool, given: bool = True) -> Store:
    """What `make` makes of a data set, from `folder` where it is kept, else made now and kept there.

    by: whatever else it depends on (tokenizer, template, settings). given: the user gave --max-length, for messages. Raises UserError as
    reading and `make` do; nothing is kept then.
    """
    known = hub.content(spec) if hub.is_name(spec) else content(spec)
    place = folder / fingerprint([known, spec, kind, skip_bad, by, code_version(*CODE)])[:32]  # spec: its messages name files
    with contextlib.suppress(OSError, ValueError, KeyError):
        return Store(place)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with disk(folder, "nothing was trained yet"):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
        try:
            read = Read(spec)
            records = _sampled(stream(spec, kind, read, skip_bad), aside / SAMPLES)
            _write(aside, encoded(records, make, torch.get_num_threads()), read, given)
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


class Store(Sequence[Tree]):
    """A tokenised data set on disk. report, read: what became of its records on the way, and of its rows."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError, ValueError or KeyError where it is not there or not whole."""
        card = json.loads((folder / "card.json").read_text())
        for name, length in card["bytes"].items():
            if (folder / name).stat().st_size != length:
                raise ValueError(f"{folder / name} is not whole")
        names = {name: {int(i): x for i, x in card["report"][name].items()} for name in ("dropped", "cut", "long")}
        self.report = Report(**{**card["report"], **names})
        more = {"skipped": [(at, why) for at, why in card["read"]["skipped"]], "conversions": Counter(card["read"]["conversions"])}
        self.read = Read(**{**card["read"], **more})
        self.samples = folder / SAMPLES
        self.arrays = {
            name: np.memmap(folder / name, kind, "r") if card["bytes"][name] else np.zeros(0, kind)
            for name, kind in ARRAYS.items()
            if name != "tokens"
        }
        self.file = (folder / "tokens").open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.arrays["records"])

    def __getitem__(self, i: Any) -> Any:
        first, end = (int(x) for x in self.arrays["trees"][i : i + 2])
        borders = [int(x) for x in self.arrays["segments"][first : end + 1]]
        data = np.frombuffer(os.pread(self.file.fileno(), 4 * (borders[-1] - borders[0]), 4 * borders[0]), "<u4")
        ids, target = (data & (LEARNED - 1)).tolist(), (data >> 31).astype(float).tolist()
        spans = [(a - borders[0], b - borders[0]) for a, b in itertools.pairwise(borders)]
        parents = self.arrays["parents"][first:end].tolist()
        return [Segment(ids[a:b], target[a:b], parent) for (a, b), parent in zip(spans, parents, strict=True)]

    def sample(self, kind: type[R]) -> list[R]:
        """The first SAMPLE records."""
        return read_jsonl(self.samples, kind)

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

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        block = int(np.searchsorted(self._ends, i, side="right"))
        trees, rows = self.blocks[block]
        return trees[int(rows[i - self._ends[block]])]

    def sizes(self) -> list[int]:
        """Tokens of each tree."""
        return [
            n
            for trees, rows in self.blocks
            for n in (trees.sizes(rows).tolist() if isinstance(trees, Store) else (size(trees[int(k)]) for k in rows))
        ]

    def count(self, name: str) -> int:
        """Sum of an array of the stores ("learned"), or of their sizes ("sizes"), over these trees."""
        total = 0
        for trees, rows in self.blocks:
            assert isinstance(trees, Store)
            total += int((trees.sizes(rows) if name == "sizes" else trees.arrays[name][rows]).sum(dtype=np.int64))
        return total
