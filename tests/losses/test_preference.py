"""DPO against its vectors; every registered rule against what any rule must do: a new one is tested the moment it exists."""

import math

import pytest
import torch

from temper.losses.preference import RULES, Pairs, dpo, rule, settings

from .reference import VECTORS, close, t

every_rule = pytest.mark.parametrize("fn", RULES.values(), ids=RULES)


def pairs(chosen=-12.0, rejected=-14.5, ref_chosen=-13.0, ref_rejected=-13.5, lengths=(8.0, 10.0)):
    leaf = [t(x, grad=True) for x in (chosen, rejected)]
    return Pairs(*leaf, t(ref_chosen), t(ref_rejected), t(lengths[0]), t(lengths[1]))


def gradients(fn, p, **kw):
    return torch.autograd.grad(fn(p, **kw).sum(), [p.chosen, p.rejected])


def test_dpo_vectors():
    v, p = VECTORS["dpo"], pairs()
    close(p.margin, [v["h"]])
    close(dpo(p, beta=0.1), [v["loss"]])
    chosen, rejected = gradients(dpo, p, beta=0.1)
    close(chosen, [v["grad_chosen"]])
    close(rejected, [v["grad_rejected"]])
    close(0.1 * (p.chosen - p.ref_chosen), [v["reward_chosen"]])
    close(0.1 * (p.rejected - p.ref_rejected), [v["reward_rejected"]])


def test_cdpo_vectors():
    v, p = VECTORS["cdpo_eps0.1"], pairs()
    close(dpo(p, beta=0.1, label_smoothing=0.1), [v["loss"]])
    close(gradients(dpo, p, beta=0.1, label_smoothing=0.1)[0], [v["grad_chosen"]])
    at_rest = pairs(v["h_star"], 0, 0, 0)
    close(gradients(dpo, at_rest, beta=0.1, label_smoothing=0.1)[0], [0])


def test_soft_labels_are_cdpo_with_a_rate_per_pair():
    p = pairs()
    close(dpo(p, soft=t(0.9)), dpo(p, label_smoothing=0.1))
    close(dpo(p, soft=t(0.5)), dpo(p.swapped(), soft=t(0.5)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_at_the_reference(smoothing):
    close(dpo(pairs(-13, -13.5), label_smoothing=smoothing), [math.log(2)])


@every_rule
def test_one_number_per_pair(fn):
    n = 3
    p = Pairs(*[torch.linspace(-20, -10, n)] * 4, *[torch.full((n,), 9.0)] * 2)
    assert fn(p).shape == (n,)
    assert fn(p, soft=torch.rand(n)).shape == (n,)


@every_rule
def test_pushes_chosen_up_and_rejected_down(fn):
    chosen, rejected = gradients(fn, pairs(-20, -20, -20, -20, (10, 10)))
    assert chosen < 0 < rejected


@every_rule
def test_swapping_the_answers_swaps_the_label(fn):
    p = pairs()
    q = p.swapped()
    close(p.margin, -q.margin)
    close(fn(p, soft=t(0.3)), fn(q, soft=t(0.7)))
    close(fn(p, soft=t(1)), fn(p))
    close(fn(p, soft=t(0)), fn(q))
    up, down = gradients(fn, p), gradients(fn, p, soft=t(0))
    other = torch.autograd.grad(fn(q).sum(), [p.chosen, p.rejected])
    for a, b in zip(down, other, strict=True):
        close(a, b)
    assert up[0] < 0 < down[0]


@pytest.mark.parametrize("fn", [r for r in RULES.values() if r.reference], ids=[n for n, r in RULES.items() if r.reference])
def test_only_the_move_from_the_reference_counts(fn):
    """Adding c(x, y) to policy and reference alike changes nothing."""
    close(fn(pairs(-12 + 3, -14.5 - 2, -13 + 3, -13.5 - 2)), fn(pairs()))


def test_dpo_gradient_is_antisymmetric_and_ignores_a_constant_per_prompt():
    chosen, rejected = gradients(dpo, pairs())
    close(chosen, -rejected)
    close(dpo(pairs(-12 + 5, -14.5 + 5)), dpo(pairs()))


@every_rule
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e-6, -1e4), (-1e4, -1e-6)])
@pytest.mark.parametrize("soft", [None, 0.5, 1.0])
def test_finite_at_the_extremes(fn, chosen, rejected, soft):
    p = Pairs(*[x.detach().float().requires_grad_(i < 2) for i, x in enumerate(pairs(chosen, rejected, -20, -20, (10, 10)))])
    kw = {} if soft is None else {"soft": torch.tensor([soft])}
    assert all(x.isfinite().all() for x in (fn(p, **kw), *gradients(fn, p, **kw)))


@every_rule
def test_says_what_it_is_where_it_is_from_and_what_can_be_set(fn):
    assert RULES[fn.__name__] is fn
    assert fn.__doc__
    assert "arXiv:" in fn.__doc__
    found = settings(fn)
    assert fn(pairs(), **{s.name: s.default for s in found.values()}).shape == (1,)
    assert all(s.help and set(s.limits) <= {"gt", "ge", "lt", "le"} for s in found.values())


def test_settings_are_read_from_the_signature():
    found = settings(dpo)
    assert [(s.name, s.kind, s.default, s.limits) for s in found.values()] == [
        ("beta", float, 0.1, {"gt": 0}),
        ("label_smoothing", float, 0.0, {"ge": 0, "lt": 0.5}),
    ]


def test_a_setting_without_help_is_refused():
    def bare(p: Pairs, *, beta: float = 0.1):
        return beta * p.margin

    with pytest.raises(TypeError, match="bare: beta"):
        settings(bare)


def test_a_rule_is_registered_under_its_own_name(monkeypatch):
    monkeypatch.setattr("temper.losses.preference.RULES", {})
    from temper.losses import preference

    @rule(reference=False)
    def linear(p):
        return p.rejected - p.chosen

    assert list(preference.RULES) == ["linear"]
    assert not linear.reference
    close(linear(pairs(), soft=t(0.75)), [-2.5 * 0.5])
