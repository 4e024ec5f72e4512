"""Training a rival: what it takes of memory and time here, and the rate and number of passes that are best.

Both are chosen on rows that neither train nor measure. The memory is the doctor's estimate; the speed is of some seconds of real steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from temper.advise.rivals import TRAINED, Rows, Trial, Way, answer_nll
from temper.checks import Case
from temper.checks.machine import BESIDE, Need, needed
from temper.config import UserError
from temper.data import sources
from temper.data.sharing import size
from temper.data.template import attach_default_template
from temper.data.trees import Report, chat_trees, limit_of
from temper.driver import progress
from temper.forest import Segment, Tree
from temper.methods.base import Batching, Corpus, Prepared
from temper.methods.sft import lm_loss, train_on
from temper.models.adapt import Adapter
from temper.models.load import load_policy, parameters_in, resize
from temper.records import Chat
from temper.rollout import generator
from temper.stats.intervals import Interval, mean_interval
from temper.train import Optim, TrainingError
from temper.train import machine as host

PROBE, STEPS = 3.0, 3  # seconds and steps for which training is timed, at least
RANDOM = 256  # tokens of a row, where there is no data


@dataclass
class Trained:
    """A trained rival: its model with the weights of its best epoch."""

    model: Any
    tokenizer: Any
    rate: float
    epochs: float
    rows: int
    dev_nll: float
    tried: dict[str, float | None] = field(default_factory=dict)  # rate -> NLL on the rows that choose; None: it diverged


class Cost(NamedTuple):
    """What training takes here: memory by the doctor's estimate, tokens per second by the clock."""

    need: Need
    speed: Interval
    tokens: float  # of a row, on average
    microbatch: int


class TooMuch(UserError):
    """A rival that is too large to be trained here."""


def load(s: Trial, name: str, kind: str) -> tuple[Any, Any]:
    """The model with what is to be trained of it, and a tokenizer with a chat template."""
    full = TRAINED[kind] == "full"
    free = host.free_memory(torch.device(s.device))
    if full and free is not None and (least := parameters_in(name) * (4.0 + BESIDE["adamw"])) > free:
        raise TooMuch(f"weights, gradients and optimiser take {least / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")
    model, tokenizer = load_policy(name, **s.compute.placed, adapters=Adapter(adapter=TRAINED[kind]), seed=s.seed)  # type: ignore[arg-type]
    if attach_default_template(tokenizer):
        resize(model, tokenizer)
    return model, tokenizer


def price(s: Trial, name: str, kind: str, rows: Sequence[Chat] | None, quiet: bool) -> Cost:
    """Estimate the memory, then time training for some seconds. rows: None: as many random tokens as a row may have.

    Raises TooMuch where it does not fit.
    """
    if not quiet:
        print(f"{kind}: measuring memory and speed", file=sys.stderr)
    model, tokenizer = load(s, name, kind)
    if rows is None:
        length, many = min(limit_of(model, s.window.max_length)[0] or RANDOM, RANDOM), 2 * s.batch
        ids = generator("advise", s.seed).integers(model.config.get_text_config().vocab_size, size=(many, length)).tolist()
        trees: Sequence[Tree] = [[Segment(row, [0.0] + [1.0] * (length - 1))] for row in ids]
        report = Report(rows=many)
    else:
        trees, report = chat_trees(tokenizer, rows, model, s.window)
    values = {"batch": s.batch, "tokens_per_microbatch": s.tokens_per_microbatch, "optimizer": "adamw"}
    corpus = Corpus([*(rows or [])], trees, sources.Report("data"), report)
    need = needed(Case("sft", values, "data", corpus.records, (), Prepared(corpus, tokenizer, model, lm_loss)))
    free = host.free_memory(next(model.parameters()).device)
    if free is not None and need.states + need.activations > 0.9 * free:
        raise TooMuch(f"training takes {(need.states + need.activations) / 1e6:,.0f} MB beside the weights, {free / 1e6:,.0f} MB are free")
    speeds: list[float] = []
    began = time.perf_counter()
    with progress(f"{kind}: timing", 1 + STEPS, 0, quiet) as show:
        for step in _steps(s, model, trees, 1e-6, 1000 * len(trees)):
            if step.n <= 1 + STEPS:
                show(step.n, step.metrics)
            speeds += [step.metrics["tokens_per_second"]] if step.n > 1 else []  # the first one makes the optimiser's memory
            if len(speeds) >= STEPS and time.perf_counter() - began > PROBE:
                break
    return Cost(need, mean_interval(speeds), sum(map(size, trees)) / len(trees), s.tokens_per_microbatch)


def _steps(s: Trial, model: Any, trees: Sequence[Tree], rate: float, epochs: float) -> Iterator[Any]:
    batching = Batching(batch=s.batch, epochs=epochs, tokens_per_microbatch=s.tokens_per_microbatch, seed=s.seed)
    return train_on(model, trees, batching, Optim(lr=rate, schedule="cosine", warmup=0.1), None, s.compute)


def train(s: Trial, name: str, kind: str, rate: float, rows: Rows, way: Way, epochs: float, quiet: bool) -> Trained | None:
    """Train on `rows.learn`, the weights stay that were best on `rows.dev`, before or after a pass.

    None: the loss became no number.
    """
    model, tokenizer = load(s, name, kind)
    trees, _ = chat_trees(tokenizer, rows.learn, model, s.window)
    dev = [way(tokenizer, chat).tree for chat in rows.dev]
    trained = [p for p in model.parameters() if p.requires_grad]
    best, kept, at = _mean_nll(s, model, dev), [p.detach().clone() for p in trained], 0.0
    total = Batching(batch=s.batch, epochs=epochs).steps(len(trees))
    each = max(1, -(-len(trees) // s.batch))
    with progress(f"{kind}, rate {rate:g}", total, 0, quiet) as show:
        try:
            for step in _steps(s, model, trees, rate, epochs):
                show(step.n, step.metrics)
                if step.n % each == 0 or step.n == total:
                    found = _mean_nll(s, model, dev)
                    if found < best:
                        best, at, kept = found, step.n / each, [p.detach().clone() for p in trained]
        except TrainingError:
            return None
    with torch.no_grad():
        for p, value in zip(trained, kept, strict=True):
            p.copy_(value)
    return Trained(model, tokenizer, rate, at, len(trees), best)


def _mean_nll(s: Trial, model: Any, trees: Sequence[Tree]) -> float:
    return sum(answer_nll(model, trees, s.tokens_per_microbatch)) / len(trees)


def best_rate(s: Trial, name: str, kind: str, rows: Rows, way: Way, epochs: float, quiet: bool) -> Trained:
    """The training whose rate is best on the rows that choose. Raises UserError where every rate diverged."""
    best: Trained | None = None
    tried: dict[str, float | None] = {}
    for rate in s.rates:
        found = train(s, name, kind, rate, rows, way, epochs, quiet)
        tried[f"{rate:g}"] = found.dev_nll if found else None
        if found and (best is None or found.dev_nll < best.dev_nll):
            best = found
    if best is None:
        raise UserError(f"the loss became no number at every rate of --rates {' '.join(tried)}; give smaller ones")
    best.tried = tried
    return best
