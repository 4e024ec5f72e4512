"""On a bandit of three answers, in exact expectation: where each objective comes to rest."""

from itertools import permutations

import pytest
import torch

from temper.losses.advantage import baseline, group_std, standardised
from temper.losses.kl import k1, k2, k3, slope
from temper.losses.policy import clipped_surrogate
from temper.losses.preference import Pairs, Rankings, cpo, dpo, fdpo, hinge, ipo, pldpo, rdpo
from temper.losses.reward import bradley_terry
from temper.losses.unpaired import Answers, bco

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


def population(fn, soft, **how):
    """Where a rule comes to rest on all pairs of the three answers, with these chances that the first is preferred -> the policy."""

    def loss(logits):
        chosen, rejected = all_pairs(logits.log_softmax(-1))
        return fn(Pairs(chosen, rejected, *all_pairs(REF.log()), *[torch.ones(3)] * 2), soft=soft, **how).sum()

    return settle(loss, steps=300).softmax(-1)


def test_robust_dpo_finds_it_from_flipped_labels():
    """Where DPO itself, and its smoothed form, go elsewhere."""
    flipped = 0.8 * preferences(REWARD) + 0.2 * (1 - preferences(REWARD))
    close(population(rdpo, flipped, beta=BETA, flip_rate=0.2), BEST, atol=1e-6)
    assert not torch.allclose(population(dpo, flipped, beta=BETA), t(*BEST), atol=0.05)


def test_population_ipo_tilts_by_the_chance_to_win():
    """pi_ref exp(P(y beats one drawn evenly) / tau), arXiv:2310.12036 eq. 7 with the identity; no Bradley-Terry anywhere."""
    wins, tau = torch.full((3, 3), 0.5, dtype=torch.double), 0.3
    better, worse = torch.triu_indices(3, 3, 1)
    wins[better, worse] = t(0.9, 0.4, 0.8)  # not transitive
    wins[worse, better] = 1 - wins[better, worse]
    tilted = REF * (wins.mean(1) / tau).exp()
    close(population(ipo, wins[better, worse], tau=tau), tilted / tilted.sum(), atol=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
def test_ipo_of_a_certain_label_stays_near_the_reference(tau):
    """sigma(1 / (2 tau)) of two answers, where DPO would run away."""

    def loss(logits):
        a, b = logits.log_softmax(-1)
        return ipo(Pairs(a[None], b[None], t(0.5).log(), t(0.5).log(), t(1), t(1)), tau=tau).sum()

    close(settle(loss, start=t(0.5, 0.5)).softmax(-1)[0], VECTORS["ipo_two_action_det"][str(tau)], atol=1e-6)


def test_cpo_without_its_likelihood_is_dpo_from_the_uniform_reference():
    close(population(cpo, preferences(REWARD), beta=BETA, nll_weight=0.0), (REWARD / BETA).softmax(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("divergence", "slope"),
    [
        ("forward-kl", lambda u: -1 / u),
        ("js", lambda u: (2 * u / (1 + u)).log()),
        ("alpha", lambda u: (1 - u**-0.5) / 0.5),
        ("chi2", lambda u: u + u.log()),
    ],
)
def test_population_f_dpo_finds_the_optimum_under_its_divergence(divergence, slope):
    """Where r - beta f'(pi / pi_ref) is the same for all answers: the condition for the most E r - beta D_f (arXiv:2309.16240 eq. 6)."""
    policy = population(fdpo, preferences(REWARD), beta=BETA, divergence=divergence)
    level = REWARD - BETA * slope(policy / REF)
    close(level, level.mean().expand(3), atol=1e-5)
    assert not torch.allclose(policy, t(*BEST), atol=0.01)


def test_population_plackett_luce_finds_the_optimum():
    """From all six rankings, each as often as raters who choose by the reward, place by place, give it."""
    orders = torch.tensor(list(permutations(range(3))))
    chance = torch.stack([(REWARD[o] - torch.stack([REWARD[o[k:]].logsumexp(0) for k in range(3)])).sum().exp() for o in orders])
    close(chance.sum(), 1)
    record = torch.arange(6).repeat_interleave(3)

    def loss(logits):
        logp = logits.log_softmax(-1)
        return (chance * pldpo(Rankings(logp[orders].flatten(), REF.log()[orders].flatten(), torch.ones(18), record), beta=BETA)).sum()

    close(settle(loss).softmax(-1), BEST, atol=1e-6)


def test_the_hinge_stops_at_its_margin():
    """Whatever the label's chance, if it is above a half: h = 1 / beta."""
    h = torch.linspace(-4, 6, 1001, dtype=torch.double)
    z, n = torch.zeros_like(h), torch.ones_like(h)
    for soft in 0.6, 0.95:
        close(h[hinge(Pairs(h, z, z, z, n, n), beta=0.5, soft=soft * n).argmin()], 2.0)


def test_a_classifier_of_thumbs_finds_the_optimum_where_its_shift_is_right():
    """BCO of thumbs that go up with chance sigma(r): its logit is r where the point is -log Z of pi_ref e^(r / beta)."""
    up, point = torch.sigmoid(REWARD), -torch.tensor(VECTORS["rlhf_optimum"]["beta_logZ"]).double() / BETA

    def loss(logits):
        gain = logits.log_softmax(-1) - REF.log()
        good = torch.ones(3, dtype=torch.bool)
        return (up * bco(Answers(gain, good, point), beta=BETA) + (1 - up) * bco(Answers(gain, ~good, point), beta=BETA)).sum()

    close(settle(loss).softmax(-1), BEST, atol=1e-6)


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


ONE = torch.zeros(3, dtype=torch.int64)  # all answers are of one prompt


def advantage(reward, policy):
    return reward - baseline(reward, ONE, "group", policy)


def by_deviation(reward, policy):
    return standardised(advantage(reward, policy), group_std(reward, ONE, weight=policy), 1e-12)


def k1_in_the_reward(logp, compare=advantage):
    policy = logp.detach().exp()
    shaped = REWARD - BETA * k1(logp, REF.log()).detach()
    return (policy * clipped_surrogate(logp, logp.detach(), compare(shaped, policy))).sum()


def k1_after_comparing(logp):
    """The task's reward is standardised, the KL is not."""
    policy = logp.detach().exp()
    shaped = by_deviation(REWARD, policy) - BETA * k1(logp, REF.log()).detach()
    return (policy * clipped_surrogate(logp, logp.detach(), advantage(shaped, policy))).sum()


def in_the_loss(estimator, compare=advantage):
    def surrogate(logp):
        policy = logp.detach().exp()
        task = clipped_surrogate(logp, logp.detach(), compare(REWARD, policy))
        return (policy * (task + BETA * estimator(logp, REF.log()))).sum()

    return surrogate


RESTS = {
    "std=False,kl=reward_k1": k1_in_the_reward,
    "std=False,kl=loss_k2": in_the_loss(k2),
    "std=False,kl=loss_k3": in_the_loss(k3),  # its own place: the forward KL keeps rare answers alive
    "std=True,kl=loss_k3": in_the_loss(k3, by_deviation),  # GRPO as published: its own place too
}


@pytest.mark.slow
@pytest.mark.parametrize("key", RESTS)
def test_policy_gradient_comes_to_rest(key):
    policy = follow(RESTS[key])
    close(policy, FIXED_POINTS[key], atol=1e-6)
    assert (torch.allclose(policy, t(*BEST), atol=0.02)) == ("k3" not in key)


def test_standardised_with_the_kl_inside_it_finds_the_optimum():
    """Where reward and KL are standardised together, their ratio stays."""
    close(follow(lambda logp: k1_in_the_reward(logp, by_deviation), lr=0.02, steps=1500), BEST, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", [k1_after_comparing, in_the_loss(k2, by_deviation)])
def test_standardised_with_the_kl_outside_it_collapses(surrogate):
    """As the deviation shrinks, 1 / std outgrows the KL."""
    assert follow(surrogate, lr=0.2, steps=1500)[0] > 0.99


def test_the_weight_that_the_fused_gradient_takes_is_the_losses_gradient():
    """At ratio 1 the push on each token is -A + beta times the estimator's slope: the same places of rest."""
    for estimator in k2, k3:
        for compare in advantage, by_deviation:
            logits = t(0.3, -0.2, 0.1, grad=True)
            (want,) = torch.autograd.grad(in_the_loss(estimator, compare)(logits.log_softmax(-1)), logits)
            logp = logits.log_softmax(-1)
            policy = logp.detach().exp()
            push = compare(REWARD, policy) - BETA * slope(estimator, logp, REF.log())
            (got,) = torch.autograd.grad(-(policy * push * logp).sum(), logits)
            close(got, want)


@pytest.mark.parametrize("key", RESTS)
def test_no_policy_is_above_the_frontier(key):
    """Of all policies with the same KL the tilted reference has the most reward: nothing on the way there, or at rest, has more."""

    def tilted(beta):
        policy = (REF.log() + REWARD / beta).softmax(-1)
        return float((policy * REWARD).sum()), float((policy * (policy / REF).log()).sum())

    for steps in 3, 30, 300:
        policy = follow(RESTS[key], steps=steps)
        kl, low, high = float((policy * (policy / REF).log()).sum()), 1e-3, 1e3
        for _ in range(200):  # the beta whose optimum has this KL
            middle = (low * high) ** 0.5
            low, high = (middle, high) if tilted(middle)[1] > kl else (low, middle)
        assert float((policy * REWARD).sum()) <= tilted(high)[0] + 1e-6


def test_k1_in_the_loss_holds_nothing_back():
    assert follow(in_the_loss(k1))[0] > 0.99


def test_the_figures_of_the_optimum():
    v, policy = VECTORS["rlhf_optimum"], follow(k1_in_the_reward)
    kl = (policy * k1(policy.log(), REF.log())).sum()
    close((policy * REWARD).sum(), v["E_r"], atol=1e-6)
    close(kl, v["KL"], atol=1e-6)
    close((policy * REWARD).sum() - BETA * kl, v["J"], atol=1e-9)
