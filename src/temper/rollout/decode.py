"""Decoding on unmodified Hugging Face models: the cache of a batch of rows, and the two ways to run a model over it. Floor 3.

A batch is admitted together, so all its rows have the same number of own tokens. Both ways have the same three verbs: `admit` computes
prompts and gives the logits of their first tokens, `step` feeds one token to every row, `Batch.keep` lets rows go.

    Shared   for models whose attention sees forests. Prompts are computed as one packed forest, without padding. Their keys and values
             are held once for the n rows of a prompt: scores against the prompt (one matrix product per prompt, for all its rows) and
             against the row's own tokens stand side by side in one softmax. All batches take one step in one call of the trunk.
    Padded   for the others (what `check_forest` gives "rows"): transformers' own cache and masks, prompts padded on the left and
             repeated n times, one call per batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models import adapters
from temper.models.attention import attend, laid_out, trunk
from temper.models.heads import computing, logits, precision
from temper.models.load import check_forest
from temper.models.mix import Mixed
from temper.rollout import graphs, kernel
from temper.rollout.interface import Decoder
from temper.rollout.lockstep import Lockstep

log = logging.getLogger("temper")

PREFILL = 4096  # tokens computed at once: beyond it temporaries leave the cache and the memory of a prefill grows
PADDING = 2048  # prompt tokens that a batch may pad: as dear in a step as the calls of one more batch
ROOM = 64  # own tokens a cache first has room for; doubled when they are used up, so that a row's memory follows its length
_told: set[str] = set()
B = TypeVar("B", bound=Any)


def decoder(model: Any, compiled: bool = False, recorded: bool = True) -> Decoder:
    """The way that fits the model, which is checked against the forest if it has not been. Says once where it is the slow one.

    compiled: attend by the C kernel where it can be used. recorded: by graphs (`graphs.py`) where there are such.
    """
    if isinstance(model, Mixed):
        sizes = [m.config.get_text_config().vocab_size for m in model.models]
        if len(set(sizes)) > 1:
            raise UserError(f"models of {', '.join(map(str, sizes))} tokens cannot be mixed token by token; give them one size")
        rows = any(_backend(m) == "rows" for m in model.models)  # then all: in lockstep batches must be cut alike
        return Lockstep([Padded(m) if rows else decoder(m, compiled, recorded) for m in model.models], model.weights)
    backend = _backend(model)
    if backend != "rows":
        shared = Shared(model, backend, compiled)
        return graphs.Static(shared) if recorded and graphs.fits(model, backend) else shared
    name = type(model).__name__
    if name not in _told:
        _told.add(name)
        log.warning("%s: its attention cannot share prompts; rollouts run on transformers' own cache, which is slower", name)
    return Padded(model)


def _backend(model: Any) -> str:
    return getattr(model, "forest_backend", None) or check_forest(model)


@contextmanager
def transposed(model: Any) -> Iterator[None]:
    """Within it the weights lie [in, out] on the CPU: with 4 to 64 rows a product takes 1.1 to 1.9 times as long on [out, in].

    The model is the same to whoever asks it; it holds a second copy of these weights meanwhile, and its own again afterwards.
    """
    layers = [m for m in adapters.parts(model) if type(m) is nn.Linear] if model.device.type == "cpu" else []
    own = [layer.weight.data for layer in layers]
    try:
        with torch.inference_mode(False):
            for layer in layers:
                layer.weight.data = layer.weight.data.t().contiguous().t()
        yield
    finally:
        for layer, weight in zip(layers, own, strict=True):
            layer.weight.data = weight


# ---------------------------------------------------------------- shared prompts


class SharedBatch:
    """Keys and values of R rows: R = P prompts times n at first, fewer when some have ended.

    Per layer prompt_k [P, G, D, L] and prompt_v [P, G, L, E], right-aligned so that a sliding window is a slice for all rows alike (the
    keys lie transposed: the product with them is 3.5 times as fast), and own_k [R, G, room, D], own_v [R, G, room, E].
    """

    def __init__(self, lengths: Tensor, n: int, room: int, compiled: bool = False) -> None:
        self.n, self.room, self.own = n, room, 0  # own: tokens that each row has in the cache
        self.compiled = compiled
        self.longest = int(lengths[0])
        self.next = lengths.repeat_interleave(n)  # [R] position of the next token
        self.pad = torch.arange(self.longest, device=lengths.device) < self.longest - lengths[:, None]  # [P, L]
        self.bias: Tensor | None = None  # [P, L]
        self.begin = self.longest - lengths  # [P]
        self._set_bias()
        self.place = torch.arange(len(self.next), device=lengths.device)  # [R] which of the P * n places a row has
        self.lines: Tensor | None = None  # see _lines
        self.prompt_k: list[Tensor] = []
        self.prompt_v: list[Tensor] = []
        self.own_k: list[Tensor] = []
        self.own_v: list[Tensor] = []

    def _set_bias(self) -> None:
        self.bias = torch.zeros(self.pad.shape, device=self.pad.device).masked_fill_(self.pad, -torch.inf) if self.pad.any() else None

    def learn(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        """Take over one layer's prompt: k [T, G, D], v [T, G, E]; index [P, L] the tokens of each prompt, right-aligned."""
        P, R, room = len(index), len(self.next), min(self.room, ROOM)
        self.prompt_k.append(k.flatten(1)[index].view(P, self.longest, *k.shape[1:]).permute(0, 2, 3, 1).contiguous())
        self.prompt_v.append(v.flatten(1)[index].view(P, self.longest, *v.shape[1:]).transpose(1, 2).contiguous())
        self.own_k.append(k.new_empty(R, k.shape[1], room, k.shape[2]))
        self.own_v.append(v.new_empty(R, v.shape[1], room, v.shape[2]))

    def grow(self) -> None:
        """Make room for one more own token of each row."""
        have = self.own_k[0].shape[2]
        if self.own == have:
            for store in (self.own_k, self.own_v):
                for layer, x in enumerate(store):
                    wide = x.new_empty(len(self.next), x.shape[1], min(2 * have, self.room), x.shape[3])
                    wide[:, :, :have] = x[: len(wide)]
                    store[layer] = wide

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """One layer's attention of each row's newest token: q [R, H, D], k [R, G, D], v [R, G, E] -> [R, H, E]. Keeps k and v."""
        own_k, own_v, t = self.own_k[layer], self.own_v[layer], self.own
        R, H, D = q.shape
        G, E = v.shape[1:]
        own_k[:R, :, t], own_v[:R, :, t] = k, v
        first = 0 if window is None else max(0, t + 1 - window)
        seen = self.longest if window is None else min(self.longest, max(0, window - t - 1))  # of the prompt, from its end
        cut = self.longest - seen
        q = (q * scale).contiguous()
        if self.compiled and kernel.fits(q):
            stores = self.prompt_k[layer], self.prompt_v[layer], own_k, own_v
            return kernel.attend(q, *stores, self.begin, self.place, n=self.n, first=first, own=t + 1, cut=cut)
        q = q.view(R, G, H // G, D)
        keys, values = (x.view(-1, *x.shape[2:])[: R * G, first : t + 1] for x in (own_k, own_v))
        scores = torch.bmm(q.view(R * G, H // G, D), keys.transpose(1, 2)).view(R, G, H // G, -1)
        if not seen:
            p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
            return torch.bmm(p.view(R * G, H // G, -1), values).view(R, H, E)
        prompt_k, prompt_v = self.prompt_k[layer], self.prompt_v[layer]
        P = len(prompt_k)
        against = torch.bmm(self._by_prompt(q), prompt_k.view(P * G, D, -1)[..., cut:])
        if self.bias is not None:
            against.view(P, G, -1, seen).add_(self.bias[:, None, None, cut:])
        p = torch.cat([self._by_row(against, G), scores], -1).softmax(-1, dtype=torch.float32).to(v.dtype)
        out = torch.bmm(p[..., seen:].reshape(R * G, H // G, -1), values).view(R, G, H // G, E)
        more = torch.bmm(self._by_prompt(p[..., :seen]), prompt_v.view(P * G, -1, E)[:, cut:])
        return out.add_(self._by_row(more, G)).view(R, H, E)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[R, G, r, X] -> [P * G, n * r, X]: what the rows of one prompt ask, together; places without a row ask nothing."""
        R, G, r, X = x.shape
        places = x.new_zeros(len(self.pad) * G * self.n, r * X)
        return places.index_copy_(0, self._lines(G), x.reshape(R * G, r * X)).view(-1, self.n * r, X)

    def _by_row(self, x: Tensor, G: int) -> Tensor:
        """[P * G, n * r, X] -> [R, G, r, X]."""
        r, X = x.shape[1] // self.n, x.shape[2]
        return x.view(-1, r * X).index_select(0, self._lines(G)).view(-1, G, r, X)

    def _lines(self, G: int) -> Tensor:
        """[R * G] where the head g of each row lies among P * G * n."""
        if self.lines is None:
            p, k = self.place // self.n, self.place % self.n
            self.lines = ((p[:, None] * G + torch.arange(G, device=p.device)) * self.n + k[:, None]).flatten()
        return self.lines

    def keep(self, rows: int, moves: Sequence[tuple[int, int]]) -> None:
        self.lines = None
        if moves:
            to, source = torch.tensor(moves, device=self.next.device).T
            self.next[to], self.place[to] = self.next[source], self.place[source]
            for store in (self.own_k, self.own_v):
                for x in store:
                    x[to, :, : self.own] = x[source, :, : self.own]
        self.next, self.place = self.next[:rows], self.place[:rows]
        used, group = torch.unique(self.place // self.n, return_inverse=True)
        if len(used) <= 0.75 * len(self.pad):  # copying costs less than asking for prompts that have no rows left
            self.place = group * self.n + self.place % self.n
            self.pad, self.begin = self.pad[used], self.begin[used]
            self._set_bias()
            self.prompt_k, self.prompt_v = ([x[used] for x in store] for store in (self.prompt_k, self.prompt_v))


class Shared(Decoder):
    """Prompts as a packed forest; one call of the trunk for one token of every row."""

    def __init__(self, model: Any, backend: str, compiled: bool = False) -> None:
        self.model, self.backend, self.compiled = model, backend, compiled
        self.no_mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)  # keeps transformers from building its own

    def admit(self, prompts: Sequence[Sequence[int]], n: int, room: int) -> list[tuple[int, SharedBatch, Tensor]]:
        return self.compute(prompts, lambda lengths: SharedBatch(lengths, n, room, self.compiled))

    def compute(self, prompts: Sequence[Sequence[int]], make: Callable[[Tensor], B]) -> list[tuple[int, B, Tensor]]:
        """As `admit`, into what `make` gives for the prompts' lengths: it has `longest` and `learn` (see `SharedBatch`)."""
        return [self._compute(prompts[part], make) for part in _alike([len(prompt) for prompt in prompts])]

    def _compute(self, prompts: Sequence[Sequence[int]], make: Callable[[Tensor], B]) -> tuple[int, B, Tensor]:
        """One batch, its prompts packed into forests of up to PREFILL tokens."""
        held: list[list[tuple[Tensor, Tensor]]] = []  # per layer, of each forest
        first = []
        for piece in _pieces([len(prompt) for prompt in prompts]):
            forest = plant([[Segment(prompt, [0.0] * len(prompt))] for prompt in prompts[piece]]).to(self.model.device)
            seen: list[tuple[Tensor, Tensor]] = []
            given, laid = laid_out(self.model, forest)
            soft = laid.T - forest.T  # tokens that come first and are seen by all; the same in every piece
            repeated = soft if held else 0

            def record(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None, seen=seen, laid=laid, cut=repeated) -> Tensor:
                seen.append((k[cut:], v[cut:]))
                return attend(q, k, v, laid, scale=scale, backend=self.backend, window=window)

            states = self._trunk(record, **given)[-forest.T :]
            first.append(logits(self.model, states[forest.last]))
            held.append(seen)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        batch = make(lengths + soft)
        back = torch.arange(batch.longest, 0, -1, device=lengths.device)  # a place, counted from the prompt's end
        own = soft + lengths.cumsum(0)[:, None] - back
        index = torch.where(back <= lengths[:, None], own, (soft + lengths[:, None] - back).clamp(min=0))
        for layer in zip(*held, strict=True):
            k, v = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*layer, strict=True))
            batch.learn(k, v, index)
        return len(prompts), batch, torch.cat(first)

    def step(self, batches: Sequence[SharedBatch], tokens: Tensor) -> Tensor:
        sizes = [len(batch.next) for batch in batches]
        layer = -1
        for batch in batches:
            batch.grow()

        def each(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
            nonlocal layer
            layer += 1
            parts = zip(batches, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            done = [batch.attend(layer, a, b, c, scale, window) for batch, a, b, c in parts]
            return done[0] if len(done) == 1 else torch.cat(done)

        position = torch.cat([batch.next for batch in batches])
        states = self.ask(each, tokens, position)
        for batch in batches:
            batch.own += 1
            batch.next += 1
        return logits(self.model, states)

    def ask(self, each: Callable[..., Tensor], tokens: Tensor, position: Tensor) -> Tensor:
        """[R, d] states of one token of every row, [R] at positions [R], where `each` attends in every layer."""
        return self._trunk(each, input_ids=tokens[None], position_ids=position[None], attention_mask=self.no_mask, use_cache=False)

    def _trunk(self, decode: Any, **given: Any) -> Tensor:
        with computing(self.model):
            out = trunk(self.model)(**given, decode=decode)
        return out.last_hidden_state[0].to(precision(self.model))


def _alike(lengths: Sequence[int]) -> list[slice]:
    """Cut descending lengths into batches that pad up to PADDING tokens each: every batch costs its calls in every layer and step."""
    parts, begin, padding = [], 0, 0
    for i, length in enumerate(lengths):
        padding += lengths[begin] - length
        if padding > PADDING:
            parts.append(slice(begin, i))
            begin, padding = i, 0
    return [*parts, slice(begin, len(lengths))]


def _pieces(lengths: Sequence[int]) -> list[slice]:
    """Cut into pieces of up to PREFILL tokens, one prompt at least."""
    parts, begin, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > begin and total + length > PREFILL:
            parts.append(slice(begin, i))
            begin, total = i, 0
        total += length
    return [*parts, slice(begin, len(lengths))]


# ---------------------------------------------------------------- transformers' own cache


class Roomy(DynamicLayer):
    """A cache layer with room set aside, written in place: concatenation would copy all of it at every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.store: list[Tensor] = []

    def _lay(self, keys: Tensor, values: Tensor) -> None:
        used = keys.shape[-2]
        self.store = [x.new_empty(*x.shape[:-2], used + self.room, x.shape[-1]) for x in (keys, values)]
        for store, x in zip(self.store, (keys, values), strict=True):
            store[..., :used, :] = x
        self._show(used)

    def _show(self, used: int) -> None:
        self.keys, self.values = (store[..., :used, :] for store in self.store)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states, value_states
        elif not self.store:
            keys, values = self._held()
            self._lay(torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2))
        else:
            used, new = self._held()[0].shape[-2], key_states.shape[-2]
            for store, x in zip(self.store, (key_states, value_states), strict=True):
                store[..., used : used + new, :] = x
            self._show(used + new)
        return self._held()

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None, "nothing is cached yet"
        assert self.values is not None, "nothing is cached yet"
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        keys, values = self._held()
        self._lay(keys.repeat_interleave(repeats, 0), values.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        keys, values = self._held()
        self._lay(keys[indices], values[indices])


class PaddedBatch:
    """Rows in transformers' cache. Rows that ended stay in it, unseen, until a quarter has."""

    def __init__(self, cache: DynamicCache, mask: Tensor, position: Tensor) -> None:
        self.cache, self.mask, self.position = cache, mask, position  # mask [B, width], position [B] of the next token
        self.live = torch.arange(len(mask), device=mask.device)  # [R] which line of the cache a row has

    def keep(self, rows: int, moves: Sequence[tuple[int, int]]) -> None:
        for to, source in moves:
            self.live[to] = self.live[source]
        self.live = self.live[:rows]
        if len(self.live) <= 0.75 * len(self.mask):  # copying the cache costs less than decoding a quarter of the rows for nothing
            self.cache.batch_select_indices(self.live)
            self.mask, self.position = self.mask[self.live], self.position[self.live]
            self.live = torch.arange(rows, device=self.mask.device)


class Padded(Decoder):
    """transformers' forward with its own cache, one call per batch."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def admit(self, prompts: Sequence[Sequence[int]], n: int, room: int) -> list[tuple[int, PaddedBatch, Tensor]]:
        longest = len(prompts[0])
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [Roomy(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        fed: dict[str, Tensor] = {"input_ids": ids}
        with adapters.acting(self.model):
            soft = adapters.soft(self.model)
        if soft is not None:
            mask = torch.cat([mask.new_ones(len(mask), soft.many), mask], -1)
            if soft.embeds is None:
                for i, layer in enumerate(self.model.get_prompt(len(mask)).layers):
                    cache.update(layer.keys, layer.values, i)
            else:
                words = self.model.get_input_embeddings()(ids)
                fed = {"inputs_embeds": torch.cat([soft.embeds.to(words.dtype).expand(len(mask), -1, -1), words], 1)}
        position = mask.cumsum(-1)
        first = self._forward(mask, (position - 1).clamp(min=0)[:, mask.shape[1] - next(iter(fed.values())).shape[1] :], cache, **fed)
        cache.batch_repeat_interleave(n)
        return [(len(prompts), PaddedBatch(cache, mask.repeat_interleave(n, 0), position[:, -1].repeat_interleave(n)), first)]

    def step(self, batches: Sequence[PaddedBatch], tokens: Tensor) -> Tensor:
        out = []
        for batch, new in zip(batches, tokens.split([len(batch.live) for batch in batches]), strict=True):
            fed = new.new_zeros(len(batch.mask)).index_copy_(0, batch.live, new)
            batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(fed), 1)], -1)
            out.append(self._forward(batch.mask, batch.position[:, None], batch.cache, input_ids=fed[:, None])[batch.live])
            batch.position = batch.position + 1
        return torch.cat(out)

    def _forward(self, mask: Tensor, position: Tensor, cache: DynamicCache, **fed: Tensor) -> Tensor:
        model, how = adapters.beneath(self.model), {"use_cache": True, "logits_to_keep": 1}
        with adapters.acting(self.model):
            out = model(**fed, attention_mask=mask, position_ids=position, past_key_values=cache, **how)
        return out.logits[:, -1].float()
