"""The native rollout engine: batched decoding on any Hugging Face causal model. Floor 3.

Each prompt is computed once for its n samples; finished rows leave the batch; tokens are drawn by inverse CDF from uniform
numbers that belong to the row (its seed, its prompt, its sample), so a sample does not depend on what it was batched with.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from temper.config import Settings, UserError, opt
from temper.models.heads import computing


class Sampling(Settings):
    """How answers are drawn."""

    temperature: float = opt(1.0, "divides the logits before sampling; 0 takes the most likely token", ge=0)
    max_new: int = opt(48, "tokens an answer may have at most, the end token included", ge=1)
    rows: int = opt(256, "answers decoded at the same time", ge=1)


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. `logp[t]` is log p(tokens[t] | before), at the sampling temperature (1 for greedy)."""

    tokens: list[int]
    logp: list[float]
    finish: Literal["stop", "length"]


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop: Sequence[int],
    n: int = 1,
    seed: Sequence[int | str] = (0,),
    index: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[Rollout]]:
    """n answers to each prompt.

    Args:
        prompts: token ids, one list per prompt, none empty; with `max_new` each must fit the model's window.
        stop: ids that end an answer; the id that ended it is part of the answer.
        seed: with the prompt's index and the sample's, the key of the row's uniform numbers.
        index: of each prompt, where it is not its place in the list.
        progress: called with the number of prompts just finished.

    Returns:
        one list of n rollouts per prompt, in the order given.

    Raises:
        UserError: a prompt is empty or does not fit.
    """
    window = getattr(model.config, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i}: is empty; give it at least one token")
        if window and len(prompt) + sampling.max_new > window:
            long = f"{len(prompt)} tokens + --max-new {sampling.max_new} > the model's window of {window}"
            raise UserError(f"prompt {i}: {long}; shorten the prompt or --max-new")
    out: list[list[Rollout]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    width = max(1, sampling.rows // n)
    with torch.inference_mode(), plain_attention(model):
        for i in range(0, len(order), width):
            chosen = order[i : i + width]
            keys = [j if index is None else index[j] for j in chosen]
            for j, answers in zip(chosen, _decode(model, [prompts[j] for j in chosen], keys, n, sampling, stop, seed), strict=True):
                out[j] = answers
            if progress:
                progress(len(chosen))
    return out


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Within it the model runs with transformers' own attention over padded rows and a cache, not over forests."""
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    try:
        with computing(model):
            yield
    finally:
        model.set_attn_implementation(before)
        model.train(training)


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


def _cache(model: Any, room: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [Roomy(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def generator(*key: int | str) -> np.random.Generator:
    """The random numbers of a key, such as ("ppo", seed, rollout): other keys, other numbers."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def _uniforms(seed: Sequence[int | str], prompts: Sequence[int], n: int, length: int) -> Tensor:
    """[prompts * n, length] numbers in [0, 1), each row from its own key. As float32: rounded later it may be 1."""
    rows = [generator(*seed, p, k).random(length, dtype=np.float32) for p in prompts for k in range(n)]
    return torch.from_numpy(np.stack(rows))


def _decode(model, prompts, index, n, sampling: Sampling, stop, seed) -> list[list[Rollout]]:
    device = model.device
    lengths = torch.tensor([len(p) for p in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest + sampling.max_new, dtype=torch.long)
    for r, prompt in enumerate(prompts):
        ids[r, longest - len(prompt) :] = torch.tensor(prompt)
        mask[r, longest - len(prompt) :] = 1
    ids, mask, lengths = ids.to(device), mask.to(device), lengths.to(device)
    position = (mask[:, :longest].cumsum(-1) - 1).clamp(min=0)
    cache = _cache(model, sampling.max_new)
    out = model(
        input_ids=ids, attention_mask=mask[:, :longest], position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    logits = out.logits[:, -1].float().repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    mask, lengths = mask.repeat_interleave(n, 0), lengths.repeat_interleave(n, 0)

    rows = len(prompts) * n
    uniform = _uniforms(seed, index, n, sampling.max_new).to(device) if sampling.temperature else None
    tokens = torch.zeros(rows, sampling.max_new, dtype=torch.long, device=device)
    logp = torch.zeros(rows, sampling.max_new, device=device)
    count = torch.full((rows,), sampling.max_new, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    ends = torch.tensor(list(stop), device=device)
    alive = torch.arange(rows, device=device)  # which row each line of the batch still decodes
    live = torch.ones(rows, dtype=torch.bool, device=device)  # lines of the batch that have not ended
    for t in range(sampling.max_new):
        drawn, drawn_logp = _draw(logits, None if uniform is None else uniform[alive, t], sampling.temperature)
        here = alive[live]
        tokens[here, t], logp[here, t] = drawn[live], drawn_logp[live]
        ended = live & torch.isin(drawn, ends)
        count[alive[ended]], stopped[alive[ended]] = t + 1, True
        live = live & ~ended
        left = int(live.sum())
        if not left or t + 1 == sampling.max_new:
            break
        if left <= 0.75 * len(alive):  # copying the cache costs less than decoding a quarter of the rows for nothing
            cache.batch_select_indices(live.nonzero()[:, 0])
            alive, drawn, mask, lengths = alive[live], drawn[live], mask[live], lengths[live]
            live = torch.ones(left, dtype=torch.bool, device=device)
        mask[:, longest + t] = 1
        out = model(
            input_ids=drawn[:, None],
            attention_mask=mask[:, : longest + t + 1],
            position_ids=(lengths + t)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1].float()
    answers = [
        Rollout(tok[:c], lp[:c], "stop" if s else "length")
        for tok, lp, c, s in zip(tokens.tolist(), logp.tolist(), count.tolist(), stopped.tolist(), strict=True)
    ]
    return [answers[i : i + n] for i in range(0, rows, n)]


def _draw(logits: Tensor, uniform: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [R, V], uniform [R] -> tokens [R], their log-probabilities [R]. Inverse CDF: `multinomial` costs 1.1 to 1.4 times as much."""
    if uniform is None:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    every = (logits / temperature).log_softmax(-1)
    cdf = every.exp().cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], every.gather(-1, token)[:, 0]
