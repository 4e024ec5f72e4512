"""Memory that is short, activations that are not kept, products in bfloat16: the same update, or nearly, or one clear line."""

import copy
import shutil

import pytest
import torch
from test_fit import PLAIN, Bigram, documents, nll, numbers
from toy import train, values_of
from transformers import AutoModelForSequenceClassification

from temper.config import UserError
from temper.forest import Segment, plant
from temper.methods.preference import answer_logp
from temper.models.heads import scalar, token_logp, weighted_nll
from temper.models.load import Size, check_forest, compute_in, new_model
from temper.rollout import Request, Sampling, sample
from temper.runs import Run
from temper.train import Compute, Loss, Term, TrainingError, fit, machine
from temper.train.compute import Compiled, activations, blocks

SHORT = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"


def source(step):
    trees = documents(12, seed=step)
    return [plant(trees[:2]), plant(trees[2:])]


def holding(tokens, error=RuntimeError(SHORT), tried=None):
    """A loss on a machine whose memory holds so many tokens: a larger one fails in the middle of its backward pass."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise error

    def loss(module, forest):
        if tried is not None:
            tried.append(forest.T)
        out = nll(module, forest)
        if tokens >= forest.T:
            return out
        shown = Fails.apply(module.embed.weight)  # the gradients of `out` are there before this one fails
        term = out.terms["nll"]
        return out._replace(terms={"nll": term._replace(total=term.total + 0 * shown.sum())})

    return loss


@pytest.mark.parametrize("error", [RuntimeError(SHORT), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_update_is_the_same(error):
    plain, short, tried = Bigram(), Bigram(), []
    expected = list(fit(plain, source, nll, steps=3, optim=PLAIN))
    steps = list(fit(short, source, holding(20, error, tried), steps=3, optim=PLAIN))
    for a, b in zip(steps, expected, strict=True):
        assert numbers(a.metrics) == pytest.approx(numbers(b.metrics), rel=1e-12)
    for p, q in zip(plain.parameters(), short.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
    (event,) = [event for step in steps for event in step.events if event["event"] == "out of memory"]
    assert event in steps[0].events
    assert f"at most {event['limit']} tokens at a time" in event["note"]
    largest = source(0)[1].T
    assert tried[0] == largest  # longest first
    assert max(n for n in tried[1:] if n > 20) < largest
    assert all(n <= event["limit"] for n in tried[-5:])  # later steps do not try again what did not fit


def test_what_was_halved_stays_so_after_a_resume():
    module, tried = Bigram(), []
    steps = fit(module, source, holding(20), steps=4, optim=PLAIN)
    next(steps)
    state = copy.deepcopy(next(steps).snapshot())
    rest = [numbers(step.metrics) for step in steps]
    again = Bigram()
    loss = holding(20, tried=tried)
    assert [numbers(step.metrics) for step in fit(again, source, loss, steps=4, optim=PLAIN, resume=state)] == rest
    assert max(tried) <= 20
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))


def test_one_record_that_does_not_fit_is_said_in_one_line():
    module = Bigram()
    before = copy.deepcopy(module.state_dict())
    longest = max(len(tree[0].tokens) for tree in documents(12, seed=0))
    with pytest.raises(
        TrainingError, match=f"step 1: memory cannot hold one record of {longest} tokens; cut or drop long records"
    ) as error:
        list(fit(module, source, holding(longest - 1), steps=1, optim=PLAIN))
    assert "\n" not in str(error.value)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(fit(Bigram(), source, holding(20, RuntimeError("shapes do not match")), steps=1, optim=PLAIN))


# ---------------------------------------------------------------- measured memory


def hungry(module, forest):
    """A megabyte per token, kept until the backward pass."""
    held = torch.ones(forest.T, 1 << 18).sqrt()
    return Loss({"held": Term(module.out.bias[0] * held.mean() * forest.target.sum(), "tokens")}, {})


def long_documents(step):
    return [plant([[Segment([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0])] for _ in range(64)])]


def test_as_many_tokens_as_memory_holds(monkeypatch):
    """256 tokens of about a megabyte each; of 300 MB free, 80% may be taken."""
    monkeypatch.setattr(machine, "free_memory", lambda device: 300 << 20)
    compute = Compute(fit_memory=True)
    step = next(fit(Bigram(), long_documents, hungry, steps=1, optim=PLAIN, compute=compute))
    (limit,) = [event["limit"] for event in step.events if event["event"] == "memory measured"]
    if machine.peak_of(lambda: torch.ones(1 << 24).sqrt(), torch.device("cpu")) is None:
        pytest.skip("this system does not tell how much memory a process took")
    assert 60 <= limit <= 250
    assert step.snapshot()["limit"] == limit
    monkeypatch.setattr(machine, "free_memory", lambda device: None)
    assert next(fit(Bigram(), long_documents, hungry, steps=1, optim=PLAIN, compute=compute)).snapshot()["limit"] == 0


def test_the_machine_says_what_is_free_and_what_was_taken():
    free = machine.free_memory(torch.device("cpu"))
    taken = machine.peak_of(lambda: torch.ones(1 << 25).sum(), torch.device("cpu"))  # 128 MB
    if free is None or taken is None:
        pytest.skip("this system does not tell")
    assert free > 1 << 27
    assert 1 << 27 <= taken + (1 << 22) < 1 << 28


# ---------------------------------------------------------------- activations and precision


@pytest.fixture(scope="module")
def model():
    return new_model(Size(width=32, layers=3, heads=2), 101, seed=0)


def pairs(n=5):
    generator = torch.Generator().manual_seed(1)
    draw = lambda length: torch.randint(101, (length,), generator=generator).tolist()  # noqa: E731
    return plant([[Segment(draw(9 + i)), Segment(draw(5), [1.0] * 5, 0), Segment(draw(3 + i), [1.0] * (3 + i), 0)] for i in range(n)])


def gradients(model, how):
    model.zero_grad()
    with activations(model, how):
        loss = token_logp(model, pairs()).sum()
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_activations_recomputed_or_moved_give_the_same_gradients(model):
    kept = gradients(model, "keep")
    saved = {}
    for how in "recompute", "offload":
        for x, y in zip(gradients(model, how), kept, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    for how in "keep", "recompute":
        sizes: list[int] = []
        pack = lambda x: (sizes.append(x.numel()), x)[1]  # noqa: B023, E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), activations(model, how):
            token_logp(model, pairs())
        saved[how] = sum(sizes)
    assert saved["recompute"] < saved["keep"] / 2
    assert not any(part.training for part in model.modules())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling on a CPU takes a C++ compiler")
@pytest.mark.parametrize("how", ["keep", "recompute"])
def test_compiled_blocks_give_the_same_gradients_and_decode_as_they_are(model, how):
    before = gradients(model, "keep")
    request = Request([[1, 2, 3], [4, 5]], sampling=Sampling(max_new=8), stop=[0], seed=(0,))
    answers = sample(model, request)
    torch._dynamo.reset()
    compiled = Compiled(model)
    with compiled.used():
        assert all(block._compiled_call_impl is not None for block in blocks(model))
        for x, y in zip(gradients(model, how), before, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert sample(model, request) == answers


def test_bfloat16_products_with_float32_weights_and_losses(model):
    half, forest = copy.deepcopy(model), pairs()
    compute_in(half, "bfloat16")
    with torch.no_grad():
        logp, close = token_logp(half, forest), token_logp(model, forest)
        nll, near = weighted_nll(half, forest)[0], weighted_nll(model, forest)[0]
    assert logp.dtype == nll.dtype == torch.float32
    assert not torch.equal(logp, close)
    torch.testing.assert_close(logp, close, rtol=0.02, atol=0.05)
    torch.testing.assert_close(nll, near, rtol=0.01, atol=0.0)
    exact, rounded = gradients(model, "keep"), gradients(half, "recompute")
    assert all(x.dtype == torch.float32 for x in rounded)
    for x, y in zip(exact[1:], rounded[1:], strict=True):
        assert float((x - y).norm()) < 0.05 * float(x.norm())
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_a_model_is_its_own_reference_in_bfloat16(model):
    """Other packing, same precision: what DPO compares before its first step."""
    half = copy.deepcopy(model)
    compute_in(half, "bfloat16")
    with torch.no_grad():
        together = answer_logp(half, pairs(3))
        alone = answer_logp(half, pairs(1))
    torch.testing.assert_close(together[: len(alone)], alone, rtol=0, atol=0.05)


def test_rollouts_in_bfloat16(model):
    half = copy.deepcopy(model)
    compute_in(half, "bfloat16")
    how, prompts = Sampling(max_new=8), [[1, 2, 3], [4, 5]]
    (one, two), (same, _) = (sample(m, Request(prompts, sampling=how, stop=[0], seed=(0,))) for m in (half, model))
    assert one[0].logp != same[0].logp
    forest = plant(
        [[Segment(p, None), Segment(a[0].tokens, [1.0] * len(a[0].tokens), 0)] for p, a in zip(prompts, (one, two), strict=True)]
    )
    with torch.no_grad():
        torch.testing.assert_close(token_logp(half, forest), torch.tensor([*one[0].logp, *two[0].logp]), rtol=0.02, atol=0.05)


def test_scores_are_float32(model):
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, 0
    scorer = AutoModelForSequenceClassification.from_config(config).eval()
    check_forest(scorer)
    forest = pairs()
    exact = scalar(scorer, forest, forest.last)
    compute_in(scorer, "bfloat16")
    rounded = scalar(scorer, forest, forest.last)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo", "reward", "ppo"])
def test_a_stage_in_bfloat16_without_activations(toy, tmp_path, method):
    """Every check before the first update holds: policy and reference, ratio and its start, are rounded alike."""
    values = values_of(method, toy) | ({"rollouts": 2} if method == "ppo" else {"epochs": 0.5})
    train(method, tmp_path / "half", **values, precision="bfloat16", activations="recompute")
    train(method, tmp_path / "whole", **values)
    half, whole = (Run(tmp_path / name).rows("metrics")[0] for name in ("half", "whole"))
    assert half["grad_norm"] != whole["grad_norm"]
    assert half["loss"] == pytest.approx(whole["loss"], rel=0.05, abs=0.02)


def test_a_device_that_is_not_there_is_said_before_anything_is_loaded():
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(UserError, match=f"--device {missing}: PyTorch finds none here"):
        _ = Compute(device=missing).placed
    assert Compute().placed == {"device": "cpu", "precision": "auto"}
