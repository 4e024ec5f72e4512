"""Checks of the run: batches in plain words, memory, the longest batch, policy equals reference. Floor 6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from temper.checks.registry import Case, Found, check, many, reward_models
from temper.config import UserError
from temper.data.packing import pack
from temper.data.sharing import size
from temper.data.store import sizes_of
from temper.forest import Forest, Tree, divide, plant
from temper.methods.base import Prepared
from temper.models.load import backbone, parameters_in, source
from temper.train import Compute, TrainingError, machine, ranks
from temper.train.compute import activations

BESIDE = {  # optimiser -> bytes that a trained parameter takes beside its weight
    "adamw": 16,  # gradient, two moments, the first step's copy
    "muon": 28,  # gradient, memory, copy; looking ahead, the updates, and what the iteration holds of matrices of one shape
}
MB = 1e6
TWICE = ("ppo", "grpo", "online-dpo", "constitution")  # methods that load a reference beside the policy
UNTRAINED = ("collect", "best-of-n")


def _all(p: Prepared) -> Sequence[Tree]:
    return (p.whole or p.corpus).trees


def longest(case: Case) -> tuple[list[Tree], list[str]]:
    """The trees of the largest micro-batch that can come up, and their rows: the longest rows of a step, packed."""
    p, s = case.prepared, case.settings
    if p is None or not _all(p):
        return [], []
    trees = [p.answered(tree) for tree in sorted(p.corpus.trees, key=lambda t: -size(t))[:64]] if p.answered else _all(p)
    sizes = sizes_of(trees)
    rows = -(-s.get("batch", s.get("prompts_per_step", 32)) // case.ranks)
    order = sorted(range(len(trees)), key=lambda k: -sizes[k])[: min(len(trees), rows)]
    group = max(pack([sizes[k] for k in order], s.get("tokens_per_microbatch", 8192)), key=lambda g: sum(sizes[order[i]] for i in g))
    chosen = [order[i] for i in group]
    return [trees[k] for k in chosen], [case.tree_at(k) for k in chosen] if not p.answered and not p.whole else []


@check(
    "batch",
    why="what a step is decides the learning rate it can bear, the time and the memory",
    do="set --batch, --epochs and --tokens-per-microbatch",
)
def batch(case: Case) -> Iterator[Found]:
    if case.prepared is not None and (line := arithmetic(case)):
        yield Found("note", line)
        rows, n = case.settings.get("batch"), len(_all(case.prepared))
        if rows and n < rows:
            yield Found("warning", f"{many(n, 'row')} in all, fewer than --batch {rows}: every step is all of them")


def arithmetic(case: Case) -> str:
    """Steps and batches in one plain sentence."""
    p, s, n = case.prepared, case.settings, len(_all(case.prepared)) if case.prepared else 0
    if p is None or not n:
        return ""
    mean, micro = sum(sizes_of(_all(p))) / n, s.get("tokens_per_microbatch", 8192)
    if "rollouts" in s:
        prompts, each, passes, parts = (s[k] for k in ("prompts_per_step", "samples_per_prompt", "epochs_per_batch", "minibatches"))
        return (
            f"{many(s['rollouts'], 'rollout')}, each {prompts} of {n:,} prompts x {many(each, 'answer')} = {prompts * each} answers"
            f" of at most {s['max_new']} tokens; each is gone over {many(passes, 'time')} in {many(parts, 'part')}:"
            f" {many(passes * parts, 'optimiser step')} a rollout, {s['rollouts'] * passes * parts:,} in all;"
            f" {_passes(s['rollouts'] * prompts / n)} over the prompts"
        )
    if "batch" not in s:
        return ""
    rows, what = min(s["batch"], n), "row" if case.rows else "window"
    parts = max(1, round(rows * mean / micro + 0.5))
    steps = case.steps or 0
    per = f" on {case.ranks} ranks" if case.ranks > 1 else ""
    return (
        f"{many(n, what)}; each optimiser step reads {rows} of them{per}, about {rows * mean:,.0f} tokens in"
        f" {'1 micro-batch' if parts == 1 else f'{parts} micro-batches'} of at most {micro:,}; {n / rows:.1f} steps are a pass over the"
        f" {what}s, {many(steps, 'optimiser step')} in all ({_passes(steps * rows / n)})"
    )


def _passes(n: float) -> str:
    return f"{n:.2g} pass{'' if f'{n:.2g}' == '1' else 'es'}"


def parameters(p: Prepared) -> tuple[int, int]:
    """(all, trained) parameters of the module, those of a backbone that its roles share among them, once."""
    parts = [part for module in p.module.modules() for part in (module, *getattr(module, "borrowed", tuple)())]
    every = {x for part in parts for x in part.parameters(recurse=False)}
    return sum(x.numel() for x in every), sum(x.numel() for x in every if x.requires_grad)


class Need(NamedTuple):
    """What training takes: counts, and bytes. activations: of the largest micro-batch, which has so many tokens; 0 where not measured."""

    parameters: int
    trained: int
    weights: float
    states: float  # gradients and optimiser
    activations: float
    tokens: int


def needed(case: Case) -> Need:
    """The estimate: weights, gradients and optimiser by count; activations measured on a part where the case is thorough."""
    assert case.prepared is not None
    every, trained = parameters(case.prepared)
    trees, _ = longest(case)
    tokens = sum(sizes_of(trees))
    each = _per_token(case, trees) if case.thorough else None
    return Need(every, trained, every * 4.0, float(trained * _beside(case.settings)), (each or 0.0) * tokens, tokens)


def _beside(values: Mapping[str, Any]) -> int:
    return BESIDE[values.get("optimizer", "adamw")]


def _free(device: torch.device, count: int) -> float | None:
    """Bytes that each of so many ranks may take: they share a machine's memory."""
    free = machine.free_memory(device)
    here = ranks.beside() if ranks.count() > 1 else count
    return free / here if free is not None and device.type == "cpu" else free


def adapted(values: Mapping[str, Any]) -> bool:
    """Whether what is trained is an adapter."""
    kind = values.get("adapter", "full")
    return kind not in ("auto", "full") or (kind == "auto" and backbone(values["model"]) != source(values["model"]))


def foresee(method: str, values: Mapping[str, Any], count: int) -> Iterator[Found]:
    """Before anything is loaded: whether the weights, gradients and optimiser alone are more than is free."""
    device = values.get("device", "cpu")
    if values.get("shard", "none") != "none" or (device != "cpu" and not getattr(torch, device).is_available()):
        return
    if values.get("quantise", "none") != "none":
        return  # four bits of a device's own
    model = parameters_in(values["model"]) if values.get("model") else 0
    judges = [parameters_in(folder) for folder in reward_models(values)]
    value = (judges or [model])[0] if method == "ppo" else 0
    if adapted(values):  # the reference is the adapter switched off, and adapters of one base share it
        loaded, trained = sum(map(parameters_in, {backbone(name) for name in (values["model"], *reward_models(values))})), 0
    else:
        loaded = model * (2 if method in TWICE else 1) + value + sum(judges)
        trained = 0 if method in UNTRAINED else model + value
    free, states = _free(torch.device(device), count), trained * _beside(values)
    if free is not None and (need := loaded * 4 + states) > free:
        what = f"{loaded / 1e6:.3g} million parameters take {loaded * 4 / MB:,.0f} MB of weights and {states / MB:,.0f} MB of"
        room = f"{free / MB:,.0f} MB are free{f' for each of {count} ranks' if count > 1 else ''}"
        yield Found("error", f"{what} gradients and optimiser, {need / MB:,.0f} MB in all; {room}: not loaded")


@check(
    "memory",
    why="training that runs out of memory does so at its longest batch, which may come hours later",
    do="lower --tokens-per-microbatch, use --activations recompute or --fit-memory, cut long rows (--max-length), or take a smaller model",
)
def memory(case: Case) -> Iterator[Found]:
    p = case.prepared
    if p is None:
        return
    free = _free(next(p.module.parameters()).device, case.ranks)
    need = needed(case)
    what = f"{need.parameters / 1e6:.3g} million parameters, {need.trained / 1e6:.3g} trained: {need.weights / MB:,.0f} MB of weights"
    what += f", {need.states / MB:,.0f} MB of gradients and optimiser"
    what += f", about {need.activations / MB:,.0f} MB of activations for {need.tokens:,} tokens" if need.activations else ""
    room = f"; {free / MB:,.0f} MB are free{f' for each of {case.ranks} ranks' if case.ranks > 1 else ''}" if free is not None else ""
    most = need.states + need.activations
    severity = "note" if free is None or most < 0.8 * free else "warning" if most < free else "error"
    yield Found(severity, what + room)  # type: ignore[arg-type]


def _per_token(case: Case, trees: Sequence[Tree]) -> float | None:
    """Bytes of activations per token, measured once."""
    if "per token" not in case.measured:
        case.measured["per token"] = _measured(case, trees)
    return case.measured["per token"]


def _measured(case: Case, trees: Sequence[Tree]) -> float | None:
    """By running two small parts of the longest micro-batch: a straight line through their peaks."""
    p = case.prepared
    if p is None or p.loss is None or not trees:
        return None
    whole, device = _plant(p, trees), next(p.module.parameters()).device
    if whole.T < 64:
        return None
    small, large = (divide(whole, max(1, whole.T // parts))[0] for parts in (8, 2))
    attempt(case, small, whole.weights)  # the first pass of all takes more than the others
    peaks = [machine.peak_of(lambda part=part: attempt(case, part, whole.weights), device) for part in (small, large)]  # type: ignore[misc]
    if None in peaks or large.T <= small.T or peaks[1] <= peaks[0]:  # type: ignore[operator]
        return None
    return (peaks[1] - peaks[0]) / (large.T - small.T)  # type: ignore[operator]


def _plant(p: Prepared, trees: Sequence[Tree]) -> Forest:
    return plant(list(trees), p.weigh(trees) if p.weigh else None).to(next(p.module.parameters()).device)


def attempt(case: Case, forest: Forest, weights: Mapping[str, float]) -> float:
    """A forward and backward pass as training makes it, without a trace; its loss by these weights. Raises what the pass raises."""
    p = case.prepared
    assert p is not None
    assert p.loss is not None
    kept = case.settings.get("activations", Compute().activations)
    try:
        with activations(p.module, kept):
            out = p.loss(p.module, forest)
            total: Any = sum(t.summed() * (t.coefficient / (weights[t.per] or 1.0)) for t in out.terms.values())
            if total.requires_grad:
                total.backward()
        return float(total.detach())
    finally:
        for parameter in p.module.parameters():
            parameter.grad = None


@check(
    "longest-batch",
    why="the longest rows decide whether training gets through, and they may come last",
    do="lower --tokens-per-microbatch, cut or drop long rows (--max-length, --too-long), or use --activations recompute",
)
def longest_batch(case: Case) -> Iterator[Found]:
    p = case.prepared
    if p is None or p.loss is None:
        return
    trees, rows = longest(case)
    if not trees:
        return
    tokens = sum(sizes_of(trees))
    free = _free(next(p.module.parameters()).device, case.ranks)
    if case.thorough and free is not None and (each := _per_token(case, trees)) and each * tokens > 0.9 * free:
        what = f"{tokens:,} tokens would take {each * tokens / MB:,.0f} MB of {free / MB:,.0f} MB that are free: not tried"
        yield Found("error", what, rows)
        return
    try:
        whole = _plant(p, trees)
        loss = attempt(case, whole, whole.weights)
    except (MemoryError, RuntimeError) as error:
        if not machine.out_of_memory(error):
            raise
        alone = len(trees) == 1
        what = f"{tokens:,} tokens do not fit into memory{'' if alone else '; training would halve such micro-batches'}"
        yield Found("error" if alone else "warning", what, rows)
        return
    except TrainingError as error:
        raise UserError(str(error)) from None
    if loss != loss or abs(loss) == float("inf"):
        yield Found("error", f"the loss of the longest micro-batch is {loss}", rows, "look at these rows and at the model's weights")
    else:
        yield Found("note", f"{tokens:,} tokens in {len(trees)} rows went forward and backward, loss {loss:.3g}", rows)


@check(
    "reference",
    why="the loss measures what the policy gains over its reference: they must be the same model at the start",
    do="train from the model whose log-probabilities are the reference; remove .references beside the run if it is damaged",
)
def reference(case: Case) -> Iterator[Found]:
    p = case.prepared
    if p is None or p.check is None:
        return
    trees, rows = longest(case)
    if not trees:
        return
    try:
        with torch.no_grad():
            p.check(p.module, [_plant(p, trees)])
    except AssertionError as error:
        yield Found("error", str(error), rows)
    else:
        yield Found("note", f"policy equals reference on {len(trees)} rows")
