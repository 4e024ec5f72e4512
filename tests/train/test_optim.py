"""Schedules by hand; AdamW against its definition."""

import math

import pytest
import torch
from torch import nn

from temper.train import Optim, adamw, lr_at


def test_schedules_by_hand():
    linear = Optim(lr=1.0, schedule="linear", warmup=0.2, lr_floor=0.0)
    assert [lr_at(linear, n, 10) for n in range(10)] == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = Optim(lr=2.0, schedule="cosine", warmup=0.0, lr_floor=0.1)
    assert lr_at(cosine, 0, 4) == 2.0
    assert lr_at(cosine, 2, 4) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert lr_at(cosine, 3, 4) == pytest.approx(2 * (0.1 + 0.9 * (1 + math.cos(0.75 * math.pi)) / 2))
    constant = Optim(lr=0.5, schedule="constant", warmup=0.5)
    assert [lr_at(constant, n, 4) for n in range(4)] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 37])
def test_no_step_is_wasted(schedule, warmup, steps):
    rates = [lr_at(Optim(lr=1.0, schedule=schedule, warmup=warmup), n, steps) for n in range(steps)]
    assert min(rates) > 0
    assert max(rates) == 1.0


def module():
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)), "value": nn.Linear(4, 1)})
    model["trunk"][1].bias.requires_grad_(False)
    return model


def test_only_matrices_decay_and_embeddings_when_asked():
    model = module()
    names = {id(p): name for name, p in model.named_parameters()}

    def decaying(**more):
        groups = adamw(model, Optim(weight_decay=0.1, **more)).param_groups
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    assert decaying() == {"trunk.1.weight", "value.weight"}
    assert decaying(decay_embeddings=True) == {"trunk.0.weight", "trunk.1.weight", "value.weight"}
    held = {names[id(p)] for group in adamw(model, Optim()).param_groups for p in group["params"]}
    assert held == set(names.values()) - {"trunk.1.bias"}


def test_multipliers_by_the_longest_prefix():
    model = module()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = adamw(model, Optim(), {"value": 10.0, "trunk": 0.5, "trunk.2": 2.0}).param_groups
    factor = {names[id(p)]: group["multiplier"] for group in groups for p in group["params"]}
    assert factor == {
        "trunk.0.weight": 0.5,
        "trunk.1.weight": 0.5,
        "trunk.2.weight": 2.0,
        "trunk.2.bias": 2.0,
        "value.weight": 10.0,
        "value.bias": 10.0,
    }
    with pytest.raises(ValueError, match="'head'"):
        adamw(model, Optim(), {"head": 2.0})


def test_adamw_is_its_definition():
    """Two steps of arXiv:1711.05101 algorithm 2 in float64."""
    optim = Optim(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    layer = nn.Linear(3, 2, bias=False).double()
    w = layer.weight.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    optimizer = adamw(layer, optim)
    for t in (1, 2):
        g = torch.randn(w.shape, dtype=torch.float64)
        layer.weight.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.01 * 0.1 * w - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-12, atol=1e-14)
