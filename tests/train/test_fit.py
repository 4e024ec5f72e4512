"""The loop: means that no split can change, steps that can be taken up again, and what stops it."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from temper.config import UserError
from temper.forest import Segment, plant
from temper.train import Loss, Optim, Step, Term, TrainingError, fit
from temper.train.fit import TIMINGS

PLAIN = Optim(lr=0.1, schedule="constant", warmup=0.0, max_grad_norm=0.0)
VOCABULARY = 7


class Bigram(nn.Module):
    """Logits of the next token from the one before, through a bottleneck; some noise, so that random states matter."""

    def __init__(self, noise: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 5)
        self.out = nn.Linear(5, VOCABULARY)
        self.drop = nn.Dropout(noise)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)

    def logp(self, forest):
        """[n] log-prob of the learned tokens."""
        at = forest.learned
        hidden = self.drop(self.embed(forest.tokens[forest.previous[at]]))
        return self.out(hidden).log_softmax(-1).gather(1, forest.tokens[at, None]).squeeze(1)


def nll(module, forest):
    logp = module.logp(forest)
    return Loss({"nll": Term(-(logp * forest.target[forest.learned]).sum(), "tokens")}, {"accuracy": ((logp > -1).sum(), logp.numel())})


def documents(n, seed=0):
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(n):
        tokens = rng.integers(0, VOCABULARY, rng.integers(2, 9)).tolist()
        trees.append([Segment(tokens, [0.0] + [float(rng.integers(1, 4))] * (len(tokens) - 1))])
    return trees


def numbers(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMINGS}


def one_step(module, groups, loss=nll, optim=PLAIN):
    return next(fit(module, lambda step: [plant(group) for group in groups], loss, steps=1, optim=optim))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))


def weighing(**weights):
    """A forest of two tokens that weighs what the test says."""
    return plant([[Segment([1, 2], [0.0, 1.0])]], weights)


def test_global_mean_not_the_mean_of_means():
    """Sums 6 and 4 over 2 and 8 tokens: 10/10, not (3 + .5)/2."""
    batches = [weighing(tokens=2.0), weighing(tokens=8.0)]
    sums = {2.0: 6.0, 8.0: 4.0}

    def loss(module, forest):
        return Loss(
            {"nll": Term(module.w * sums[forest.weights["tokens"]], "tokens")},
            {"m": (sums[forest.weights["tokens"]], forest.weights["tokens"])},
        )

    step = next(fit(Scale(), lambda step: batches, loss, steps=1, optim=PLAIN))
    for name in ("loss", "nll", "m", "grad_norm"):
        assert step.metrics[name] == pytest.approx(1.0, abs=1e-15)


def test_every_term_has_its_own_weight_and_coefficient():
    """(6 + 4)/(2 + 8) + .5 · (1 + 2 + 3·0)/(1 + 3) = 1.375; per-batch means would differ."""
    batches = [weighing(tokens=2.0, pairs=1.0), weighing(tokens=8.0, pairs=3.0)]
    values = {2.0: (6.0, 1.0), 8.0: (4.0, 2.0)}

    def loss(module, forest):
        a, b = values[forest.weights["tokens"]]
        return Loss({"a": Term(module.w * a, "tokens"), "b": Term(module.w * b, "pairs", 0.5)}, {})

    metrics = next(fit(Scale(), lambda step: batches, loss, steps=1, optim=PLAIN)).metrics
    assert metrics["a"] == pytest.approx(1.0)
    assert metrics["b"] == pytest.approx(0.75)
    assert metrics["loss"] == pytest.approx(1.375)
    assert metrics["grad_norm"] == pytest.approx(1.375)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [11, 1], [3, 4, 5]])
def test_no_split_into_micro_batches_changes_the_update(sizes):
    trees, groups = documents(12), []
    for size in sizes:
        groups.append(trees[sum(map(len, groups)) :][:size])
    whole, split = Bigram(), Bigram()
    a, b = one_step(whole, [trees]), one_step(split, groups)
    for x, y in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert numbers(b.metrics) == pytest.approx(numbers(a.metrics), rel=1e-12)


def test_gradient_is_that_of_the_weighted_mean():
    """Against autograd on the definition, document by document."""
    trees, module, plain = documents(4), Bigram(), Bigram()
    step = one_step(module, [trees[:1], trees[1:]])
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for [segment] in trees:
        ids = torch.tensor(segment.tokens)
        logp = plain.out(plain.embed(ids[:-1])).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        total = total - (logp * torch.tensor(segment.target[1:])).sum()
        weight += sum(segment.target)
    gradients = torch.autograd.grad(total / weight, list(plain.parameters()))
    assert step.metrics["loss"] == pytest.approx((total / weight).item(), rel=1e-12)
    assert step.metrics["grad_norm"] == pytest.approx(math.sqrt(sum(float((g**2).sum()) for g in gradients)), rel=1e-9)
    assert step.metrics["tokens"] == sum(len(t[0].tokens) for t in trees)
    shared = [weight for [segment] in trees for weight in segment.target if weight]
    assert step.metrics["tokens_learned"] == sum(max(1, weight) for weight in shared)  # a target of 2 is that of two records


def test_weights_are_counted_before_the_first_backward():
    """A source's forest may be changed by nobody; the loss of the first micro-batch is already divided by the whole step."""
    seen = []

    def loss(module, forest):
        seen.append(module.w.grad.item() if module.w.grad is not None else 0.0)
        return Loss({"nll": Term(module.w * 1.0, "tokens")}, {})

    next(fit(Scale(), lambda step: [weighing(tokens=1.0), weighing(tokens=3.0)], loss, steps=1, optim=PLAIN))
    assert seen == [0.0, 0.25]


def test_the_source_is_lazy():
    """The next batch is asked for only after the update, so that it can be sampled from the current weights."""
    asked, module = [], Scale()

    def source(step):
        asked.append((step, module.w.item()))
        return [weighing(tokens=1.0)]

    steps = fit(module, source, lambda m, f: Loss({"x": Term(m.w * 1.0, "tokens")}, {}), steps=3, optim=PLAIN)
    assert asked == []
    for n, step in enumerate(steps, 1):
        assert step.n == n
        assert len(asked) == n
        assert step.module is module
    weights = [w for _, w in asked]
    assert weights[0] > weights[1] > weights[2] > module.w.item()


def test_a_term_without_weight_in_a_step_has_no_share():
    loss = lambda m, f: Loss({"a": Term(m.w * 2, "tokens"), "b": Term(m.w * 0, "pairs")}, {"none": (0.0, 0.0)})  # noqa: E731
    metrics = next(fit(Scale(), lambda step: [weighing(tokens=1.0, pairs=0.0)], loss, steps=1, optim=PLAIN)).metrics
    assert metrics["loss"] == 2.0
    assert "none" not in metrics
    with pytest.raises(TrainingError, match="nothing to learn"):
        next(fit(Scale(), lambda step: [weighing(tokens=0.0, pairs=0.0)], loss, steps=1, optim=PLAIN))
    with pytest.raises(ValueError, match="per 'pairs'"):
        next(fit(Scale(), lambda step: [weighing(tokens=1.0)], loss, steps=1, optim=PLAIN))


def test_clipping():
    module = Scale()
    step = next(
        fit(
            module,
            lambda s: [weighing(tokens=1.0)],
            lambda m, f: Loss({"x": Term(m.w * 8, "tokens")}, {}),
            steps=1,
            optim=PLAIN.model_copy(update={"max_grad_norm": 2.0}),
        )
    )
    assert step.metrics["grad_norm"] == 8.0  # as it was before it was cut


# ---------------------------------------------------------------- resume


class Rollouts:
    """A source with a state: samples from the module, uses each rollout for two steps, draws from generators of its own."""

    def __init__(self, module):
        self.module, self.rng, self.beta, self.pending = module, np.random.Generator(np.random.Philox(7)), 0.1, None

    def __call__(self, step):
        if step % 2 == 0:
            starts = self.rng.integers(0, VOCABULARY, 6)
            with torch.no_grad():
                probabilities = self.module.out(self.module.embed(torch.tensor(starts))).softmax(-1)
            sampled = torch.multinomial(probabilities, 5, replacement=True).tolist()
            noise = random.random() + np.random.rand()
            self.pending = [plant([[Segment([int(a), *b], [0.0] + [self.beta + noise] * 5)]]) for a, b in zip(starts, sampled, strict=True)]
        return self.pending

    def metrics(self, step):
        self.beta *= 1.1
        return {"beta": self.beta}

    def state(self):
        return {"rng": self.rng.bit_generator.state, "beta": self.beta, "pending": [forest.tensors() for forest in self.pending]}

    def restore(self, state):
        from temper.forest import Forest

        self.rng.bit_generator.state = state["rng"]
        self.beta = state["beta"]
        self.pending = [Forest.from_tensors(tensors) for tensors in state["pending"]]


def rollout_run(resume=None, steps=6):
    module = nn.ModuleDict({"policy": Bigram(noise=0.3)})
    optim = Optim(lr=0.05, warmup=0.4, weight_decay=0.1, spike=3.0)
    source = Rollouts(module["policy"])
    return module, fit(module, source, lambda m, f: nll(m["policy"], f), steps=steps, optim=optim, seed=3, resume=resume)


def test_resumed_at_any_step_it_ends_bit_identical():
    module, steps = rollout_run()
    done = [(numbers(step.metrics), copy.deepcopy(step.snapshot())) for step in steps]
    end = copy.deepcopy(module.state_dict())
    assert len({metrics["loss"] for metrics, _ in done}) == 6
    for n, (_, state) in enumerate(done, 1):
        again, steps = rollout_run(resume=state)
        rest = list(steps)
        if n < 6:
            assert [numbers(step.metrics) for step in rest] == [metrics for metrics, _ in done[n:]]
        else:  # once more, so that the module can be had
            assert [(step.n, step.metrics) for step in rest] == [(6, {})]
            assert rest[0].module is again
        for name, value in again.state_dict().items():
            assert torch.equal(value, end[name]), (n, name)


def test_random_states_of_the_caller_do_not_matter():
    module, steps = rollout_run()
    for _ in steps:
        pass
    again, steps = rollout_run()
    for _ in steps:
        torch.rand(3), random.random(), np.random.rand()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    again, steps = rollout_run()
    assert len(list(steps)) == 6


def test_a_snapshot_of_another_step_is_refused():
    steps = rollout_run()[1]
    first = next(steps)
    next(steps)
    with pytest.raises(RuntimeError, match="step 1 asked for at step 2"):
        first.snapshot()


# ---------------------------------------------------------------- checks and guards


def test_check_before_the_first_update_leaves_no_trace():
    seen = []

    def check(module, batches):
        seen.append((len(batches), torch.is_grad_enabled()))
        torch.rand(5), random.random(), np.random.rand()

    def run(check, resume=None):
        module = Bigram(noise=0.5)
        steps = list(fit(module, lambda step: [plant(documents(3, step))], nll, steps=3, optim=PLAIN, check=check, resume=resume))
        return steps, module

    (with_check, a), (_, b) = run(check), run(None)
    assert seen == [(1, False)]
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    run(check, resume=with_check[-1].snapshot())
    assert len(seen) == 1  # only a fresh run is checked

    def fails(module, batches):
        assert False, "policy and reference differ by 0.31 nats"  # noqa: B011, PT015

    with pytest.raises(TrainingError, match=r"differ by 0\.31 nats"):
        run(fails)


def test_first_update_names_tensors_that_did_not_move():
    class Half(Bigram):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 3)
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    module = Half()
    [event] = one_step(module, [documents(3)]).events
    assert event["declared"] == 5
    assert event["changed"] == 3
    assert event["unchanged"] == event["zero_gradient"] == ["unused.weight", "unused.bias"]
    assert torch.equal(module.frozen, torch.ones(3))
    assert "2 of 5 tensors" in event["note"]
    [event] = one_step(Bigram(), [documents(3)]).events
    assert event == {"event": "first update", "declared": 3, "changed": 3}


def test_lora_a_waits_for_its_b():
    """A has no gradient while B is 0: no reason to warn, unless B has none either."""

    class Adapted(Bigram):
        def __init__(self, used):
            super().__init__()
            self.requires_grad_(False)
            self.lora_A, self.lora_B = (nn.ModuleDict({"own": nn.Linear(*sizes, bias=False).double()}) for sizes in ((5, 2), (2, 5)))
            nn.init.zeros_(self.lora_B.own.weight)
            self.embed.register_forward_hook(lambda _, given, made: made + used * self.lora_B.own(self.lora_A.own(made)))

    [event] = one_step(Adapted(1.0), [documents(3)]).events
    assert event == {"event": "first update", "declared": 2, "changed": 1, "waiting": 1}
    [event] = one_step(Adapted(0.0), [documents(3)]).events
    assert event["zero_gradient"] == ["lora_A.own.weight", "lora_B.own.weight"]


def test_nothing_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        next(fit(Scale().requires_grad_(False), lambda s: [], nll, steps=1, optim=PLAIN))
    with pytest.raises(TrainingError, match="does not depend"):
        one_step(Scale(), [documents(1)], lambda m, f: Loss({"x": Term(torch.ones(()), "tokens")}, {}))


def test_nan_loss_names_step_term_and_micro_batch_and_touches_nothing():
    module = Scale()

    def loss(m, forest):
        bad = float("nan") if forest.weights["tokens"] == 3 else 1.0
        return Loss({"fine": Term(m.w * 1, "tokens"), "policy": Term(m.w * bad, "tokens")}, {})

    def source(step):
        return [weighing(tokens=1.0), weighing(tokens=3.0 if step == 1 else 2.0)]

    steps = fit(module, source, loss, steps=3, optim=PLAIN)
    next(steps)
    w = module.w.item()
    with pytest.raises(TrainingError, match=r"step 2: loss term 'policy' is nan in micro-batch 2 of 2.*lower --lr") as caught:
        next(steps)
    assert isinstance(caught.value, UserError)
    assert module.w.item() == w


def test_infinite_gradient_of_a_finite_loss_is_found():
    """sqrt at 0: the value is 0, the slope is infinite."""
    module = Scale()

    def loss(m, forest):
        return Loss({"fine": Term(m.w * 1, "tokens"), "root": Term(((m.w - 1) * forest.weights["tokens"]).sqrt(), "tokens")}, {})

    with pytest.raises(TrainingError, match=r"step 1: the gradient of loss term 'root' is not finite at w in micro-batch 1 of 1"):
        next(fit(module, lambda s: [weighing(tokens=1.0)], loss, steps=1, optim=PLAIN))
    assert module.w.item() == 1.0


def test_spike_guard_leaves_the_update_out_and_its_memory_survives():
    def run(resume=None):
        module = Scale()
        loss = lambda m, f: Loss({"x": Term(m.w * f.columns["size"][0], "tokens")}, {})  # noqa: E731
        source = lambda step: [plant([[Segment([1, 2], [0.0, 1.0], columns={"size": [100.0 if step == 12 else 1.0 + step / 50] * 2})]])]  # noqa: E731
        return module, fit(module, source, loss, steps=14, optim=PLAIN.model_copy(update={"spike": 5.0}), resume=resume)

    module, steps = run()
    weights, states, skipped, events = [], [], [], []
    for step in steps:
        weights.append(module.w.item())
        states.append(copy.deepcopy(step.snapshot()))
        skipped.append(step.metrics["skipped"])
        events += [event for event in step.events if event["event"] == "spike"]
    assert skipped == [0.0] * 12 + [1.0, 0.0]
    assert weights[12] == weights[11] != weights[13]
    assert [event["grad_norm"] for event in events] == [100.0]
    module, steps = run(resume=states[11])
    assert [step.metrics["skipped"] for step in steps] == [1.0, 0.0]
    assert module.w.item() == weights[-1]


def test_two_metrics_of_one_name():
    loss = lambda m, f: Loss({"lr": Term(m.w * 1, "tokens")}, {})  # noqa: E731
    with pytest.raises(ValueError, match="lr"):
        one_step(Scale(), [documents(1)], loss)


def test_steps_are_named_tuples_with_the_metrics_that_are_promised():
    step = one_step(Bigram(), [documents(2)])
    assert isinstance(step, Step)
    assert set(step.metrics) == {"loss", "nll", "accuracy", "grad_norm", "lr", "tokens", "tokens_learned", "seconds", "tokens_per_second"}
