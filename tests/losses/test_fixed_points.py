"""On a bandit of three answers, in exact expectation: where each objective comes to rest."""

import pytest
import torch

from temper.losses.kl import k1, k2, k3
from temper.losses.policy import clipped_surrogate
from temper.losses.preference import Pairs, dpo
from temper.losses.reward import bradley_terry

from .reference import FIXED_POINTS, VECTORS, close, t

REF, REWARD, BETA = t(0.2, 0.5, 0.3), t(1, 0, -1), 0.5
BEST = VECTORS["rlhf_optimum"]["pi"]


def settle(loss, start=REF, steps=100):
    """Minimise loss(logits) from `start` by quasi-Newton steps -> the logits."""
    logits = start.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=steps, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach()


def follow(gradient_of, lr=1.0, steps=2000):
    """Follow the gradient of a surrogate that is rebuilt at each policy (its value means nothing) -> the policy."""
    logits = REF.log().clone().requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(gradient_of(logits.log_softmax(-1)), logits)
        with torch.no_grad():
            logits -= lr * grad
    return logits.detach().softmax(-1)


def all_pairs(x):
    i, j = torch.triu_indices(3, 3, 1)
    return x[i], x[j]


def preferences(reward):
    better, worse = all_pairs(reward)
    return torch.sigmoid(better - worse)


def test_the_optimum_is_the_tilted_reference():
    close((REF * (REWARD / BETA).exp()) / (REF * (REWARD / BETA).exp()).sum(), BEST)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_population_dpo_finds_the_optimum(shift):
    """Labels of Bradley-Terry annotators who see the reward; a constant per prompt on the reward is invisible to them."""
    soft, ref = preferences(REWARD + shift), REF.log()

    def loss(logits):
        chosen, rejected = all_pairs(logits.log_softmax(-1))
        return dpo(Pairs(chosen, rejected, *all_pairs(ref), *[torch.ones(3)] * 2), beta=BETA, soft=soft).sum()

    policy = settle(loss).softmax(-1)
    close(policy, BEST, atol=1e-6)
    close(policy, VECTORS["dpo_population_fixed_point"]["pi"], atol=1e-6)


def test_population_bradley_terry_finds_the_reward():
    soft = preferences(REWARD)
    score = settle(lambda r: bradley_terry(*all_pairs(r), soft=soft).sum() + 1e-2 * r.sum() ** 2)
    close(score - score.mean(), REWARD - REWARD.mean(), atol=1e-6)


def test_bradley_terry_of_mixed_annotators_is_not_the_mean_utility():
    """Six in ten like (1, .5, 0), four in ten (0, .5, 4): the fit ranks answer 1 first, the mean utility answer 3."""
    v = VECTORS["annotator_mixture"]
    soft = torch.tensor(v["P"], dtype=torch.float64)[*torch.triu_indices(3, 3, 1)]
    score = settle(lambda r: bradley_terry(*all_pairs(r), soft=soft).sum() + r.sum() ** 2)
    close(score, v["bt_fit"], atol=1e-6)


def advantage(reward, policy):
    return reward - (policy * reward).sum()


def k1_in_the_reward(logp):
    policy = logp.detach().exp()
    shaped = REWARD - BETA * k1(logp, REF.log()).detach()
    return (policy * clipped_surrogate(logp, logp.detach(), advantage(shaped, policy))).sum()


def in_the_loss(estimator):
    def surrogate(logp):
        policy = logp.detach().exp()
        task = clipped_surrogate(logp, logp.detach(), advantage(REWARD, policy))
        return (policy * (task + BETA * estimator(logp, REF.log()))).sum()

    return surrogate


@pytest.mark.parametrize(
    ("key", "surrogate"),
    [
        ("std=False,kl=reward_k1", k1_in_the_reward),
        ("std=False,kl=loss_k2", in_the_loss(k2)),
        ("std=False,kl=loss_k3", in_the_loss(k3)),  # its own place: the forward KL keeps rare answers alive
    ],
)
def test_policy_gradient_comes_to_rest(key, surrogate):
    policy = follow(surrogate)
    close(policy, FIXED_POINTS[key], atol=1e-6)
    assert (torch.allclose(policy, t(*BEST), atol=0.02)) == ("k3" not in key)


def test_k1_in_the_loss_holds_nothing_back():
    assert follow(in_the_loss(k1))[0] > 0.99


def test_the_figures_of_the_optimum():
    v, policy = VECTORS["rlhf_optimum"], follow(k1_in_the_reward)
    kl = (policy * k1(policy.log(), REF.log())).sum()
    close((policy * REWARD).sum(), v["E_r"], atol=1e-6)
    close(kl, v["KL"], atol=1e-6)
    close((policy * REWARD).sum() - BETA * kl, v["J"], atol=1e-9)
