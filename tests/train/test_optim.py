"""Schedules by hand; AdamW and Muon against their definitions."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from temper.config import UserError
from temper.train import Optim, lr_at, optimizer
from temper.train.muon import orthogonal
from temper.train.shard import resume


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
        groups = optimizer(model, Optim(weight_decay=0.1, **more)).param_groups
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    assert decaying() == {"trunk.1.weight", "value.weight"}
    assert decaying(decay_embeddings=True) == {"trunk.0.weight", "trunk.1.weight", "value.weight"}
    held = {names[id(p)] for group in optimizer(model, Optim()).param_groups for p in group["params"]}
    assert held == set(names.values()) - {"trunk.1.bias"}


def test_multipliers_by_the_longest_prefix():
    model = module()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = optimizer(model, Optim(), {"value": 10.0, "trunk": 0.5, "trunk.2": 2.0}).param_groups
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
        optimizer(model, Optim(), {"head": 2.0})


def test_adamw_is_its_definition():
    """Two steps of arXiv:1711.05101 algorithm 2 in float64."""
    optim = Optim(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    layer = nn.Linear(3, 2, bias=False).double()
    w = layer.weight.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    adam = optimizer(layer, optim)
    for t in (1, 2):
        g = torch.randn(w.shape, dtype=torch.float64)
        layer.weight.grad = g.clone()
        adam.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.01 * 0.1 * w - 0.01 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
    torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-12, atol=1e-14)


def test_orthogonal_keeps_the_directions_and_evens_their_sizes():
    torch.manual_seed(0)
    for rows, columns in ((6, 6), (9, 4), (4, 9)):
        u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), dtype=torch.float64))
        sizes = torch.linspace(0.05, 3.0, min(rows, columns), dtype=torch.float64)
        found = orthogonal((u * sizes @ v.mT)[None])[0]
        inner = u.mT @ found @ v
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-9
        assert 0.6 < inner.diagonal().min() <= inner.diagonal().max() < 1.25
    assert orthogonal(torch.zeros(1, 3, 4)).abs().max() == 0


def blocked():
    """An embedding, one transformer block with a matrix and a norm, a head."""
    torch.manual_seed(0)
    block = GradientCheckpointingLayer()
    block.linear, block.norm = nn.Linear(4, 8, bias=False), nn.LayerNorm(8)
    return nn.ModuleDict({"embed": nn.Embedding(5, 4), "block": block, "head": nn.Linear(8, 5, bias=False)}).double()


def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest():
    """Three steps of arXiv:2502.16982 eq. 2-4 in float64, and AdamW's beside them."""
    ours, plain = blocked(), blocked()
    optim = Optim(lr=0.01, weight_decay=0.1)
    muon, adam = optimizer(ours, optim.model_copy(update={"optimizer": "muon"})), optimizer(plain, optim)
    w = ours["block"].linear.weight.detach().clone()
    memory = torch.zeros_like(w)
    for _ in range(3):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        g = ours["block"].linear.weight.grad
        memory = 0.95 * memory + 0.05 * g
        w = w * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 8**0.5 * orthogonal((0.05 * g + 0.95 * memory)[None])[0]
        muon.step()
        adam.step()
    torch.testing.assert_close(ours["block"].linear.weight.detach(), w, rtol=1e-12, atol=1e-14)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (name == "block.linear.weight") != torch.equal(p, q)


def test_muon_goes_on_from_its_state():
    def steps(module, muon, n):
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.1 * n) + torch.arange(p.numel(), dtype=p.dtype).view_as(p).sin()
        muon.step()

    optim = Optim(lr=0.01, optimizer="muon")
    one = blocked()
    first = optimizer(one, optim)
    steps(one, first, 1)
    two = copy.deepcopy(one)
    second = optimizer(two, optim)
    resume(second, copy.deepcopy(first.state_dict()))
    for module, muon in ((one, first), (two, second)):
        steps(module, muon, 2)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_muon_needs_a_matrix_in_a_block():
    with pytest.raises(UserError, match="no transformer block"):
        optimizer(module(), Optim(optimizer="muon"))
