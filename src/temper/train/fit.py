"""The training loop. There is one, and every method uses it. Floor 3.

A loss returns sums and the names of the weights that divide them; only this loop divides, by the weights of the whole
optimiser step, counted from the data before the first backward. Packing, accumulation and sharding then never change a mean.
"""

import hashlib
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from temper.config import UserError
from temper.forest import Forest, divide
from temper.models.adapters import dropping
from temper.runs import State
from temper.train import machine, ranks, shard
from temper.train.compute import Compiled, Compute, activations
from temper.train.optim import Optim, lr_at, optimizer

TIMINGS = ("seconds", "tokens_per_second")  # the only metrics that differ between two runs of the same seed
HISTORY = 50  # gradient norms that the spike guard looks back on
ADVICE = "the weights are as before it; lower --lr or --max-grad-norm, or look at this step's records"
ENOUGH = 10  # before so many it lets everything pass
SHARE = 0.8  # of the free memory that a micro-batch may take: its measured size is a prediction


class TrainingError(UserError):
    """Training cannot go on: a loss or gradient that is no number, or a check before the first update that failed."""

    code = 1


class Term(NamedTuple):
    """A part of the loss: a sum, and the name of the weight (in `forest.weights`) that divides it."""

    total: Tensor | Callable[[], Tensor]  # scalar; a function: computed only after the backward pass of the terms before it
    per: str  # "tokens", "pairs", ...
    coefficient: float = 1.0

    def summed(self) -> Tensor:
        """The sum, computed now where it was not."""
        return self.total if isinstance(self.total, Tensor) else self.total()


class Loss(NamedTuple):
    """What a loss returns for one micro-batch. Metrics are sums and weights too; one whose weight is 0 over the step is left out."""

    terms: dict[str, Term]
    metrics: dict[str, tuple[Tensor | float, Tensor | float]]


class Step(NamedTuple):
    """What `fit` yields after an update.

    metrics: loss, the mean of each term, the loss's own metrics, grad_norm, lr, tokens, tokens_learned, seconds,
    tokens_per_second, and what the source adds. snapshot(): the complete state to go on from here, not copied: save it, or
    copy it, before the next step. events: what happened beside the numbers. gather(): gives `module` its weights, which it lacks
    between steps where they are spread over ranks; all ranks must call it. None: it always has them.
    """

    n: int  # 1-based
    metrics: dict[str, float]
    snapshot: Callable[[], State]
    module: nn.Module
    events: list[dict]
    gather: Callable[[], None] | None = None


class Source(Protocol):
    """Where batches come from. It may also have state() and restore(state), metrics(step) -> dict and events(step) -> list of dict,
    asked after the update, and reads(step) -> bool: whether it will use the module's weights."""

    def __call__(self, step: int, /) -> Sequence[Forest]:
        """The micro-batches of the 0-based optimiser step; with several ranks, this rank's share of them."""
        ...


def seed_everything(seed: int, step: int) -> None:
    """Random states as a function of (seed, step), so that a resumed step draws what the uninterrupted one drew."""
    own = f"|{ranks.rank()}" if ranks.rank() else ""  # ranks draw different dropout
    digest = hashlib.sha256(f"{seed}|{step}{own}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    random.seed(int.from_bytes(digest[8:16], "big"))
    np.random.seed(int.from_bytes(digest[16:20], "big"))


def random_states() -> State:
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}


def restore_random(states: State) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])


def fit(
    module: nn.Module,
    source: Source,
    loss: Callable[[Any, Forest], Loss],
    *,
    steps: int,
    optim: Optim,
    seed: int = 0,
    resume: State | None = None,
    check: Callable[[Any, Sequence[Forest]], None] | None = None,
    multipliers: Mapping[str, float] | None = None,
    compute: Compute = Compute(),
) -> Iterator[Step]:
    """Yield a Step after every optimiser update. The caller logs, evaluates, saves or stops; there are no callbacks.

    `source(step)` is asked only after the update before it: one that samples from `module` always samples from the current
    weights. resume: a snapshot; the steps after it are bit-identical to those of the run it was taken from. A run resumed
    after its last step yields that step once more, without metrics, so that its module can be had. check: run without
    gradients on the first step's batches of a fresh run, before the first update; raises when something is wrong.
    multipliers: see `optimizer`. Dropout and train/eval modes are the caller's.

    The micro-batches are computed longest first, so that the most memory is asked for at once. One that does not fit is halved
    between its trees, with all that are as long from then on, and the step is computed again from its beginning: the update is that
    of a step that fitted.

    Raises TrainingError when a loss or gradient is not finite, or one tree alone does not fit, before the weights are touched.
    """
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("no parameter requires a gradient: nothing to train")
    training = _Training(module, source, loss, optim, multipliers, compute, steps, resume)
    resume = None  # as large as the weights and the optimiser together
    if training.done >= steps:
        yield Step(training.done, {}, partial(training.snapshot, training.done), module, [])
        return

    for step in range(training.done, steps):
        began = time.perf_counter()
        events: list[dict] = []
        seed_everything(seed, step)
        batches = training.ask(step)
        weights = ranks.all_sum(_count(batches))
        if not weights:
            raise ValueError(f"step {step + 1}: the source gave no batch")
        if step == 0 and check is not None:
            _check(check, module, batches)
        metrics = training.gradients(batches, weights, step, events)
        del batches
        metrics |= training.update(metrics["grad_norm"], lr_at(optim, step, steps), events)
        if hasattr(source, "metrics"):
            metrics = _join(metrics, source.metrics(step))
        if hasattr(source, "events"):
            events += source.events(step)
        seconds = time.perf_counter() - began
        metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        twin = training.twin
        yield Step(training.done, metrics, partial(training.snapshot, training.done), module, events, twin.gather if twin else None)
    if training.twin:
        training.twin.gather()


class _Training:
    """What the loop holds from step to step: the weights and their optimiser, and what a snapshot has beside them."""

    def __init__(
        self,
        module: nn.Module,
        source: Source,
        loss: Callable[[Any, Forest], Loss],
        optim: Optim,
        multipliers: Mapping[str, float] | None,
        compute: Compute,
        steps: int,
        resume: State | None,
    ) -> None:
        self.module, self.source, self.loss, self.optim, self.compute = module, source, loss, optim, compute
        self.done = self.limit = 0  # limit: tokens of a micro-batch; 0 = as the source gives them
        self.norms: list[float] = []
        if resume is not None:
            self.done, self.limit, self.norms = resume["step"], resume["limit"], list(resume["norms"])
            wrong = module.load_state_dict(resume["module"], strict=False)
            if wrong.unexpected_keys or set(wrong.missing_keys) - frozen(module):
                raise ValueError(f"a snapshot of another module: {sorted([*wrong.unexpected_keys, *wrong.missing_keys])[0]}")
        spread = compute.shard == "full" and ranks.count() > 1 and self.done < steps
        self.twin = shard.Twin(module) if spread else None
        self.trained = self.twin.module if self.twin else module
        self.trainable = {name: p for name, p in self.trained.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(self.trained, optim, multipliers)
        self.compiled = Compiled(self.trained).used if compute.compile else nullcontext
        if resume is not None:
            shard.resume(self.optimizer, resume["optimizer"])
            if hasattr(source, "restore"):
                source.restore(resume["source"])
            restore_random(resume["random"])

    def snapshot(self, n: int) -> State:
        """See `Step`."""
        if n != self.done:
            raise RuntimeError(f"snapshot of step {n} asked for at step {self.done}: the weights have moved on")
        still = frozen(self.trained)  # what an adapter stands on is read from its own folder
        state = {
            "step": n,
            "limit": self.limit,
            "module": {name: x for name, x in self.trained.state_dict().items() if name not in still},
            "optimizer": self.optimizer.state_dict(),
            "norms": list(self.norms),
            "random": random_states(),
        }
        return state | ({"source": self.source.state()} if hasattr(self.source, "state") else {})

    def ask(self, step: int) -> list[Forest]:
        """The source's batches, where the weights are."""
        if self.twin and hasattr(self.source, "reads") and self.source.reads(step):
            self.twin.gather()
        device = next(iter(self.trainable.values())).device
        return [batch.to(device) for batch in self.source(step)]

    def gradients(self, batches: Sequence[Forest], weights: Mapping[str, float], step: int, events: list[dict]) -> dict[str, float]:
        """Those of the whole step, on every rank, cut to the limit; its metrics, their norm before that included."""
        twin, trainable = self.twin, self.trainable
        if twin:
            twin.release()
        kept = self.compute.activations
        backward = partial(_backward, self.trained, loss=self.loss, weights=weights, step=step, kept=kept, compiled=self.compiled)
        if step == 0 and self.compute.fit_memory:
            self.limit = _fitting(backward, batches, trainable, spread=twin is not None)
            self.optimizer.zero_grad()
            note = f"at most {self.limit:,} tokens at a time" if self.limit else "no limit"
            events.append({"event": "memory measured", "limit": self.limit, "note": note})
        computed = _compute(backward, batches, self.limit, self.optimizer, spread=twin is not None)
        if computed.halved:
            self.limit = computed.limit
            note = f"{computed.halved}; from now on at most {self.limit:,} tokens at a time"
            events.append({"event": "out of memory", "limit": self.limit, "note": note})
        metrics = _measure(computed.batches, computed.parts, weights, step, computed.problem)
        if not twin:
            ranks.sum_gradients(trainable.values())
        norm = _grad_norm(trainable, self.optim.max_grad_norm)
        if not math.isfinite(norm):
            named = None if twin else ranks.agree(_blame(self.module, computed.batches, self.loss, weights, trainable, step))
            raise TrainingError(f"step {step + 1}: {named or 'the gradient is not finite'}; {ADVICE}")
        return metrics | {"grad_norm": norm}

    def update(self, norm: float, rate: float, events: list[dict]) -> dict[str, float]:
        """One step of the optimiser, left out where the gradient's norm spikes."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        guarded = self.optim.spike > 0
        spike = guarded and len(self.norms) >= ENOUGH and norm > self.optim.spike * statistics.median(self.norms)
        self.norms = [*self.norms, norm][-HISTORY:] if guarded else []
        if spike:
            note = "the update was left out"
            events.append({"event": "spike", "grad_norm": norm, "median": statistics.median(self.norms[:-1]), "note": note})
        else:
            before = {name: shard.own(p.detach()).clone() for name, p in self.trainable.items()} if self.done == 0 else None
            self.optimizer.step()
            if before is not None:
                events.append(_changed(self.trainable, before))
        self.optimizer.zero_grad()
        self.done += 1
        return {"lr": rate} | ({"skipped": float(spike)} if guarded else {})


def frozen(module: nn.Module) -> set[str]:
    """Names of the parameters that do not learn, under every name they have."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _count(batches: Sequence[Forest]) -> dict[str, float]:
    """Weights by name over the step: the denominators."""
    found: dict[str, float] = defaultdict(float)
    for batch in batches:
        for name, weight in batch.weights.items():
            found[name] += float(weight)
    return found


class Computed(NamedTuple):
    """What the micro-batches of a step gave; their gradients are added up."""

    batches: list[Forest]  # as they were computed
    parts: list[Loss]
    limit: int  # tokens of a micro-batch from now on
    halved: str = ""  # what did not fit, if anything
    problem: str | None = None  # why the step cannot be computed


def _compute(
    backward: Callable[..., Loss], batches: Sequence[Forest], limit: int, optimizer: torch.optim.Optimizer, *, spread: bool
) -> Computed:
    """Gradients of the step's micro-batches, again from the beginning with smaller ones when one does not fit into memory.

    spread: the ranks hold parts of the weights and wait for each other in every pass, so each makes as many, and none makes one again.
    """
    halved = ""
    while True:
        planned = list(batches) if not limit else [piece for batch in batches for piece in divide(batch, limit)]
        planned.sort(key=lambda batch: -batch.T)
        idle = _idle(planned) if spread else []
        parts: list[Loss] = []
        try:
            for batch in planned:
                parts.append(backward(batch))
            for batch in idle:
                backward(batch, scale=0.0)
            return Computed(planned, parts, limit, halved)
        except (MemoryError, RuntimeError) as error:
            if not machine.out_of_memory(error):
                raise
        failed = [*planned, *idle][len(parts)]  # out of the handler: what the attempt held is free once its traceback is
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if failed.trees == 1:
            advice = "cut or drop long records (--max-length, --too-long), or try --activations recompute"
            problem = f"memory cannot hold one record of {failed.T:,} tokens; {advice}"
        elif spread:
            problem = f"memory cannot hold a micro-batch of {failed.T:,} tokens; lower --tokens-per-microbatch, or use --fit-memory"
        else:
            limit, halved = failed.T // 2, f"a micro-batch of {failed.T:,} tokens did not fit into memory"
            continue
        if spread:
            raise TrainingError(problem)  # at once: the others wait for this rank inside the model
        return Computed([], [], limit, halved, problem)


def _idle(batches: Sequence[Forest]) -> list[Forest]:
    """Micro-batches without effect, so that this rank makes as many passes as the one that has most."""
    counts = ranks.gather(len(batches))
    there = ranks.gather(batches[0].tensors() if batches else None) if 0 in counts else []
    some = batches[-1] if batches else Forest.from_tensors(next(x for x in there if x))
    return [some] * (max(counts) - len(batches))


def _fitting(backward: Callable[..., Loss], batches: Sequence[Forest], trainable: Mapping[str, nn.Parameter], *, spread: bool) -> int:
    """How many tokens fit into memory at a time, on every rank: a straight line through the peaks of two sizes. 0: it cannot be said."""
    longest = max([*batches, *(_idle(batches) if spread else [])], key=lambda batch: batch.T, default=None)
    device = next(iter(trainable.values())).device
    free = machine.free_memory(device)
    limit = 0
    if longest is not None and free is not None:
        small, large = (divide(longest, longest.T // parts)[0] for parts in (8, 2))
        backward(small, scale=0.0)  # the first pass of all takes more than the others
        low, high = (machine.peak_of(partial(backward, piece, scale=0.0), device) for piece in (small, large))
        if low is not None and high is not None and high > low and large.T > small.T:
            each = (high - low) / (large.T - small.T)
            later = 12 * sum(shard.own(p).numel() for p in trainable.values())  # the optimiser's two states, the first step's copy
            room = SHARE * (free / (ranks.beside() if device.type == "cpu" else 1) - later) - (low - each * small.T)
            limit = max(1, int(room / each)) if room < each * 1e9 else 0
            limit = limit // 256 * 256 or limit  # the same again where a little more or less is free
    return min((n for n in ranks.gather(limit) if n), default=0)


def _terms(
    module: nn.Module, batch: Forest, loss: Callable, weights: Mapping[str, float], step: int
) -> Iterator[tuple[Loss, dict[str, Tensor]]]:
    """The loss of one micro-batch with the terms that are computed together, and their shares of the step's loss: first all that are
    there, then those that are functions one by one, so that the activations of two are not held at once. A term whose weight is 0 has no
    share."""
    out = loss(module, batch)
    for name, term in out.terms.items():
        if term.per not in weights:
            raise ValueError(f"step {step + 1}: loss term {name!r} is per {term.per!r}; the batches weigh {sorted(weights)}")
    if all(weights[term.per] == 0 for term in out.terms.values()):
        raise TrainingError(f"step {step + 1}: nothing to learn: the weights of all loss terms are 0; look at this step's records")
    later = {name: term for name, term in out.terms.items() if callable(term.total)}
    there = {name: term for name, term in out.terms.items() if name not in later}
    first = Loss(there, out.metrics)
    del out
    while True:
        yield (
            first,
            {
                name: term.summed() * (term.coefficient / weights[term.per])
                for name, term in first.terms.items()
                if weights[term.per] != 0 and term.summed().requires_grad
            },
        )
        if not later:
            return
        name = next(iter(later))
        term = later.pop(name)
        first = Loss({name: term._replace(total=term.summed())}, {})


def _backward(
    module: nn.Module,
    batch: Forest,
    *,
    loss: Callable,
    weights: Mapping[str, float],
    step: int,
    kept: str,
    compiled: Callable[[], AbstractContextManager],
    scale: float = 1.0,
) -> Loss:
    """Adds the micro-batch's gradients times `scale`. Gives its loss back without the graph. kept: what is, of the activations."""
    terms: dict[str, Term] = {}
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {}
    with activations(module, kept), dropping(module), compiled():
        for out, shares in _terms(module, batch, loss, weights, step):
            if shares:
                total = cast(Tensor, sum(shares.values()))
                (total if scale == 1.0 else total * scale).backward()
            terms |= {name: term._replace(total=term.summed().detach()) for name, term in out.terms.items()}
            metrics |= {name: (_detached(total), _detached(weight)) for name, (total, weight) in out.metrics.items()}
    return Loss(terms, metrics)


def _detached(x: Tensor | float) -> Tensor | float:
    return x.detach() if isinstance(x, Tensor) else x


def _measure(
    batches: Sequence[Forest], parts: Sequence[Loss], weights: Mapping[str, float], step: int, problem: str | None
) -> dict[str, float]:
    """Means over the step and all ranks: each sum by its weight, once.

    Raises TrainingError on all ranks for the problem that one has, and naming the term that is not finite.
    """
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for i, part in enumerate(parts):
        for name, term in part.terms.items():
            value = float(term.summed())
            if not math.isfinite(value):
                problem = problem or f"loss term {name!r} is {value} in micro-batch {i + 1} of {len(parts)}; {ADVICE}"
            if weights[term.per] != 0:
                sums["term", name] += value / weights[term.per]
                sums["loss", "loss"] += term.coefficient * value / weights[term.per]
        for name, (value_sum, weight) in part.metrics.items():
            sums["sum", name] += float(value_sum)
            sums["weight", name] += float(weight)
    for batch in batches:
        sums["count", "tokens"] += batch.T
        sums["count", "tokens_learned"] += int(batch.target[batch.target != 0].clamp(min=1).sum())  # for each record that shares it
    told = ranks.gather((problem, dict(sums)))
    problem = next((their for their, _ in told if their), None)
    if problem:
        raise TrainingError(f"step {step + 1}: {problem}")
    over_ranks = ranks.summed(part for _, part in told)

    def of(kind: str) -> dict[str, float]:
        return {name: value for (k, name), value in over_ranks.items() if k == kind}

    count = of("weight")
    own = {name: value / count[name] for name, value in of("sum").items() if count[name] != 0}
    return _join(_join(of("loss"), of("term")) | of("count"), own)


def _join(metrics: dict[str, float], more: Mapping[str, float]) -> dict[str, float]:
    taken = (metrics.keys() | set(TIMINGS) | {"grad_norm", "lr", "tokens", "tokens_learned"}) & more.keys()
    if taken:
        raise ValueError(f"two metrics of one name: {sorted(taken)}")
    return {**metrics, **{name: float(value) for name, value in more.items()}}


def _grad_norm(trainable: Mapping[str, nn.Parameter], limit: float) -> float:
    """Global norm of the gradient; cuts the gradient to `limit` (0 = does not)."""
    gradients = [p.grad for p in trainable.values() if p.grad is not None]
    if not gradients:
        raise TrainingError("the loss does not depend on any trainable parameter: there is nothing to train")
    norm = shard.full(torch.nn.utils.get_total_norm(gradients))
    if limit > 0 and math.isfinite(float(norm)):
        torch.nn.utils.clip_grads_with_norm_(trainable.values(), limit, norm)
    return float(norm)


def _blame(module: nn.Module, batches: Sequence[Forest], loss: Callable, weights: Mapping, trainable: Mapping, step: int) -> str | None:
    """Which term of which micro-batch makes a gradient that is not finite, and in which tensor: computed again, one at a time."""
    for i, batch in enumerate(batches):
        shares: dict[str, Tensor] = {}
        for _, some in _terms(module, batch, loss, weights, step):
            shares |= some
        for name, share in shares.items():
            gradients = torch.autograd.grad(share, list(trainable.values()), allow_unused=True, retain_graph=True)
            for tensor, gradient in zip(trainable, gradients, strict=True):
                if gradient is not None and not bool(torch.isfinite(gradient).all()):
                    where = f"micro-batch {i + 1} of {len(batches)}"
                    return f"the gradient of loss term {name!r} is not finite at {tensor} in {where}"
    return None


def _check(check: Callable[[Any, Sequence[Forest]], None], module: nn.Module, batches: Sequence[Forest]) -> None:
    """Runs the check without gradients and without a trace in the random states."""
    states = random_states()
    problem = None
    try:
        with torch.no_grad():
            check(module, batches)
    except AssertionError as error:
        problem = str(error)
    finally:
        restore_random(states)
    problem = ranks.agree(problem)
    if problem:
        raise TrainingError(f"check before the first update: {problem}")


def _changed(trainable: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> dict:
    """Which tensors the first update moved on any rank, against those declared trainable.

    LoRA's A has no gradient while B is 0, as it starts (arXiv:2106.09685): where its B has one, it is waiting, and nothing is wrong.
    """

    def anywhere(true: Mapping[str, bool]) -> list[str]:
        return [name for name, n in ranks.all_sum({name: float(x) for name, x in true.items()}).items() if n]

    moved = anywhere({name: not torch.equal(shard.own(p.detach()), before[name]) for name, p in trainable.items()})
    pushed = anywhere({name: p.grad is not None and bool(shard.own(p.grad).any()) for name, p in trainable.items()})
    unchanged = [name for name in trainable if name not in moved]
    zero = [name for name in trainable if name not in pushed]  # weight decay moves these too
    event = {"event": "first update", "declared": len(trainable), "changed": len(trainable) - len(unchanged)}
    begun = anywhere({name: bool(x.any()) for name, x in before.items()})
    waits = {name for name in zero if (b := name.replace("lora_A", "lora_B")) in pushed and b not in begun}  # B starts at 0
    still = [name for name in dict.fromkeys([*unchanged, *zero]) if name not in waits]
    if waits:
        event["waiting"] = len(waits)
    if still:
        names = ", ".join(still[:4]) + (f" and {len(still) - 4} more" if len(still) > 4 else "")
        event |= {
            "unchanged": [name for name in unchanged if name not in waits],
            "zero_gradient": [name for name in zero if name not in waits],
            "note": f"{len(still)} of {len(trainable)} tensors did not move, or got no gradient: {names}",
        }
    return event
