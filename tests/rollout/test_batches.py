"""Continuous batching: rows that come and go, caches that grow and move, windows that slide; streams and stop strings."""

import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from temper.config import UserError
from temper.models.load import check_forest
from temper.models.tokenizer import train_tokenizer
from temper.rollout import Request, Sampling, decode, engine, kernel, sample, stream

V = 53
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
STOP = [3, 8, 20]


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.Module.eval(model)
    check_forest(model)
    return model


@pytest.fixture(scope="module")
def llama():
    return model_of(LlamaConfig(**SIZES))


def prompts(count, longest, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, V, random.integers(1, longest + 1)).tolist() for _ in range(count)]


def same(many, others):
    for a, b in zip((x for g in many for x in g), (x for g in others for x in g), strict=True):
        assert (a.tokens, a.finish, a.stop_reason) == (b.tokens, b.finish, b.stop_reason)
        np.testing.assert_allclose(a.logp, b.logp, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=11)],
    ids=["llama", "mistral"],
)
def test_waiting_prompts_take_the_places_of_rows_that_ended(config, monkeypatch):
    """Few places, prompts of all lengths, caches that grow twice, groups that end row by row: the same as each prompt alone."""
    monkeypatch.setattr(decode, "ROOM", 8)
    monkeypatch.setattr(decode, "PREFILL", 60)
    monkeypatch.setattr(decode, "PADDING", 30)
    model, asked, ages = model_of(config), prompts(14, 40), []
    step = decode.Shared.step
    monkeypatch.setattr(decode.Shared, "step", lambda self, b, t: (ages.append([x.own for x in b]), step(self, b, t))[1])
    sampling = Sampling(max_new=40, rows=12)
    many = sample(model, Request(asked, sampling=sampling, stop=STOP, n=3, seed=(4,)))
    assert any(len(set(of)) > 2 for of in ages), "no prompt was admitted while others were decoded"
    assert max(map(max, ages)) > 16
    alone = [sample(model, Request([p], sampling=sampling, stop=STOP, n=3, seed=(4,), index=[i]))[0] for i, p in enumerate(asked)]
    same(many, alone)


def test_shared_and_padded_agree(llama):
    slow = copy.deepcopy(llama)
    slow.forest_backend = "rows"
    how = {"sampling": Sampling(max_new=25, rows=16), "stop": STOP, "n": 4, "seed": (2,)}
    assert isinstance(decode.decoder(slow), decode.Padded)
    same(sample(llama, Request(prompts(9, 30), **how)), sample(slow, Request(prompts(9, 30), **how)))


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """The kernel compiled anew, into a folder of the test's."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    kernel.library.cache_clear()
    yield tmp_path
    kernel.library.cache_clear()


@pytest.mark.slow
def test_the_kernel_is_torch(compiler, monkeypatch):
    """With prompts that end, caches that grow, grouped heads, heads of odd size, windows shorter than prompt and answer."""
    monkeypatch.setattr(decode, "ROOM", 8)
    calls, attend = [], kernel.attend
    monkeypatch.setattr(kernel, "attend", lambda *x, **how: (calls.append(how["cut"]), attend(*x, **how))[1])
    odd = LlamaConfig(**(SIZES | {"head_dim": 6, "num_key_value_heads": 4}))
    for config in (LlamaConfig(**SIZES), MistralConfig(**SIZES, sliding_window=11), odd):
        model, how = model_of(config), {"stop": STOP, "n": 3, "seed": (6,)}
        calls.clear()
        mine = sample(model, Request(prompts(11, 40), sampling=Sampling(max_new=30, rows=12, kernel="c"), **how))
        assert calls
        same(mine, sample(model, Request(prompts(11, 40), sampling=Sampling(max_new=30, rows=12), **how)))
    assert [p.suffix for p in (compiler / "temper").iterdir()] == [".so"]


def test_without_a_compiler_torch_attends(compiler, llama, monkeypatch, caplog):
    want = sample(llama, Request(prompts(3, 9), sampling=Sampling(max_new=6), stop=STOP))
    for compiler_, said in (("no-such-compiler", "no C compiler"), ("false", "cannot be compiled")):
        monkeypatch.setenv("CC", compiler_)
        kernel.library.cache_clear()
        with caplog.at_level(logging.WARNING, "temper"):
            assert sample(llama, Request(prompts(3, 9), sampling=Sampling(max_new=6, kernel="c"), stop=STOP)) == want
        assert sum(said in r.message for r in caplog.records) == 1


def test_the_slow_way_is_said_once(llama, caplog, monkeypatch):
    monkeypatch.setattr(decode, "_told", set())
    slow = copy.deepcopy(llama)
    slow.forest_backend = "rows"
    with caplog.at_level(logging.WARNING, "temper"):
        for _ in range(2):
            sample(slow, Request([[1]], sampling=Sampling(max_new=2), stop=[]))
    assert [r.message for r in caplog.records if "slower" in r.message] == [
        "LlamaForCausalLM: its attention cannot share prompts; rollouts run on transformers' own cache, which is slower"
    ]


def test_the_weights_lie_transposed_while_rows_are_decoded_and_only_then(llama, monkeypatch):
    weight = llama.model.layers[0].mlp.up_proj.weight
    before, seen, step = weight.data_ptr(), [], decode.Shared.step
    monkeypatch.setattr(decode.Shared, "step", lambda self, b, t: (seen.append(weight.t().is_contiguous()), step(self, b, t))[1])
    request = Request(prompts(2, 6), sampling=Sampling(max_new=4), stop=[])
    with torch.inference_mode():
        sample(llama, request)
    assert seen == [True] * 3

    def told(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(llama, request, told)
    assert (weight.data_ptr(), weight.is_contiguous(), weight.is_inference()) == (before, True, False)


def test_a_model_that_was_not_checked_is_checked():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    sample(model, Request([[1, 2]], sampling=Sampling(max_new=2), stop=[]))
    assert model.forest_backend == "flash"


def test_parts_of_a_prefill():
    lengths = sorted(np.random.default_rng(0).integers(1, 900, 200).tolist(), reverse=True)
    for parts in (decode._alike(lengths), decode._pieces(lengths)):
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(200))
        assert len(parts) > 1
    assert all((part.stop - part.start) * lengths[part][0] - sum(lengths[part]) <= decode.PADDING for part in decode._alike(lengths))
    assert all(sum(lengths[part]) <= decode.PREFILL for part in decode._pieces(lengths))
    assert decode._pieces([9000, 5]) == [slice(0, 1), slice(1, 2)]


def test_a_stream_is_the_same_answers_as_they_come(llama):
    how = {"sampling": Sampling(max_new=20, rows=6), "stop": STOP, "n": 2, "seed": (5,)}
    asked = prompts(6, 12)
    want = sample(llama, Request(asked, **how))
    got: dict = {}
    ended = {}
    for token in stream(llama, Request(asked, **how)):
        assert (token.prompt, token.sample) not in ended
        got.setdefault((token.prompt, token.sample), []).append((token.token, token.logp))
        if token.rollout:
            ended[token.prompt, token.sample] = token.rollout
    assert [[ended[i, k] for k in range(2)] for i in range(6)] == want
    for (i, k), tokens in got.items():
        assert tokens == list(zip(want[i][k].tokens, want[i][k].logp, strict=True))


def test_a_stream_may_be_left_and_disturbs_nobody(llama):
    llama.train()
    tokens = stream(llama, Request([[1, 2, 3]], sampling=Sampling(max_new=50), stop=[]))
    first = next(tokens)
    assert llama.training
    assert not torch.is_inference_mode_enabled()
    loss = llama(input_ids=torch.tensor([[1, 2, 3]])).logits.sum()
    loss.backward()
    llama.zero_grad()
    assert next(tokens).token != -1
    assert first.rollout is None
    tokens.close()
    assert llama.training
    llama.eval()


def test_prompts_are_checked_before_the_first_token(llama):
    with pytest.raises(UserError, match="prompt 0: is empty"):
        stream(llama, Request([[]], sampling=Sampling(), stop=[]))


@pytest.fixture(scope="module")
def speaker():
    """A tokenizer, and a model over its tokens."""
    tokenizer = train_tokenizer(iter(["The red boat and the blue boat are at sea. Größe! " * 3]), 300)
    return model_of(LlamaConfig(**(SIZES | {"vocab_size": len(tokenizer)}))), tokenizer


def test_a_stop_string_ends_an_answer(speaker):
    """At the first token with which the text holds it, however tokens cut it."""
    model, tokenizer = speaker
    how = {"sampling": Sampling(max_new=40, repetition_penalty=1.1), "seed": (3,), "tokenizer": tokenizer, "n": 4}
    asked = [[5, 6], [7], [9, 10, 11]]
    free = [a for g in sample(model, Request(asked, stop=[], **how)) for a in g]
    texts = [tokenizer.decode(a.tokens) for a in free]
    strings = [next(t[i : i + 3] for i in range(12, len(t)) if t[i : i + 3].isascii() and len(t[i : i + 3]) == 3) for t in texts[:4]]
    ended = [a for g in sample(model, Request(asked, stop=strings, **how)) for a in g]
    assert {a.finish for a in ended} >= {"stop"}
    for a, whole in zip(ended, free, strict=True):
        assert a.tokens == whole.tokens[: len(a.tokens)]
        before, text = tokenizer.decode(a.tokens[:-1]), tokenizer.decode(a.tokens)
        assert not any(s in before for s in strings)
        if a.finish == "stop":
            assert a.stop_reason in strings
            assert a.stop_reason in text
        else:
            assert a.stop_reason is None
            assert len(a.tokens) == 40


def test_a_stop_string_that_never_comes_and_one_that_is_empty(speaker):
    model, tokenizer = speaker
    how = {"sampling": Sampling(max_new=6), "tokenizer": tokenizer}
    ((answer,),) = sample(model, Request([[5]], stop=["\x00never\x00"], **how))
    assert (answer.finish, answer.stop_reason, len(answer.tokens)) == ("length", None, 6)
    with pytest.raises(UserError, match="a stop string is empty"):
        sample(model, Request([[5]], stop=[""], **how))
    with pytest.raises(ValueError, match="need the tokenizer"):
        sample(model, Request([[5]], sampling=Sampling(max_new=6), stop=["x"]))


def test_which_id_ended_it(llama):
    for group in sample(llama, Request(prompts(5, 6), sampling=Sampling(max_new=30), stop=STOP, n=3)):
        for a in group:
            assert a.stop_reason == (a.tokens[-1] if a.finish == "stop" else None)


def test_a_penalty_counts_the_prompt_and_what_was_said(llama):
    """A huge one: no token comes twice while others are left."""
    sampling = Sampling(temperature=0, max_new=30, repetition_penalty=1e6, rows=8)
    asked = prompts(6, 8)
    for prompt, (answer,) in zip(asked, sample(llama, Request(asked, sampling=sampling, stop=[])), strict=True):
        logits = [t for t in answer.tokens if t in prompt]
        assert len(set(answer.tokens)) == len(answer.tokens)
        assert not logits


def test_memory_that_does_not_hold_the_rows(llama, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(decode.Shared, "step", step)
    with pytest.raises(UserError, match="--rows 7: out of memory; lower --rows"):
        sample(llama, Request([[1, 2]], sampling=Sampling(max_new=5, rows=7), stop=[]))


def test_groups_larger_than_the_places(llama):
    (group,) = sample(llama, Request([[1, 2]], sampling=Sampling(max_new=5, rows=4), stop=STOP, n=9))
    (wide,) = sample(llama, Request([[1, 2]], sampling=Sampling(max_new=5, rows=64), stop=STOP, n=9))
    same([group], [wide])


def test_the_engine_behind_the_interface(llama):
    """`sample` hands all it was given to another engine."""

    class Echo(engine.Engine):
        def sample(self, request, progress=None):
            return request

    request = Request([[1]], sampling=Sampling(), stop=[2], n=3, seed=(9,), index=[4])
    assert sample(Echo(), request) is request
