"""The rules against their vectors and formulas; every registered one against what any must do: a new one is tested at once."""

import math
import re

import pytest
import torch

from temper.losses.preference import (
    RULES,
    Pairs,
    Rankings,
    _log1mexp,
    cpo,
    dpo,
    fdpo,
    hinge,
    ipo,
    lndpo,
    orpo,
    pldpo,
    rdpo,
    rpo,
    rule,
    settings,
    simpo,
)
from temper.losses.reward import bradley_terry

from .reference import VECTORS, close, t

OVER_PAIRS = {name: fn for name, fn in RULES.items() if not fn.listwise}
every_rule = pytest.mark.parametrize("fn", OVER_PAIRS.values(), ids=OVER_PAIRS)


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


def test_vectors_of_the_family():
    v, p = VECTORS, pairs()
    close(rdpo(p, beta=0.1, flip_rate=0.1), [v["robust_eps0.1"]["loss"]])
    close(gradients(rdpo, p, beta=0.1, flip_rate=0.1)[0], [v["robust_eps0.1"]["grad_chosen"]])
    close(ipo(p, tau=0.1), [v["ipo_tau0.1"]["sum_form"]])
    close(gradients(ipo, p, tau=0.1)[0], [v["ipo_tau0.1"]["sum_grad_chosen"]])
    close(ipo(p, tau=0.1, log_ratios="averaged"), [v["ipo_tau0.1"]["mean_form"]])
    close(hinge(p, beta=0.1), [v["slic_hinge"]["loss"]])
    close(lndpo(p, beta=5.0), [v["dpo_lennorm_beta5"]["loss"]])
    close(rpo(p, beta=0.1, nll_weight=1.0), [v["rpo_dpo_plus_nll"]["loss"]])
    close(simpo(p, beta=2.0, gamma=1.0), [v["simpo_b2_g1"]["loss"]])
    chosen, rejected = gradients(simpo, p, beta=2.0, gamma=1.0)
    close(chosen, [v["simpo_b2_g1"]["grad_sumlogp_chosen"]])
    close(rejected, [v["simpo_b2_g1"]["grad_sumlogp_rejected"]])
    close(orpo(p, lam=0.1), [v["orpo_l0.1"]["total"]])
    close(cpo(p, beta=0.1, nll_weight=0.0), [v["cpo_b0.1"]["L_pref"]])
    close(cpo(p, beta=0.1, nll="summed"), [v["cpo_b0.1"]["total_sum"]])
    close(cpo(p, beta=0.1, nll="averaged"), [v["cpo_b0.1"]["total_tokenmean"]])


AT_THE_REFERENCE = {"dpo": math.log(2), "rdpo": math.log(2), "ipo": 25.0, "hinge": 1.0, "lndpo": math.log(2), "fdpo": math.log(2)}


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_at_the_reference(name):
    close(RULES[name](pairs(-13, -13.5)), [AT_THE_REFERENCE[name]])


def sigma(x):
    return 1 / (1 + (-x).exp())


def odds(logp, length):
    return (logp / length).exp() / (1 - (logp / length).exp())


def under(slope):
    return lambda p: -sigma(0.1 * (slope((p.chosen - p.ref_chosen).exp()) - slope((p.rejected - p.ref_rejected).exp()))).log()


FORMULAS = {  # as the papers write them, and with which settings
    "dpo": (lambda p: -sigma(0.1 * p.margin).log(), {}),
    "odpo": (lambda p: -sigma(0.1 * p.margin - 0.3 * p.strength).log(), {"offset": 0.3}),
    "rdpo": (lambda p: (-0.8 * sigma(0.1 * p.margin).log() + 0.2 * sigma(-0.1 * p.margin).log()) / 0.6, {"flip_rate": 0.2}),
    "ipo": (lambda p: (p.margin - 5) ** 2, {}),
    "hinge": (lambda p: torch.maximum(t(0), 1 - 0.1 * p.margin), {}),
    "lndpo": (lambda p: -sigma(5 * ((p.chosen - p.ref_chosen) / p.chosen_len - (p.rejected - p.ref_rejected) / p.rejected_len)).log(), {}),
    "rpo": (lambda p: -sigma(0.1 * p.margin).log() - 0.7 * p.chosen / p.chosen_len, {"nll_weight": 0.7}),
    "simpo": (lambda p: -sigma(2 * p.chosen / p.chosen_len - 2 * p.rejected / p.rejected_len - 1).log(), {}),
    "orpo": (
        lambda p: -p.chosen / p.chosen_len - 0.4 * sigma((odds(p.chosen, p.chosen_len) / odds(p.rejected, p.rejected_len)).log()).log(),
        {"lam": 0.4},
    ),
    "cpo": (lambda p: -sigma(0.1 * (p.chosen - p.rejected)).log() - p.chosen, {"nll": "summed"}),
    "fdpo forward-kl": (under(lambda u: -1 / u), {"divergence": "forward-kl"}),
    "fdpo js": (under(lambda u: (2 * u / (1 + u)).log()), {"divergence": "js"}),
    "fdpo alpha": (under(lambda u: (1 - u**-0.3) / 0.3), {"divergence": "alpha", "alpha": 0.3}),
    "fdpo chi2": (under(lambda u: u + u.log()), {"divergence": "chi2"}),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("soft", [1.0, 0.8, 0.5])
def test_values_and_gradients_are_those_of_the_formula(name, soft):
    formula, how = FORMULAS[name]
    fn = RULES[name.split()[0] if name != "odpo" else "dpo"]
    p = Pairs(
        t(-12, -3, -0.4, grad=True), t(-14.5, -2, -9, grad=True), t(-13, -4, -1), t(-13.5, -1, -7), t(8, 3, 2), t(10, 5, 4), t(1, 2, 0)
    )
    got, want = fn(p, soft=t(soft), **how), soft * formula(p) + (1 - soft) * formula(p.swapped())
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.sum(), [p.chosen, p.rejected]) for x in (got, want)), strict=True):
        close(a, b)


def test_the_alpha_divergence_lies_between_the_two_kls():
    p = pairs()
    close(fdpo(p, divergence="alpha", alpha=1.0), fdpo(p, divergence="forward-kl"))
    close(fdpo(p, divergence="alpha", alpha=1e-9), dpo(p), atol=1e-6)


def test_an_offset_counts_for_whichever_answer_is_better():
    p = pairs()._replace(strength=t(0.7))
    won, lost = 0.1 * (p.chosen - p.ref_chosen), 0.1 * (p.rejected - p.ref_rejected)
    for soft in 1.0, 0.6:
        close(dpo(p, offset=0.5, soft=t(soft)), bradley_terry(won, lost, margin=t(0.35), soft=t(soft)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_keeps_its_digits(dtype):
    """Against Python's own in double precision, on both sides of the branch at ln 2."""
    x = torch.tensor([-1e-7, -1e-3, -0.6931, -0.6932, -5.0, -40.0, -80.0], dtype=dtype, requires_grad=True)
    want = [math.log(-math.expm1(v)) if v > -0.69 else math.log1p(-math.exp(v)) for v in x.double().tolist()]
    torch.testing.assert_close(_log1mexp(x), torch.tensor(want, dtype=dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    (grad,) = torch.autograd.grad(_log1mexp(x).sum(), x)
    want = [-1 / math.expm1(-v) for v in x.double().tolist()]
    torch.testing.assert_close(grad, torch.tensor(want, dtype=dtype), rtol=1e-4, atol=0)


def test_a_certain_answer_has_finite_odds():
    """Whose log-probability rounding brought to 0, or above."""
    for sure in 0.0, 1e-6:
        p = pairs(sure, -3.0)
        assert all(x.isfinite().all() for x in (orpo(p), *gradients(orpo, p), *gradients(orpo, p, soft=t(0))))


# ---------------------------------------------------------------- rankings

LOGP, LATER = t(-3, -4, -9, -2, -8), t(-5, -4, -6, -3, -7)  # of two rankings, of three answers and of two
RECORD = torch.tensor([0, 0, 0, 1, 1])


def test_plackett_luce_vector():
    s = t(1, 0.2, -0.3)
    close(pldpo(Rankings(10 * s, t(0, 0, 0), t(1, 1, 1), RECORD[:3]), beta=0.1), [VECTORS["kwise"]["plackett_luce"]])


def test_plackett_luce_of_two_is_dpo():
    logp = LOGP.clone().requires_grad_()
    got = pldpo(Rankings(logp, LATER, torch.ones(5), RECORD), beta=0.3)
    want = dpo(Pairs(logp[3:4], logp[4:], LATER[3:4], LATER[4:], t(1), t(1)), beta=0.3)
    close(got[1:], want)
    for a, b in zip(torch.autograd.grad(got[1], logp), torch.autograd.grad(want.sum(), logp), strict=True):
        close(a, b)


@pytest.mark.parametrize("soft", [1.0, 0.7])
def test_plackett_luce_is_a_choice_among_the_rest_at_every_place(soft):
    s = 0.3 * (LOGP - LATER)

    def chain(s):
        return sum(s[k:].logsumexp(0) - s[k] for k in range(len(s)))

    want = [float(soft * chain(part) + (1 - soft) * chain(part.flip(0))) for part in (s[:3], s[3:])]
    close(pldpo(Rankings(LOGP, LATER, torch.ones(5), RECORD), beta=0.3, soft=t(soft, soft)), want)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cdpo_at_the_reference(smoothing):
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


@every_rule
def test_only_the_move_from_the_reference_counts_or_the_reference_not_at_all(fn):
    """Adding c(x, y) to policy and reference alike changes nothing but a likelihood; without a reference, changing it."""
    how = {"nll_weight": 0.0} if fn.reference and "nll_weight" in settings(fn) else {}
    other = pairs(-12 + 3, -14.5 - 2, -13 + 3, -13.5 - 2) if fn.reference else pairs(ref_chosen=-50, ref_rejected=-1)
    close(fn(other, **how), fn(pairs(), **how))


def test_dpo_gradient_is_antisymmetric_and_ignores_a_constant_per_prompt():
    chosen, rejected = gradients(dpo, pairs())
    close(chosen, -rejected)
    close(dpo(pairs(-12 + 5, -14.5 + 5)), dpo(pairs()))


@every_rule
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e-6, -1e4), (-1e4, -1e-6)])
@pytest.mark.parametrize("soft", [None, 0.5, 1.0])
def test_finite_at_the_extremes(fn, chosen, rejected, soft):
    p = Pairs(*[x.detach().float().requires_grad_(i < 2) for i, x in enumerate(pairs(chosen, rejected, -20, -20, (10, 10))[:6])])
    kw = {} if soft is None else {"soft": torch.tensor([soft])}
    assert all(x.isfinite().all() for x in (fn(p, **kw), *gradients(fn, p, **kw)))


@pytest.mark.parametrize("fn", RULES.values(), ids=RULES)
def test_says_what_it_is_when_to_use_it_where_it_is_from_and_what_can_be_set(fn):
    assert RULES[fn.__name__] is fn
    assert "arXiv:" in fn.__doc__
    assert re.search(r"\b[Ff]or (clean |few |pairs |noisy |when |a base |chosen |rankings )|Forward ones", fn.__doc__)
    found = settings(fn)
    p = Rankings(LOGP[3:], LATER[3:], torch.ones(2), RECORD[:2]) if fn.listwise else pairs()
    assert fn(p, **{s.name: s.default for s in found.values()}).shape == (1,)
    assert all(s.help and set(s.limits) <= {"gt", "ge", "lt", "le"} for s in found.values())


def test_settings_are_read_from_the_signature():
    found = settings(dpo)
    assert [(s.name, s.kind, s.default, s.limits) for s in found.values()] == [
        ("beta", float, 0.1, {"gt": 0}),
        ("label_smoothing", float, 0.0, {"ge": 0, "lt": 0.5}),
        ("offset", float, 0.0, {"ge": 0}),
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
