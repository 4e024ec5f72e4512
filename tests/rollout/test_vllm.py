"""The vLLM engine against a small HTTP server in this process that answers as vLLM's does, samples with the native engine, and can fail."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm_server import Server

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models.heads import token_logp
from temper.models.load import check_forest
from temper.models.tokenizer import train_tokenizer
from temper.rollout import Request, Sampling, sample, stream
from temper.rollout.vllm import VLLM

PROMPTS = [[5, 7, 9], [11], [4, 4, 8, 15, 16]]
STOP = [3, 8, 20, 30]


def model_of(seed, vocab=61):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config.max_position_embeddings, config.initializer_range = 64, 0.3
    model = AutoModelForCausalLM.from_config(config).eval()
    check_forest(model)
    return model


@pytest.fixture(scope="module")
def policy():
    return model_of(0)


@pytest.fixture
def server(policy):
    server = Server(policy)
    yield server
    server.shutdown()
    server.server_close()


HOW = {"sampling": Sampling(max_new=9), "stop": STOP, "n": 3, "seed": ("x", 1)}


def test_the_same_interface(policy, server):
    engine, told = VLLM(server.url, policy), []
    groups = sample(engine, Request(PROMPTS, **HOW), progress=told.append)
    assert [len(g) for g in groups] == [3, 3, 3]
    assert sum(told) == 3
    trees = [
        [Segment(p, [0.0] * len(p)), *(Segment(a.tokens, [1.0] * len(a.tokens), parent=0) for a in group)]
        for p, group in zip(PROMPTS, groups, strict=True)
    ]
    with torch.no_grad():
        here = token_logp(policy, plant(trees))
    torch.testing.assert_close(torch.tensor([x for g in groups for a in g for x in a.logp]), here, atol=1e-5, rtol=1e-5)
    assert engine.gap.mean < 1e-5
    assert engine.gap.tokens == len(here)
    assert {a.finish for g in groups for a in g} == {"stop", "length"}
    assert all(a.stop_reason == (a.tokens[-1] if a.finish == "stop" else None) for g in groups for a in g)
    assert sample(engine, Request(PROMPTS, **HOW)) == groups
    assert sample(engine, Request(PROMPTS[1:], index=[1, 2], **HOW)) == groups[1:]
    assert sample(engine, Request(PROMPTS, **HOW | {"seed": ("x", 2)})) != groups
    assert len({tuple(a.tokens) for a in groups[0]}) == 3


def test_what_is_asked(policy, server):
    s = Sampling(max_new=4, temperature=1.0, top_p=0.9, top_k=0, min_p=0.0, repetition_penalty=1.0)
    sample(VLLM(server.url, policy, name="mine"), Request([[1, 2]], sampling=s, stop=[7, 3]))
    (asked,) = server.asked
    assert asked["prompt"] == [1, 2]
    assert asked["model"] == "mine"
    assert asked["stop_token_ids"] == [3, 7]
    assert (asked["top_p"], asked["top_k"], asked["max_tokens"], asked["logprobs"]) == (0.9, -1, 4, 0)
    assert asked["return_token_ids"] is True
    assert asked["ignore_eos"] is True


@pytest.mark.slow
@pytest.mark.parametrize("failure", [503, 429, None])
def test_a_server_that_stumbles_is_asked_again(policy, server, failure):
    engine = VLLM(server.url, policy)
    want = sample(engine, Request(PROMPTS, **HOW))
    server.fails, server.failure = 4, failure
    assert sample(engine, Request(PROMPTS, **HOW)) == want


@pytest.mark.slow
@pytest.mark.parametrize("failure", [500, None])
def test_a_server_that_goes_away_loses_nothing(policy, server, failure):
    engine = VLLM(server.url, policy, patience=0.3)
    want = sample(engine, Request(PROMPTS, **HOW))
    server.asked, server.let, server.gone, server.failure = [], 0, 4, failure
    with pytest.raises(UserError, match=r"does not answer .*; [0-4] of 9 answers had come and are kept for another try") as caught:
        sample(engine, Request(PROMPTS, **HOW))
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)
    server.gone = None
    assert sample(engine, Request(PROMPTS, **HOW)) == want
    assert len(server.asked) == 9, "answers that had come were asked for again"
    assert not engine.kept


def test_no_server_at_all(policy):
    with pytest.raises(UserError, match="does not answer"):
        sample(VLLM("http://127.0.0.1:9", policy, patience=0.1), Request(PROMPTS, **HOW))


def test_other_weights_are_found_by_the_gap(policy, server):
    server.model = model_of(1)
    engine = VLLM(server.url, policy)
    with pytest.raises(UserError, match=r"log-probs differ from the policy's by .* on average"):
        sample(engine, Request(PROMPTS, **HOW))
    assert engine.gap.mean > 0.1


@pytest.mark.slow
def test_weights_are_synchronised(tmp_path):
    tokenizer = train_tokenizer(iter(["A boat at sea. " * 9]), 300)
    policy = model_of(0, len(tokenizer))
    server = Server(copy.deepcopy(policy), tmp_path / "served")
    engine = VLLM(server.url, policy)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="sync"):
        sample(engine, Request(PROMPTS, **HOW))
    engine.sync(tokenizer, tmp_path / "served")
    assert [path for path, _ in server.calls] == ["/collective_rpc", "/reset_prefix_cache"]
    assert server.calls[0][1] == {"method": "reload_weights"}
    sample(engine, Request(PROMPTS, **HOW))
    assert engine.gap.mean < 1e-5
    server.dev = False
    with pytest.raises(UserError, match=r"status 404.*VLLM_SERVER_DEV_MODE=1"):
        engine.sync(tokenizer, tmp_path / "served")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("page", "said"), [(b"<html>hello</html>", "not in JSON; is that a vLLM server"), (b"{}", "lists no models")])
def test_another_kind_of_server_is_one_line(policy, server, page, said):
    server.page = page
    with pytest.raises(UserError, match=said):
        sample(VLLM(server.url, policy), Request(PROMPTS, **HOW))


def test_a_model_of_another_vocabulary_is_one_line(policy, server):
    server.model = model_of(0, 300)
    with pytest.raises(UserError, match=r"answers with token \d+, and the policy has 61 tokens: it serves another model"):
        sample(VLLM(server.url, policy), Request(PROMPTS, **HOW))


def test_a_stream_gives_the_answers_whole(policy, server):
    request = Request(PROMPTS, **HOW)
    said = [[[] for _ in range(3)] for _ in PROMPTS]
    for token in stream(VLLM(server.url, policy), request):
        said[token.prompt][token.sample].append(token)
    for group, told in zip(sample(VLLM(server.url, policy), request), said, strict=True):
        for answer, tokens in zip(group, told, strict=True):
            assert [t.token for t in tokens] == answer.tokens
            assert [t.rollout for t in tokens] == [None] * (len(tokens) - 1) + [answer]


def test_what_had_come_before_an_interrupt_is_kept_until_the_weights_change(policy, server, tmp_path):
    engine, want = VLLM(server.url, policy), sample(VLLM(server.url, policy), Request(PROMPTS, **HOW))

    def interrupt(done):
        raise KeyboardInterrupt

    few = HOW | {"sampling": Sampling(max_new=9, rows=1)}
    with pytest.raises(KeyboardInterrupt):
        sample(engine, Request(PROMPTS, **few), progress=interrupt)
    assert 3 <= len(engine.kept) < 9, "an interrupt waited for all answers, or lost those that had come"
    assert sample(engine, Request(PROMPTS, **few)) == want
    with pytest.raises(KeyboardInterrupt):
        sample(engine, Request(PROMPTS, **few), progress=interrupt)
    server.folder = tmp_path / "served"
    engine.sync(train_tokenizer(iter(["A boat at sea. " * 9]), 300), server.folder)
    assert not engine.kept


def test_an_adapter_is_merged_for_the_server(tmp_path):
    peft = pytest.importorskip("peft")
    tokenizer = train_tokenizer(iter(["A boat at sea. " * 9]), 300)
    base = model_of(0, len(tokenizer))
    server = Server(copy.deepcopy(base), tmp_path / "served")
    policy = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    check_forest(policy)
    engine = VLLM(server.url, policy)
    engine.sync(tokenizer, tmp_path / "served")
    sample(engine, Request(PROMPTS, **HOW))
    assert engine.gap.mean < 1e-5
    assert hasattr(policy, "get_base_model")
    server.shutdown()
    server.server_close()


def test_what_the_server_refuses_is_one_line(policy, server):
    server.fails, server.failure = 100, 400
    with pytest.raises(UserError, match=r"status 400: .*engine") as caught:
        sample(VLLM(server.url, policy), Request(PROMPTS[:1], **HOW))
    assert "\n" not in str(caught.value)


def test_prompts_are_checked_here(policy, server):
    with pytest.raises(UserError, match="prompt 1: is empty"):
        sample(VLLM(server.url, policy), Request([[1], []], **HOW))
    with pytest.raises(UserError, match="window of 64"):
        sample(VLLM(server.url, policy), Request([[1] * 60], **HOW))
    assert not server.asked
