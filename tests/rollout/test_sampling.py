"""Draws against transformers' own logits processors, and the settings that are refused."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from temper.config import UserError, build
from temper.rollout import Sampling
from temper.rollout.sampling import draw

HOW = [
    {"top_k": 3},
    {"top_k": 50},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 1.6},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 1.3, "top_k": 4, "temperature": 0.7},
]


def theirs(logits, seen, s):
    """transformers' distribution [R, V] under the same settings."""
    z = logits.clone()
    if s.repetition_penalty != 1:
        ids = torch.stack([row.nonzero()[:, 0][torch.arange(11) % int(row.sum())] for row in seen])
        z = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, z)
    z = TemperatureLogitsWarper(s.temperature)(None, z) if s.temperature != 1 else z
    z = TopKLogitsWarper(s.top_k)(None, z) if s.top_k else z
    z = TopPLogitsWarper(s.top_p)(None, z) if s.top_p < 1 else z
    z = MinPLogitsWarper(s.min_p)(None, z) if s.min_p else z
    return z.softmax(-1)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_the_distribution_is_transformers(how):
    """The share of a fine grid of uniform numbers that gives a token is the token's probability."""
    s = Sampling(**how)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator) * 2
    seen = torch.rand(5, 11, generator=generator) < 0.3
    seen[:, 2] = True
    grid = (torch.arange(4000) + 0.5) / 4000
    want = theirs(logits, seen, s)
    for row in range(5):
        z, was = logits[row].expand(4000, -1), seen[row].expand(4000, -1) if s.repetition_penalty != 1 else None
        token, logp = draw(z, grid, s, was)
        share = np.bincount(token.numpy(), minlength=11) / 4000
        np.testing.assert_allclose(share, want[row].numpy(), atol=1e-3)
        assert not (share[want[row].numpy() == 0]).any()
        plain = (logits[row] / s.temperature).log_softmax(-1)  # untruncated and without penalty: what a trainer recomputes
        torch.testing.assert_close(logp, plain[token], atol=1e-6, rtol=1e-6)


def test_greedy_with_a_penalty():
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    token, logp = draw(logits, None, Sampling(temperature=0, repetition_penalty=2.0), torch.tensor([[True, False, False]]))
    assert int(token) == 1
    torch.testing.assert_close(logp, logits.log_softmax(-1)[:, 1])


def test_no_token_without_probability_is_drawn_whatever_the_rounding():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3000, 40, generator=generator) * 3
    logits[:, 30:] = -200.0
    token, _ = draw(logits, torch.full((3000,), 1 - 2**-24), Sampling())
    assert int(token.max()) < 30


def test_equal_logits_are_drawn_equally():
    n = 20_000
    u = torch.from_numpy(np.random.default_rng(0).random(n, dtype=np.float32))
    token, _ = draw(torch.zeros(n, 10), u, Sampling(top_k=4))
    count = np.bincount(token.numpy(), minlength=10)
    assert count[4:].sum() == 0
    assert stats.chisquare(count[:4]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"temperature": 0, "top_p": 0.9}, "top_p 0.9 with temperature 0"),
        ({"temperature": 0, "top_k": 5, "min_p": 0.1}, "top_k 5, min_p 0.1 with temperature 0"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"topp": 0.9}, "did you mean 'top_p'"),
    ],
)
def test_refused_in_one_line(values, error):
    with pytest.raises(UserError, match=error) as caught:
        build(Sampling, values)
    assert "\n" not in str(caught.value)
