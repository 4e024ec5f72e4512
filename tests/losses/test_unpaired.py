"""KTO and BCO against their vectors and formulas."""

import math

import pytest
import torch

from temper.losses.unpaired import RULES, Answers, bco, kto, settings

from .reference import VECTORS, close, t

GAIN, GOOD = (1, 0.2, -0.5, 0.8), torch.tensor([True, True, False, False])
DRIFT = t(0.3, -0.1, 0.2, 0.4)  # log-ratios of mismatched pairs


def answers(drift=DRIFT, weight=1.0):
    return Answers(t(*GAIN, grad=True), GOOD, drift.mean().clamp(min=0), weight)


@pytest.mark.parametrize(
    ("key", "given", "beta"),
    [
        ("kto", answers(), 0.1),
        ("kto_negKL_clamped", answers(-DRIFT), 0.1),
        ("kto_lD1.333", answers(weight=1 + GOOD.double() / 3), 0.1),
        ("kto_beta1", answers(), 1.0),
    ],
)
def test_kto_vectors(key, given, beta):
    close(given.point, VECTORS[key]["z0"])
    loss = kto(given, beta=beta)
    close(loss, VECTORS[key]["per_ex"])
    close(loss.mean(), VECTORS[key]["loss"])


FORMULAS = {
    "kto": lambda r, good: 1 - torch.sigmoid(0.1 * (r - 0.2) if good else 0.1 * (0.2 - r)),
    "bco": lambda r, good: -torch.sigmoid(0.1 * r - 0.02 if good else 0.02 - 0.1 * r).log(),
}


@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_are_those_of_the_formula(name):
    a = answers()
    got, want = RULES[name](a), torch.stack([FORMULAS[name](r, good) for r, good in zip(a.log_ratio, GOOD, strict=True)])
    close(got, want)
    grad, wanted = (torch.autograd.grad(x.sum(), a.log_ratio)[0] for x in (got, want))
    close(grad, wanted)
    assert ((grad < 0) == GOOD).all()


@pytest.mark.parametrize(("fn", "value"), [(kto, 0.5), (bco, math.log(2))])
def test_at_the_reference(fn, value):
    close(fn(Answers(torch.zeros(4).double(), GOOD, 0.0)), [value] * 4)
    close(fn(Answers(torch.zeros(4).double(), GOOD, 0.0, t(1, 2, 3, 4))), [value * k for k in (1, 2, 3, 4)])


@pytest.mark.parametrize("fn", RULES.values(), ids=RULES)
def test_finite_at_the_extremes_and_the_other_thumb_is_the_mirror_image(fn):
    far = Answers(torch.tensor([-1e4, 1e4], requires_grad=True), torch.tensor([True, True]), 1.0)
    loss = fn(far)
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), far.log_ratio)[0].isfinite().all()
    close(fn(Answers(t(3.0, 5.0), GOOD[:2], 1.0)), fn(Answers(t(-1.0, -3.0), ~GOOD[:2], 1.0)))


@pytest.mark.parametrize("fn", RULES.values(), ids=RULES)
def test_says_what_it_is_and_what_can_be_set(fn):
    assert RULES[fn.__name__] is fn
    assert "arXiv:" in fn.__doc__
    assert "For thumbs" in " ".join(fn.__doc__.split())
    assert [(s.name, s.default, s.limits) for s in settings(fn).values()] == [("beta", 0.1, {"gt": 0})]
