import pytest
import torch

from temper.losses.advantage import baseline, gae, group_std, kl_shaped_reward, standardised, to_go, whiten

from .reference import VECTORS, close, t

V = VECTORS["ppo_reward_gae"]
LOGP, REF, VALUE = t(-1, -0.5, -2, -0.3), t(-1.2, -0.4, -1.5, -0.3), t(*V["values"])
REWARD = t(*V["rewards"])


def test_vectors():
    close(kl_shaped_reward(0.8, LOGP, REF, 0.05), V["rewards"])
    for key, gamma, lam in (("adv_l095", 1, 0.95), ("adv_l1", 1, 1), ("adv_l0", 1, 0), ("gamma0p9", 0.9, 0.95)):
        close(gae(REWARD, VALUE, gamma=gamma, lam=lam), V[key])
    advantage = gae(REWARD, VALUE, gamma=1, lam=0.95)
    close(advantage + VALUE, V["returns_l095"])
    close(whiten(advantage), V["whiten_pop"])
    close(whiten(advantage, unbiased=True), V["whiten_bessel"])
    close(whiten(REWARD, keep_mean=True, unbiased=True), V["rewards_whiten_noshift_bessel"])


def test_the_score_lands_on_the_last_token_and_the_inputs_stay_as_they_are():
    logp = LOGP.clone()
    close(kl_shaped_reward(0.8, logp, logp, 0.05), [0, 0, 0, 0.8])
    close(kl_shaped_reward(t(0.8)[0], logp, REF, 0.0), [0, 0, 0, 0.8])
    assert torch.equal(logp, LOGP)


def test_gae_is_the_sum_of_its_definition():
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(7, generator=g).double(), torch.randn(7, generator=g).double()
    delta = reward + 0.9 * torch.cat([value[1:], t(0)]) - value
    want = [sum((0.9 * 0.8) ** (s - k) * float(delta[s]) for s in range(k, 7)) for k in range(7)]
    close(gae(reward, value, gamma=0.9, lam=0.8), want)


def test_gae_with_lambda_one_is_reward_to_go_minus_value():
    close(gae(REWARD, VALUE, gamma=1, lam=1), REWARD.flip(0).cumsum(0).flip(0) - VALUE)


def test_gae_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match=r"\[4\].*\[3\]"):
        gae(REWARD, VALUE[:3], gamma=1, lam=1)


def test_advantages_are_data():
    value = VALUE.clone().requires_grad_()
    assert not gae(REWARD, value).requires_grad
    assert not kl_shaped_reward(0.8, LOGP.clone().requires_grad_(), REF, 0.05).requires_grad
    assert gae(REWARD.float(), VALUE.float()).dtype == torch.float32


def test_whitening():
    x = t(1, 2, 3, 10)
    close(whiten(x).mean(), 0)
    close(whiten(x).var(correction=0), 1, atol=1e-7)
    close(whiten(x, unbiased=True).var(), 1, atol=1e-7)
    close(whiten(x, keep_mean=True).mean(), 4)
    close(whiten(x + 5), whiten(x))  # a constant added to every reward changes nothing


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_of_equal_numbers_is_zero(unbiased):
    assert whiten(t(3, 3, 3), unbiased=unbiased).tolist() == [0, 0, 0]
    assert whiten(t(3), unbiased=unbiased).tolist() == [0]


G = VECTORS["group_adv"]
ONE = torch.zeros(4, dtype=torch.int64)


def compared(reward, group, how="group", **more):
    return standardised(reward - baseline(reward, group, how), group_std(reward, group, **more), 1e-6)


def test_vectors_of_groups():
    reward, binary = t(*G["rewards"]), t(1, 0, 0, 0)
    close(reward - baseline(reward, ONE), G["mean_sub"])
    close(reward - baseline(reward, ONE, "leave-one-out"), G["rloo"])
    close(baseline(reward, ONE, "none"), [0, 0, 0, 0])
    close(compared(reward, ONE), G["grpo_pop"])
    close(compared(reward, ONE, unbiased=True), G["grpo_bessel"])
    close(compared(binary, ONE), G["binary_1000_pop"])
    close(compared(binary, ONE, unbiased=True), G["binary_1000_bessel"])


def test_reinforce_plus_plus_with_baseline():
    reward, group = t(1, 0.2, 0.5, 0.3, 2, 2, 1, 0), torch.tensor([0] * 4 + [1] * 4)
    close(whiten(reward - baseline(reward, group)).view(2, 4), VECTORS["reinforcepp_baseline"]["adv"])


@pytest.mark.parametrize("how", ["group", "leave-one-out"])
def test_what_a_prompt_is_worth_cancels_and_groups_do_not_mix(how):
    g = torch.Generator().manual_seed(1)
    reward, group = torch.randn(7, generator=g).double(), torch.tensor([1, 0, 1, 1, 0, 0, 1])
    got = reward - baseline(reward, group, how)
    close(reward + t(5, -3)[group] - baseline(reward + t(5, -3)[group], group, how), got)
    for k in 0, 1:
        own = reward[group == k]
        others = (own.sum() - own) / (len(own) - 1) if how == "leave-one-out" else own.mean()
        close(got[group == k], own - others)


def test_an_answer_alone_in_its_group_teaches_nothing():
    reward, group = t(3, 1, 2), torch.tensor([0, 1, 1])
    for how in "group", "leave-one-out":
        assert float((reward - baseline(reward, group, how))[0]) == 0
    for unbiased in False, True:
        assert float(group_std(reward, group, unbiased=unbiased)[0]) == 0


def test_weights_stand_for_answers_drawn_more_than_once():
    reward, group, often = t(1, 0, 5, 2), torch.tensor([0, 0, 1, 1]), torch.tensor([3, 1, 2, 1])
    many = reward.repeat_interleave(often), group.repeat_interleave(often)
    for how in "group", "leave-one-out":
        weighted = baseline(reward, group, how, often.double())
        # the others of an answer drawn three times are, without its weight, those that are not itself
        plain = baseline(*many, how)[torch.tensor([0, 3, 4, 6])]
        if how == "group":
            close(weighted, plain)
        else:
            close(weighted, t(0, 1, 2, 5))
    close(group_std(reward, group, weight=often.double()), group_std(*many)[torch.tensor([0, 3, 4, 6])])


def test_a_group_that_differs_by_rounding_is_not_blown_up():
    close(compared(t(1, 1, 1, 1), ONE), [0, 0, 0, 0])
    close(compared(t(1, 1 + 1e-7, 1, 1), ONE), [0, 0, 0, 0])
    assert compared(t(1, 1.01, 1, 1), ONE).abs().max() > 1  # one that differs is, whatever by: what dividing by the deviation means


def test_sums_from_each_token_on():
    close(to_go(t(1, 0, 2, -1)), [2, 1, 1, -1])
