import math

import pytest
import torch

from temper.losses.kl import k2, k3
from temper.losses.policy import clipped, clipped_surrogate, clipped_value, ratio, sequence_logp

from .reference import VECTORS, close, t

CLIP = VECTORS["ppo_clip"]
OLD, NEW, ADVANTAGE = t(-1, -0.5, -2, -0.3), (-0.7, -0.9, -1.95, -0.6), t(1, 1, -1, -1)


def test_clipped_is_where_no_gradient_flows():
    """Under the dual clip as well."""
    logp = torch.linspace(-2, 2, 41).repeat(2).requires_grad_()
    advantage = torch.tensor([1.0, -1.0]).repeat_interleave(41)
    for how in {}, {"dual": 3.0}, {"low": 0.1, "high": 0.5, "dual": 1.5}:
        [grad] = torch.autograd.grad(clipped_surrogate(logp, torch.zeros(82), advantage, **how).sum(), logp)
        assert torch.equal(grad == 0, clipped(logp, torch.zeros(82), advantage, **how))


def test_vectors():
    logp = t(*NEW, grad=True)
    close(ratio(logp, OLD), CLIP["ratio"])
    loss = clipped_surrogate(logp, OLD, ADVANTAGE)
    close(loss, CLIP["per"])
    close(loss.mean(), CLIP["loss"])
    loss.sum().backward()
    assert (logp.grad != 0).tolist() == CLIP["grad_flows"]
    assert (~clipped(logp, OLD, ADVANTAGE)).tolist() == CLIP["grad_flows"]
    close(clipped(logp, OLD, ADVANTAGE).double().mean(), CLIP["clipfrac"])
    close(k3(OLD, logp).mean(), CLIP["approx_kl_k3"])
    close(k2(OLD, logp).mean(), CLIP["approxkl_half_sq"])


def test_clip_higher():
    v = VECTORS["ppo_clip_higher_0.2_0.28"]
    loss = clipped_surrogate(t(*NEW), OLD, ADVANTAGE, low=0.2, high=0.28)
    close(loss, v["per"])
    close(loss.mean(), v["loss"])


def test_dual_clip():
    v = VECTORS["ppo_dualclip_c3"]
    close(clipped_surrogate(t(*NEW), OLD, ADVANTAGE, dual=3), v["per"])
    logp = t(math.log(5), math.log(5), grad=True)
    loss = clipped_surrogate(logp, t(0, 0), t(-1, 1), dual=3)
    close(loss, [v["extra_ratio5_advm1"], -1.2])
    loss.sum().backward()
    assert logp.grad.tolist() == [0, 0]


def test_on_policy_it_is_the_policy_gradient():
    logp = t(*NEW, grad=True)
    assert ratio(logp, logp.detach()).tolist() == [1, 1, 1, 1]
    clipped_surrogate(logp, logp.detach(), ADVANTAGE).sum().backward()
    close(logp.grad, -ADVANTAGE)


@pytest.mark.parametrize("gap", [-1e4, 1e4])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("dual", [None, 3.0])
def test_finite_however_far_the_policy_went(gap, sign, dual):
    logp = torch.tensor([gap], requires_grad=True)
    loss = clipped_surrogate(logp, torch.tensor([0.0]), torch.tensor([sign]), dual=dual)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()


def test_clipped_value_vectors():
    v = VECTORS["value_clip"]
    value, old, returns = t(0.9, 0.35), t(0.3, 0.4), t(1, 0.1)
    close((value - returns).square(), v["unclipped"])
    close(clipped_value(value, old, returns), [c / 2 for c in v["clipped"]])
    close(clipped_value(value, old, returns).mean(), v["loss"])
    close(clipped_value(value, old, returns, clip=math.inf), [u / 2 for u in v["unclipped"]])


def test_clipped_value_has_no_gradient_past_the_clip():
    value = t(0.9, 0.35, grad=True)
    clipped_value(value, t(0.3, 0.4), t(1, 0.1)).sum().backward()
    close(value.grad, [0, 0.25])


def test_the_ratio_of_a_sequence():
    """GSPO: the mean of the log-ratios, not their sum; each token's own gradient times it."""
    old, gaps, sequence = t(-1, -2, -3), t(0.3, -0.1, 0.7), torch.tensor([0, 0, 1])
    logp = (old + gaps).requires_grad_()
    rho = ratio(sequence_logp(logp, old, sequence), old)
    close(rho[0], VECTORS["gspo_ratio"]["seq_ratio"])
    close(rho, [math.exp(0.1), math.exp(0.1), math.exp(0.7)])
    rho.sum().backward()
    close(logp.grad, rho)
    assert ratio(sequence_logp(old, old, sequence), old).tolist() == [1, 1, 1]


def test_with_one_advantage_per_answer_it_is_the_objective_of_the_sequence():
    """d/d logp of mean_i -A_i exp(mean_t log rho_t), arXiv:2507.18071 eq. 5."""
    old, advantage, sequence, length = t(-1, -2, -3, -1), t(2, 2, 2, -1), torch.tensor([0, 0, 0, 1]), t(3, 3, 3, 1)
    given = t(-0.9, -2.2, -2.8, -1.1)
    ours, plain = given.clone().requires_grad_(), given.clone().requires_grad_()
    (clipped_surrogate(sequence_logp(ours, old, sequence), old, advantage) / length).sum().backward()
    gap = plain - old
    (-2 * gap[:3].mean().exp() + gap[3].exp()).backward()
    close(ours.grad, plain.grad)
