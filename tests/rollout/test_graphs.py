"""Steps of static shape against the ordinary decoder. On the CPU a tape stands for CUDA's graphs: like one it runs the recorded operations
again on the recorded tensors, so whatever should have changed between two steps and did not lie in a buffer would be seen."""

import contextlib
import copy
import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from temper.models.adapters import without_adapter
from temper.models.load import check_forest, compute_in
from temper.models.mix import Mixed
from temper.rollout import Request, Sampling, decode, engine, graphs, sample, stream

V = 53
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64, "initializer_range": 0.3}
GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 7, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA, layer_types=["sliding_attention", "full_attention"]),
}
WAITS = [
    "item",
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
    "lift_fresh",
]
STOP = [3, 8, 20, 31]


class Tape(TorchDispatchMode):
    """Operations as they come, refused where a CUDA recording would be: what asks for a value, or brings one from the host."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        by_mask = op.overloadpacket.__name__.startswith("index") and any(x.dtype == torch.bool and x.dim() for x in given[1:])
        if op.overloadpacket.__name__ in WAITS or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        out = op(*args, **(kwargs or {}))
        self.done.append((op, args, kwargs or {}, out))
        return out

    def __call__(self):
        for op, args, kwargs, out in self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch):
    """The buckets that were recorded; small ones, so that all of them grow."""
    made = []

    def record(run, slots):
        run()
        with Tape() as tape:
            run()
        for x in tree_leaves([out for _, args, _, out in tape.done]):
            assert x.device.type == "cpu"
        made.append(run.args[2])
        return tape

    monkeypatch.setattr(graphs, "TOKENS", 8)
    monkeypatch.setattr(engine, "transposed", contextlib.nullcontext)  # on CUDA the weights stay where they are
    monkeypatch.setitem(graphs.RECORD, "cpu", record)
    monkeypatch.setattr(graphs, "_kept", weakref.WeakKeyDictionary())
    monkeypatch.setattr(graphs, "_refused", weakref.WeakSet())
    return made


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    check_forest(model)
    return model


@pytest.fixture(scope="module")
def llama():
    return model_of(CONFIGS["llama"])


def prompts(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, V, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def ordinary(request):
    return Request(
        request.prompts, sampling=request.sampling.model_copy(update={"graphs": False}), stop=request.stop, n=request.n, seed=(4,)
    )


def both(model, sampling, count=11, n=3):
    """The answers by graphs; they are the ordinary ones, whatever came and went meanwhile."""
    request = Request(prompts(count, 20), sampling=sampling, stop=STOP, n=n, seed=(4,))
    mine, theirs = sample(model, request), sample(model, ordinary(request))
    for a, b in zip((x for g in mine for x in g), (x for g in theirs for x in g), strict=True):
        assert (a.tokens, a.finish, a.stop_reason) == (b.tokens, b.finish, b.stop_reason)
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)
    return mine


@pytest.mark.parametrize("name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def test_recorded_steps_give_the_same_answers(taped, name):
    """Rows end and are replaced, prompts wait, buckets shrink and caches grow: tokens, log-probs and ends are the ordinary decoder's."""
    both(model_of(CONFIGS[name]), Sampling(max_new=20, rows=12), count=9)
    assert len({b.rows for b in taped}) > 2
    assert len({b.prompts for b in taped}) > 1
    assert len({b.length for b in taped}) > 1
    assert len({b.room for b in taped}) == 3


@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.5}]
)
def test_every_way_of_drawing_is_recorded(taped, llama, how):
    both(llama, Sampling(max_new=6, rows=12, **how), count=4)
    assert taped


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_adapters(taped, kind):
    peft = pytest.importorskip("peft")
    how = {
        "lora": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj", "lm_head"], init_lora_weights=False
        ),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]()
    model = peft.get_peft_model(model_of(CONFIGS["llama"]), how).eval()
    check_forest(model)
    sampling = Sampling(max_new=10, rows=12)
    adapted = both(model, sampling, count=5)
    first, many = taped[0], len(taped)
    assert first not in taped[1:]
    with without_adapter(model):
        assert both(model, sampling, count=5) != adapted
    assert (first in taped[many:]) == (kind == "lora")  # what stands before the tokens is in the cache, not in the step


def test_in_bfloat16(taped):
    model = model_of(CONFIGS["llama"])
    compute_in(model, "bfloat16")
    request = Request(prompts(5, 20), sampling=Sampling(max_new=8, rows=12, temperature=0), stop=[], n=1)
    mine, theirs = (torch.tensor([g[0].logp[:1] for g in sample(model, r)]) for r in (request, ordinary(request)))
    assert taped
    torch.testing.assert_close(mine, theirs, atol=0.05, rtol=0)


def test_a_mixture_in_lockstep(taped, llama):
    both(Mixed([llama, model_of(CONFIGS["gpt2"], 1)], [0.4, 0.6]), Sampling(max_new=8, rows=12), count=5)
    assert {b.sampling for b in taped} == {None}


def test_the_next_call_goes_on_with_the_graphs_of_the_last(taped):
    """As long as the weights lie where they lay; what they are is read anew."""
    model, sampling = model_of(CONFIGS["llama"]), Sampling(max_new=10, rows=12)
    first = both(model, sampling, count=5)
    both(model, sampling, count=5)  # what was recorded before the caches had grown
    many, known = len(taped), set(graphs._kept[model].graphs)
    both(model, sampling, count=5)
    assert len(taped) == many
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.001)  # other log-probs, and the same tokens, so the same buckets
    assert both(model, sampling, count=5) != first
    assert len(taped) == many
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.001)
    both(model, sampling, count=5)
    assert known & set(taped[many:])
    copy.deepcopy(model)
    held = len(graphs._kept)
    del model
    gc.collect()
    assert len(graphs._kept) < held


def test_streams_side_by_side_and_one_that_is_left(taped, llama):
    request = Request(prompts(3, 9), sampling=Sampling(max_new=10, rows=4), stop=STOP, n=2)
    want = sample(llama, request)
    left = stream(llama, request)
    next(left)
    said = [{}, {}]
    for pair in zip(stream(llama, request), stream(llama, request), strict=True):
        for into, token in zip(said, pair, strict=True):
            if token.rollout:
                into[token.prompt, token.sample] = token.rollout.tokens
    left.close()
    for one in said:
        assert [[one[i, k] for k in range(2)] for i in range(3)] == [[a.tokens for a in g] for g in want]


def test_a_step_that_cannot_be_recorded_is_said_and_run(monkeypatch, caplog, llama):
    def refuses(run, slots):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setitem(graphs.RECORD, "cpu", refuses)
    model, sampling = copy.deepcopy(llama), Sampling(max_new=6, rows=12)
    with caplog.at_level(logging.WARNING, "temper"):
        for _ in range(2):
            both(model, sampling, count=5)
    said = [r.message for r in caplog.records if "CUDA graph" in r.message]
    assert said == [
        "LlamaForCausalLM: its step cannot be recorded as a CUDA graph (operation not permitted when stream is capturing); rollouts launch"
        " every kernel anew"
    ]
    assert isinstance(decode.decoder(model), decode.Shared)


def test_experts_that_are_chosen_by_value(taped, caplog):
    """A mixture of experts asks which were chosen: recorded where transformers can do without, said where not; right in both."""
    both(model_of(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)), Sampling(max_new=6), count=4)


def test_only_where_graphs_are(llama, monkeypatch):
    assert isinstance(decode.decoder(llama), decode.Shared)
    monkeypatch.setitem(graphs.RECORD, "cpu", lambda run, slots: run)
    assert isinstance(decode.decoder(llama), graphs.Static)
    assert isinstance(decode.decoder(llama, recorded=False), decode.Shared)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_card(name):
    model = model_of(CONFIGS[name]).to("cuda")
    check_forest(model)
    both(model, Sampling(max_new=30, rows=12))
    assert model not in graphs._refused
    assert graphs._kept[model].graphs
