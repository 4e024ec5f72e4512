"""The vLLM engine against a small HTTP server in this process that answers as vLLM's does, samples with the native engine, and can fail."""

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models.heads import token_logp
from temper.models.load import check_forest
from temper.models.tokenizer import train_tokenizer
from temper.rollout import Request, Sampling, sample
from temper.rollout.vllm import VLLM

PROMPTS = [[5, 7, 9], [11], [4, 4, 8, 15, 16]]
STOP = [3, 8, 20, 30]


class Server(ThreadingHTTPServer):
    """`fails`: how many requests get `failure` (a status; None: the connection is dropped). `gone`: after so many answers, all do."""

    def __init__(self, model, folder=None, dev=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.folder, self.dev = model, folder, dev
        self.asked, self.calls, self.fails, self.failure, self.gone, self.let = [], [], 0, 503, None, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def broken(self):
        with self.lock:
            self.fails -= 1
            if self.fails >= 0 or (self.gone is not None and self.let >= self.gone):
                return True
            self.let += 1
            return False


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": "policy"}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            server.calls.append((self.path, body))
            if not server.dev:
                return self.answer(404, {"detail": "Not Found"})
            if self.path == "/collective_rpc":
                server.model = AutoModelForCausalLM.from_pretrained(server.folder)
            return self.answer(200, {"results": [None]})
        if server.broken():
            if server.failure is None:
                return self.connection.close()
            return self.answer(server.failure, {"error": {"message": "engine\nis dead"}})
        with server.lock:  # one model, one thread
            server.asked.append(body)
            sampling = Sampling(temperature=body["temperature"], max_new=body["max_tokens"])
            ((one,),) = sample(
                server.model, Request([body["prompt"]], sampling=sampling, stop=body["stop_token_ids"], seed=(body["seed"],))
            )
        choice = {"index": 0, "text": "", "token_ids": one.tokens, "finish_reason": one.finish, "stop_reason": one.stop_reason}
        self.answer(200, {"choices": [choice | {"logprobs": {"token_logprobs": one.logp}}]})


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
