"""Models decoded in lockstep, against one full forward of each per token."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from temper.models.load import check_forest
from temper.models.mix import Mixed, mixed_logp
from temper.rollout import Request, Sampling, sample, stream

V = 41
LLAMA = LlamaConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=48,
    initializer_range=0.3,
)
GPT2 = GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=40, initializer_range=0.3)
PROMPTS = [[5, 7, 9], [1], [4, 4, 8, 15, 16, 23, 3, 14, 1, 26], [33, 12, 33, 12, 33]]


def model(config, seed, backend=None):
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(deepcopy(config)).eval()
    check_forest(made)
    if backend:
        made.forest_backend = backend
        made.set_attn_implementation("sdpa")
    return made


@pytest.fixture(scope="module")
def three():
    return model(LLAMA, 0), model(GPT2, 1), model(LLAMA, 2, "rows")


def naive(models, weights, ids, temperature):
    with torch.no_grad():
        logits = [m(input_ids=torch.tensor([ids])).logits[0, -1].float() for m in models]
    return (mixed_logp(logits, weights) / temperature).log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "rows"), [((0, 1), 256), ((0, 1), 3), ((1, 2), 256)], ids=["shared", "few rows", "one of them in rows"])
def test_every_tokens_log_prob_is_the_mixtures(three, which, rows):
    """In groups that end at different times and refill, by two kinds of models of different families."""
    models, weights = [three[k] for k in which], [0.3, 0.7]
    mixed = Mixed(models, weights)
    assert mixed.config.max_position_embeddings == min(m.config.max_position_embeddings for m in models)
    request = Request(PROMPTS, sampling=Sampling(temperature=0.8, max_new=10, rows=rows), stop=[0, 7, 11, 13, 17, 19], n=3, seed=(1,))
    groups = sample(mixed, request)
    assert len({len(a.tokens) for g in groups for a in g}) > 2
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for a in group:
            for t, (token, logp) in enumerate(zip(a.tokens, a.logp, strict=True)):
                assert logp == pytest.approx(float(naive(models, weights, [*prompt, *a.tokens[:t]], 0.8)[token]), abs=1e-4)
    said = [t.rollout for t in stream(mixed, request) if t.rollout]
    assert sorted(a.tokens for a in said) == sorted(a.tokens for g in groups for a in g)


def test_greedy_takes_the_mixtures_most_likely_token(three):
    mixed = Mixed(three[:2], [0.5, 0.5])
    groups = sample(mixed, Request(PROMPTS, sampling=Sampling(temperature=0, max_new=6), stop=[0]))
    for prompt, (a,) in zip(PROMPTS, groups, strict=True):
        for t, token in enumerate(a.tokens):
            assert token == int(naive(three[:2], [0.5, 0.5], [*prompt, *a.tokens[:t]], 1.0).argmax())


def test_a_model_of_weight_one_is_that_model(three):
    request = Request(PROMPTS, sampling=Sampling(max_new=8), stop=[0], n=2)
    alone, mixed = sample(three[0], request), sample(Mixed(three[:2], [1.0, 0.0]), request)
    assert [[a.tokens for a in g] for g in alone] == [[a.tokens for a in g] for g in mixed]


def test_the_models_modes_are_as_before(three):
    mixed = Mixed(three[:2], [0.5, 0.5]).train()
    sample(mixed, Request(PROMPTS, sampling=Sampling(max_new=2), stop=[0]))
    assert mixed.training
    assert all(m.training for m in three[:2])
    mixed.eval()
