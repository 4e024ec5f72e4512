"""Decoding in steps of static shape, which CUDA records as graphs and replays: a small step costs what its launches cost. Floor 3.

A step is a pure function of buffers that stay where they are: caches of rows and prompts, and a block of numbers that the host writes
anew before each step (how many own tokens a row has, where its prompt begins, whose sample it is). Rows end, wait and are replaced by what
is written there. Shapes are a bucket's: rows, prompt tokens and own tokens, each rounded up to a power of two. A bucket's graph is recorded
when it is first met, drawing included; all of them share one pool of memory, for no two run at once and what they give lies outside of it.

    Slots    buffers and graphs, which a model's calls hand on to each other
    Static   the decoder: `Shared` computes the prompts, a graph each token after the first

The same step runs on any device without a graph.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from temper.models import adapters
from temper.models.heads import logits, precision
from temper.rollout.interface import Decoder
from temper.rollout.sampling import Sampling, draw

if TYPE_CHECKING:
    from temper.rollout.decode import Shared

log = logging.getLogger("temper")

TOKENS = 64  # the smallest bucket of tokens, of prompts and of answers
GRAPHS = 64  # most that are held; beyond it all are recorded anew
KEPT = 0.1  # share of the card's memory that caches may hold between calls; larger ones are made anew, and their graphs with them
WARM = 2  # steps before a recording, in which libraries choose their kernels and set workspaces aside

_kept: weakref.WeakKeyDictionary[Any, Slots] = weakref.WeakKeyDictionary()  # of models that are not decoding
_refused: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose step cannot be recorded
# Streams to record on that no slots have. Each slots have their own, and drop their graphs all at once: a graph that goes takes along the
# workspaces of cuBLAS that all graphs of its stream know (pytorch/pytorch#193402).
_idle: defaultdict[torch.device, list[Any]] = defaultdict(list)


def _on_cuda(run: Callable[[], None], slots: Slots) -> Callable[[], None]:
    """Record what `run` launches, as https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs asks for: after steps on a side
    stream, recorded on the same one, without a call that waits for the device. `run` may be run any number of times."""
    with torch.cuda.device(slots.device):
        if slots.stream is None:
            idle = _idle[slots.device]
            slots.stream = idle.pop() if idle else torch.cuda.Stream()
            weakref.finalize(slots, idle.append, slots.stream).atexit = False
        if slots.pool is None:
            slots.pool = torch.cuda.graph_pool_handle()
        slots.stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(slots.stream):  # a recording that fails leaves its stream current
            for _ in range(WARM):
                run()
            with torch.cuda.graph(graph, pool=slots.pool, stream=slots.stream, capture_error_mode="thread_local"):
                run()
        torch.cuda.current_stream().wait_stream(slots.stream)
    return graph.replay


RECORD: dict[str, Callable[[Callable[[], None], Slots], Callable[[], None]]] = {"cuda": _on_cuda}  # by kind of device


def fits(model: Any, backend: str) -> bool:
    """Whether the model's steps are recorded: on such a device, attention that sees forests, weights that are whole and stay in place."""
    return model.device.type in RECORD and backend != "rows" and not hasattr(model, "trunk") and model not in _refused


def _bucket(many: int, least: int = 1) -> int:
    return max(least, 1 << (many - 1).bit_length())


def _baked(model: Any) -> tuple[Any, ...]:
    """What a graph holds for good: where the weights lie, in what they are multiplied, which adapter is at work."""
    with adapters.acting(model):
        parts = list(adapters.parts(model))
        where = [x.data_ptr() for part in parts for x in (*part.parameters(recurse=False), *part.buffers(recurse=False))]
        layers: list[Any] = [part for part in parts if "_disable_adapters" in vars(part)]
        at_work = [(part._disable_adapters, tuple(part.active_adapters), tuple(part.merged_adapters)) for part in layers]
    return precision(model), tuple(where), tuple(at_work)


class Bucket(NamedTuple):
    """The shape of a step, and how it draws; None: it gives the logits."""

    rows: int
    prompts: int
    length: int
    room: int
    n: int
    sampling: Sampling | None


class Seats:
    """Rows that were admitted together: the slots that they and their prompts have."""

    def __init__(self, slots: Slots, lengths: Tensor, n: int) -> None:
        self.slots, self.longest, self.own, self.layer = slots, int(lengths[0]), 0, 0
        self.rows, self.prompts = slots.seat(lengths.cpu().numpy(), n)

    def learn(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        """Take over one layer's prompts (see `SharedBatch.learn`)."""
        self.slots.learn(self.layer, self.prompts, k, v, index)
        self.layer += 1

    def keep(self, rows: int, moves: Sequence[tuple[int, int]]) -> None:
        for to, source in moves:
            self.rows[[to, source]] = self.rows[[source, to]]
        self.slots.taken[self.rows[rows:]] = False
        self.rows = self.rows[:rows]


class Slots:
    """Room for rows and prompts, and the graphs of the steps that were made in it.

    Per layer prompt_k [prompts, G, D, length] and prompt_v [prompts, G, length, E], right-aligned, own_k [rows, G, room, D] and own_v
    [rows, G, room, E]. Row r is sample place[r] % n of prompt place[r] // n, whose tokens are begin[r]:length; own[r] of its own tokens
    are known, and seat[place] is the row that sits there. A row that nobody has computes what another's numbers say, for nobody.
    """

    def __init__(self, model: Any) -> None:
        self.device, self.baked = model.device, _baked(model)
        self.rows = self.prompts = self.length = self.room = self.seats = 0
        self.stores: list[list[Tensor]] = [[], [], [], []]  # prompt_k, prompt_v, own_k, own_v
        self.taken = np.zeros(0, bool)
        self.host = self.own = self.begin = self.place = self.order = self.seated = np.zeros(0, np.int64)
        self.buffers: dict[str, Tensor] = {}  # what a step reads and writes besides the caches
        self.graphs: dict[Bucket, Callable[[], None]] = {}
        self.stream: Any = None
        self.pool: Any = None

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.buffers.values(), *(x for store in self.stores for x in store)))

    def clear(self) -> None:
        """Let all rows go. Zeros, because what a model that diverged left would be no number even where its weight is 0."""
        self.taken[:] = False
        for store in self.stores:
            for x in store:
                x.zero_()

    def forget(self) -> None:
        """Drop the graphs, with their memory."""
        self.graphs.clear()
        self.pool = None

    def fit(self, rows: int, prompts: int, length: int, room: int, n: int) -> None:
        """Make room for so many; what is there moves along, and the graphs, which know the old place, are dropped."""
        R, P = max(self.rows, _bucket(rows)), max(self.prompts, _bucket(prompts))
        L, T = max(self.length, _bucket(length, TOKENS)), max(self.room, _bucket(room, TOKENS))
        seats = max(self.seats, P * n)
        if (R, P, L, T, seats) == (self.rows, self.prompts, self.length, self.room, self.seats):
            return
        self.forget()
        self.buffers.clear()
        for store, many, axis, tokens, right in zip(self.stores, (P, P, R, R), (3, 2, 2, 2), (L, L, T, T), (1, 1, 0, 0), strict=True):
            for layer, x in enumerate(store):
                shape, have = [many, *x.shape[1:]], x.shape[axis]
                shape[axis] = tokens
                store[layer] = x.new_zeros(shape)
                store[layer][: len(x)].narrow(axis, right * (tokens - have), have).copy_(x)
        old, used = (self.own, self.begin + (L - self.length), self.place), self.rows
        self.host = np.zeros(4 * R + seats, np.int64)
        self.own, self.begin, self.place, self.order, self.seated = np.split(self.host, [R, 2 * R, 3 * R, 4 * R])
        for numbers, before in zip((self.own, self.begin, self.place), old, strict=True):
            numbers[:used] = before
        self.taken = np.pad(self.taken, (0, R - used))
        self.rows, self.prompts, self.length, self.room, self.seats = R, P, L, T, seats

    def seat(self, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots for n rows of each prompt: (of the rows, of the prompts)."""
        asked = np.unique(self.place[self.taken] // n)
        self.fit(int(self.taken.sum()) + len(lengths) * n, len(asked) + len(lengths), int(lengths[0]), 1, n)
        prompts = np.setdiff1d(np.arange(self.prompts), asked)[: len(lengths)]
        rows = np.flatnonzero(~self.taken)[: len(lengths) * n]
        self.taken[rows] = True
        self.begin[rows] = self.length - lengths.repeat(n)
        self.place[rows] = (prompts[:, None] * n + np.arange(n)).ravel()
        return rows, prompts

    def learn(self, layer: int, prompts: np.ndarray, k: Tensor, v: Tensor, index: Tensor) -> None:
        (P, L), (G, D), E = index.shape, k.shape[1:], v.shape[2]
        if layer == len(self.stores[0]):
            shapes = (self.prompts, G, D, self.length), (self.prompts, G, self.length, E), (self.rows, G, self.room, D)
            for store, like, shape in zip(self.stores, (k, v, k, v), (*shapes, (self.rows, G, self.room, E)), strict=True):
                store.append(like.new_zeros(shape))
        at = torch.from_numpy(prompts).to(self.device)
        self.stores[0][layer][at, :, :, self.length - L :] = k.flatten(1)[index].view(P, L, G, D).permute(0, 2, 3, 1)
        self.stores[1][layer][at, :, self.length - L :] = v.flatten(1)[index].view(P, L, G, E).transpose(1, 2)

    def arrange(self, batches: Sequence[Seats], n: int, sampling: Sampling | None) -> Bucket:
        """Lay the rows of a step into the smallest bucket, and tell the device; `order` is where each row lies."""
        self.fit(1, 1, 1, 1 + max(batch.own for batch in batches), n)
        order = np.concatenate([batch.rows for batch in batches])
        bucket = _bucket(len(order))
        rows = _packed(order, bucket, self.rows)
        if rows is not None:
            _move(self.stores[2:], order, rows[order])
            for x in (self.begin, self.place):
                x[rows[order]] = x[order]
            self.taken[order], self.taken[rows[order]] = False, True
            for batch in batches:
                batch.rows = rows[batch.rows]
            order = rows[order]
        used, places = np.unique(self.place[order] // n), min(self.prompts, bucket)
        prompts = _packed(used, places, self.prompts)
        if prompts is not None:
            _move(self.stores[:2], used, prompts[used])
            self.place[order] = prompts[self.place[order] // n] * n + self.place[order] % n
        self.own[order] = np.repeat([batch.own for batch in batches], [len(batch.rows) for batch in batches])
        for x in (self.own, self.begin, self.place):
            x[np.setdiff1d(np.arange(bucket), order)] = x[order[0]]
        self.seated[:], self.seated[self.place[order]], self.order[: len(order)] = 0, order, order
        self.buffer("host", len(self.host)).copy_(torch.from_numpy(self.host))
        length = _bucket(max(batch.longest for batch in batches), TOKENS)
        return Bucket(bucket, places, length, _bucket(1 + int(self.own[order].max()), TOKENS), n, sampling)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """The buffer of that name, which lies where it lay before."""
        if name not in self.buffers:
            self.buffers[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self.buffers[name]


def _packed(slots: np.ndarray, many: int, capacity: int) -> np.ndarray | None:
    """[capacity] where each slot's content goes so that all lie below `many`; None where they do."""
    high = slots[slots >= many]
    if not len(high):
        return None
    to = np.arange(capacity)
    to[high] = np.setdiff1d(np.arange(many), slots)[: len(high)]
    return to


def _move(stores: Sequence[Sequence[Tensor]], slots: np.ndarray, to: np.ndarray) -> None:
    source, into = (torch.from_numpy(x[slots != to]) for x in (slots, to))
    for x in (x for store in stores for x in store):
        x[into.to(x.device)] = x[source.to(x.device)]


# ---------------------------------------------------------------- the step


def _step(shared: Shared, slots: Slots, bucket: Bucket) -> None:
    """What is recorded. Everything that differs from step to step is read from a buffer; nothing waits for the device."""
    B, P, L, T, n, sampling = bucket
    own, begin, place, _, seated = slots.buffer("host").split([slots.rows] * 4 + [slots.seats])
    own, begin, place, seated = own[:B], begin[:B], place[:B], seated[: P * n]
    rows, column = torch.arange(B, device=slots.device), torch.arange(L + T, device=slots.device)
    newest = (own + L)[:, None]  # a row's tokens are the columns from `begin` on, in one count over prompt and answer
    known = (column <= newest) & (column >= (begin - (slots.length - L))[:, None])
    unseen: dict[int | None, Tensor] = {}
    lines: dict[int, tuple[Tensor, Tensor]] = {}
    layer = -1

    def each(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        nonlocal layer
        layer += 1
        prompt_k, prompt_v, own_k, own_v = (store[layer] for store in slots.stores)
        (G, D), H, E = k.shape[1:], q.shape[1], v.shape[2]
        own_k[rows, :, own], own_v[rows, :, own] = k, v
        if window not in unseen:
            unseen[window] = (~known if window is None else ~(known & (column > newest - window)))[:, None, None]
        if G not in lines:  # [P * G * n] of which line of rows each place is, [B * G] of which line of places each row is
            heads = torch.arange(G, device=slots.device)
            there = (place[:, None] // n * G + heads) * n + place[:, None] % n
            lines[G] = (seated.view(P, 1, n) * G + heads[:, None]).flatten(), there.flatten()
        places, back = lines[G]

        def by_prompt(x: Tensor) -> Tensor:  # [B, G, r, X] -> [P * G, n * r, X]
            return x.reshape(B * G, -1).index_select(0, places).view(P * G, -1, x.shape[-1])

        def by_row(x: Tensor) -> Tensor:  # [P * G, n * r, X] -> [B, G, r, X]
            return x.view(P * G * n, -1).index_select(0, back).view(B, G, -1, x.shape[-1])

        q = (q * scale).contiguous().view(B, G, H // G, D)
        against = torch.bmm(by_prompt(q), prompt_k[:P].flatten(0, 1)[..., slots.length - L :])
        scores = torch.bmm(q.view(B * G, -1, D), own_k[:B].flatten(0, 1)[:, :T].transpose(1, 2)).view(B, G, -1, T)
        scores = torch.cat([by_row(against), scores], -1).masked_fill_(unseen[window], -torch.inf)
        p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out = torch.bmm(p[..., L:].reshape(B * G, -1, T), own_v[:B].flatten(0, 1)[:, :T]).view(B, G, -1, E)
        more = torch.bmm(by_prompt(p[..., :L]), prompt_v[:P].flatten(0, 1)[:, slots.length - L :])
        return out.add_(by_row(more)).view(B, H, E)

    z = logits(shared.model, shared.ask(each, slots.buffer("tokens")[:B], own + slots.length - begin))
    if sampling is None:
        slots.buffer("logits")[:B] = z
    else:
        uniform, seen = (slots.buffers[name][:B] if wanted else None for name, wanted in _needs(sampling).items())
        slots.buffer("drawn")[:B], slots.buffer("logp")[:B] = draw(z, uniform, sampling, seen)


def _needs(sampling: Sampling) -> dict[str, bool]:
    return {"uniform": sampling.temperature > 0, "seen": sampling.repetition_penalty != 1}


class Static(Decoder):
    """Prompts as `Shared` computes them; each token after the first by a graph."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.slots = shared, _borrowed(shared.model)
        weakref.finalize(self, _handed_back, weakref.ref(shared.model), self.slots).atexit = False

    def admit(self, prompts: Sequence[Sequence[int]], n: int, room: int) -> list[tuple[int, Seats, Tensor]]:
        self.n = n
        admitted = self.shared.compute(prompts, lambda lengths: Seats(self.slots, lengths, n))
        self.vocabulary = admitted[0][2].shape[1]
        return admitted

    def step(self, batches: Sequence[Seats], tokens: Tensor) -> Tensor:
        at = self._replay(batches, None, tokens=tokens)
        return self.slots.buffer("logits")[at]

    def turn(
        self, batches: Sequence[Seats], tokens: Tensor, uniform: Tensor | None, sampling: Sampling, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        at = self._replay(batches, sampling, tokens=tokens, uniform=uniform, seen=seen)
        return self.slots.buffer("drawn")[at], self.slots.buffer("logp")[at]

    def _replay(self, batches: Sequence[Seats], sampling: Sampling | None, **given: Tensor | None) -> Tensor:
        """One step of all rows -> [R] where each one's results lie."""
        slots = self.slots
        bucket = slots.arrange(batches, self.n, sampling)
        at = slots.buffer("host")[3 * slots.rows :][: sum(len(batch.rows) for batch in batches)]
        for name, x in given.items():
            if x is not None:
                slots.buffer(name, slots.rows, *x.shape[1:], dtype=x.dtype).index_copy_(0, at, x)
        for name, dtype, *more in (("drawn", torch.int64), ("logp", torch.float32), ("logits", torch.float32, self.vocabulary)):
            if (name == "logits") == (sampling is None):
                slots.buffer(name, slots.rows, *more, dtype=dtype)
        if bucket not in slots.graphs:
            if len(slots.graphs) == GRAPHS:
                slots.forget()
            slots.graphs[bucket] = _recorded(self.shared, slots, bucket)
        slots.graphs[bucket]()
        for batch in batches:
            batch.own += 1
        return at


def _recorded(shared: Shared, slots: Slots, bucket: Bucket) -> Callable[[], None]:
    """The graph of a bucket; where it cannot be recorded, that is said once, and the step itself runs."""
    model, run = shared.model, partial(_step, shared, slots, bucket)
    if model in _refused:
        return run
    try:
        return RECORD[slots.device.type](run, slots)
    except RuntimeError as error:
        slots.forget()
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _refused.add(model)
        why = str(error).strip().splitlines()[0]
        log.warning("%s: its step cannot be recorded as a CUDA graph (%s); rollouts launch every kernel anew", type(model).__name__, why)
        return run


def _borrowed(model: Any) -> Slots:
    """The slots that the model's last call left, if its weights are where they were; nobody else has them meanwhile."""
    slots = _kept.pop(model, None)
    if slots is None or slots.baked != _baked(model):
        return Slots(model)
    slots.clear()
    return slots


def _handed_back(model: weakref.ref[Any], slots: Slots) -> None:
    holder = model()
    if holder is not None and holder not in _refused and slots.bytes <= KEPT * _memory(slots.device):
        _kept[holder] = slots


def _memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")
