"""The native rollout engine: continuous batching on any Hugging Face causal model. Floor 3.

Prompts wait, longest first. Up to `rows` answers are decoded at a time; a row that ends leaves at once, and when a quarter of the rows is
free the next prompts are computed, each once for its n samples. How the model is run is in `decode.py`. Tokens are drawn by inverse CDF
from uniform numbers that belong to the row (its seed, its prompt, its sample), so a sample does not depend on what it was batched with,
up to the rounding of logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from temper.config import UserError
from temper.models.heads import computing
from temper.models.load import out_of_memory
from temper.rollout.decode import decoder, transposed
from temper.rollout.interface import Batch, Decoder
from temper.rollout.sampling import Sampling, draw, uniforms

REFILL = 0.25  # share of the rows that must be free before prompts are computed: one at a time, each would be a call of its own


@dataclass(frozen=True)
class Rollout:
    """One sampled answer. `logp[t]` is log p(tokens[t] | before) under the model's own distribution at the sampling temperature (1 for
    greedy), whatever truncation or penalty it was drawn with: what `temper.models.heads.token_logp` gives at that temperature.

    stop_reason: the id or the string that ended it; None where `finish` is "length". What ended it is part of the tokens.
    """

    tokens: list[int]
    logp: list[float]
    finish: Literal["stop", "length"]
    stop_reason: int | str | None = None


class Token(NamedTuple):
    """One token of a stream; `rollout` is the whole answer where this token ended it."""

    prompt: int
    sample: int
    token: int
    logp: float
    rollout: Rollout | None


@dataclass(frozen=True)
class Request:
    """What is asked of a model or another engine: n answers to each prompt.

    prompts: token ids, one list per prompt, none empty; with `max_new` each must fit the model's window.
    stop: ids and strings that end an answer; the token that ended it is part of the answer. Strings need the tokenizer.
    seed: with the prompt's index and the sample's, the key of the row's uniform numbers.
    index: of each prompt, where it is not its place in the list.
    """

    prompts: Sequence[Sequence[int]]
    _: KW_ONLY
    sampling: Sampling
    stop: Sequence[int | str]
    n: int = 1
    seed: Sequence[int | str] = (0,)
    index: Sequence[int] | None = None
    tokenizer: Any = None

    @property
    def keys(self) -> Sequence[int]:
        return range(len(self.prompts)) if self.index is None else self.index

    def check(self, model: Any) -> Stop:
        """When its answers end. Raises UserError for a prompt that is empty, does not fit the model's window or has tokens that it does not
        know, or an empty stop string."""
        config = model.config.get_text_config()
        window, vocabulary = getattr(config, "max_position_embeddings", None), config.vocab_size  # not every model has a window
        for i, prompt in enumerate(self.prompts):
            if not prompt:
                raise UserError(f"prompt {i}: is empty; give it at least one token")
            if max(prompt) >= vocabulary or min(prompt) < 0:
                unknown = next(token for token in prompt if not 0 <= token < vocabulary)
                raise UserError(f"prompt {i}: token {unknown} for a model of {vocabulary} tokens; use the model's own tokenizer")
            if window and len(prompt) + self.sampling.max_new > window:
                long = f"{len(prompt)} tokens + --max-new {self.sampling.max_new} > the model's window of {window}"
                raise UserError(f"prompt {i}: {long}; shorten the prompt or --max-new")
        return Stop(self.stop, self.tokenizer)


Progress = Callable[[int], None]  # told the number of prompts just finished


class Engine(ABC):
    """Another way to sample, such as `temper.rollout.vllm.VLLM`: what `sample` takes in the place of a model."""

    @abstractmethod
    def sample(self, request: Request, progress: Progress | None = None) -> list[list[Rollout]]:
        """As the function `sample`, which hands the request on."""


def sample(model: Any, request: Request, progress: Progress | None = None) -> list[list[Rollout]]:
    """The answers of a language model, or of another engine: one list of n rollouts per prompt, in the order given.

    Raises UserError where a prompt is empty, does not fit or has tokens of another vocabulary, and where a stop string is empty.
    """
    if isinstance(model, Engine):
        return model.sample(request, progress)
    run = _Run(model, request)
    out: list[dict[int, Rollout]] = [{} for _ in request.prompts]
    with _evaluating(model), transposed(model):
        while run.going:
            done = 0
            for token in run.step():
                if token.rollout:
                    out[token.prompt][token.sample] = token.rollout
                    done += len(out[token.prompt]) == request.n
            if progress and done:
                progress(done)
    return [[answers[k] for k in range(request.n)] for answers in out]


def stream(model: Any, request: Request) -> Iterator[Token]:
    """The tokens of the same answers as `sample`, as they come; those of one step stand together. May be left at any token.

    Another engine gives whole answers; their tokens follow one another when all of them are there.
    """
    return _told(model, request) if isinstance(model, Engine) else _stream(_Run(model, request))


def _told(engine: Engine, request: Request) -> Iterator[Token]:
    for i, group in enumerate(engine.sample(request)):
        for k, answer in enumerate(group):
            for t, (token, logp) in enumerate(zip(answer.tokens, answer.logp, strict=True), 1):
                yield Token(i, k, token, logp, answer if t == len(answer.tokens) else None)


def _stream(run: _Run) -> Iterator[Token]:
    while run.going:
        with _evaluating(run.model):
            tokens = run.step()
        yield from tokens


class Stop:
    """When an answer ends: at an id, or when its text holds a string."""

    def __init__(self, stop: Sequence[int | str], tokenizer: Any = None) -> None:
        self.ids = frozenset(s for s in stop if not isinstance(s, str))
        self.strings = [s for s in stop if isinstance(s, str)]
        self.tokenizer = tokenizer
        if "" in self.strings:
            raise UserError("a stop string is empty; it would end every answer at once")
        if self.strings and tokenizer is None:
            raise ValueError("stop strings need the tokenizer")
        self.tail = max((len(s.encode()) for s in self.strings), default=0) + 2  # a token holds a byte at least; two to spare

    def __call__(self, tokens: Sequence[int]) -> int | str | None:
        """The id or string that the last token brought, if any."""
        if tokens[-1] in self.ids:
            return tokens[-1]
        if self.strings:
            text = self.tokenizer.decode(tokens[-self.tail :], skip_special_tokens=False)
            return next((s for s in self.strings if s in text), None)
        return None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Within it the model runs with transformers' own attention over padded rows and a cache, not over forests."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        with _evaluating(model), computing(model):
            yield
    finally:
        model.set_attn_implementation(before)


class _Row(NamedTuple):
    prompt: int
    sample: int
    tokens: list[int]
    logp: list[float]


@dataclass
class _Live:
    """Rows that were admitted together, in the order of their batch."""

    batch: Batch
    rows: list[_Row]
    uniform: Tensor | None  # [R, max_new]
    seen: Tensor | None  # [R, V] for the repetition penalty
    fed: list[int] = field(default_factory=list)  # each row's newest token

    def keep(self, going: Sequence[bool]) -> None:
        """Rows that ended leave; the last ones take their places."""
        left = sum(going)
        holes = [i for i in range(left) if not going[i]]
        moves = list(zip(holes, (i for i in range(left, len(going)) if going[i]), strict=True))
        for to, source in moves:
            self.rows[to], self.fed[to] = self.rows[source], self.fed[source]
            for x in (self.uniform, self.seen):
                if x is not None:
                    x[to] = x[source]
        del self.rows[left:], self.fed[left:]
        self.uniform, self.seen = (None if x is None else x[:left] for x in (self.uniform, self.seen))
        self.batch.keep(left, moves)


class _Run:
    """One call of `sample` or `stream`: prompts that wait, and rows that are being decoded."""

    def __init__(self, model: Any, request: Request) -> None:
        self.stop = request.check(model)
        self.model, self.request, self.sampling, self.n = model, request, request.sampling, request.n
        self.waiting = sorted(range(len(request.prompts)), key=lambda i: (-len(request.prompts[i]), i))
        self.live: list[_Live] = []

    @cached_property
    def decoder(self) -> Decoder:
        return decoder(self.model, self.sampling.kernel == "c", self.sampling.graphs)

    @property
    def going(self) -> bool:
        return bool(self.waiting or self.live)

    def step(self) -> list[Token]:
        """One token of every row that is being decoded; of those that are now admitted, the first."""
        try:
            return self._step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"--rows {self.sampling.rows}: out of memory; lower --rows, --max-new or the samples per prompt") from None

    @torch.inference_mode()
    def _step(self) -> list[Token]:
        drawn = []
        if self.live:
            fed = torch.tensor([token for live in self.live for token in live.fed], device=self.model.device)
            uniform, seen = self._numbers(self.live)
            drawn.append(self.decoder.turn([live.batch for live in self.live], fed, uniform, self.sampling, seen))
        free = self.sampling.rows - sum(len(live.rows) for live in self.live)
        if self.waiting and (not self.live or free >= max(self.n, REFILL * self.sampling.rows)):
            drawn.append(self._admit(max(1, free // self.n)))
        return self._take(*(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*drawn, strict=True)))

    def _admit(self, many: int) -> tuple[Tensor, Tensor]:
        """Compute the next prompts -> their rows' first tokens and log-probs."""
        chosen, self.waiting = self.waiting[:many], self.waiting[many:]
        new, logits = [], []
        for count, batch, first in self.decoder.admit([self.request.prompts[i] for i in chosen], self.n, self.sampling.max_new):
            here, chosen = chosen[:count], chosen[count:]
            rows = [_Row(i, k, [], []) for i in here for k in range(self.n)]
            uniform = seen = None
            if self.sampling.temperature:
                uniform = uniforms(self.request.seed, [self.request.keys[i] for i in here], self.n, self.sampling.max_new).to(first.device)
            if self.sampling.repetition_penalty != 1:
                seen = torch.zeros(len(rows), first.shape[-1], dtype=torch.bool, device=first.device)
                for i, row in enumerate(rows):
                    seen[i, list(self.request.prompts[row.prompt])] = True
            new.append(_Live(batch, rows, uniform, seen))
            logits.append(first.repeat_interleave(self.n, 0))
        self.live += new
        uniform, seen = self._numbers(new)
        return draw(torch.cat(logits), uniform, self.sampling, seen)

    def _numbers(self, some: Sequence[_Live]) -> tuple[Tensor | None, Tensor | None]:
        """The uniform numbers of their rows' next tokens [R], and the tokens that the penalty is for [R, V]."""
        uniform = seen = None
        if self.sampling.temperature:
            uniform = torch.cat([live.uniform[:, len(live.rows[0].tokens)] for live in some if live.uniform is not None])
        if self.sampling.repetition_penalty != 1:
            seen = torch.cat([live.seen for live in some if live.seen is not None])
        return uniform, seen

    def _take(self, drawn: Tensor, drawn_logp: Tensor) -> list[Token]:
        """Hand out a token for every row; let go of those that end with it."""
        tokens, logp = drawn.tolist(), drawn_logp.tolist()
        out: list[Token] = []
        at = 0
        for live in self.live:
            live.fed = tokens[at : at + len(live.rows)]
            if live.seen is not None:
                live.seen.scatter_(1, drawn[at : at + len(live.rows), None], True)
            going = []
            for row, token, one in zip(live.rows, live.fed, logp[at : at + len(live.rows)], strict=True):
                row.tokens.append(token)
                row.logp.append(one)
                reason = self.stop(row.tokens)
                rollout = None
                if reason is not None:
                    rollout = Rollout(row.tokens, row.logp, "stop", reason)
                elif len(row.tokens) == self.sampling.max_new:
                    rollout = Rollout(row.tokens, row.logp, "length")
                going.append(rollout is None)
                out.append(Token(row.prompt, row.sample, token, one, rollout))
            at += len(going)
            if not all(going):
                live.keep(going)
        self.live = [live for live in self.live if live.rows]
        return out
