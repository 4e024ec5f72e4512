import math

import pytest
import torch

from temper.losses.reward import RULES, bradley_terry, davidson, plackett_luce, rao_kupper, step_loss

from .reference import VECTORS, close, t

BT = VECTORS["bt"]
CHOSEN, REJECTED = (1.2, 0.3), (0.5, 0.9)


def test_vectors():
    won, lost = t(*CHOSEN, grad=True), t(*REJECTED)
    loss = bradley_terry(won, lost)
    close(loss, BT["per"])
    close(loss.mean(), BT["loss"])
    loss.mean().backward()
    close(won.grad, BT["grad_rw"])
    close(bradley_terry(won, lost, margin=t(0.5, 0)).mean(), BT["with_margin"])
    close(bradley_terry(won, lost, centring=0.01).mean(), BT["centred_eta001"])
    close(bradley_terry(won, lost, soft=t(0.7, 0.7)).mean(), BT["soft_p07"])
    close((won > lost).double().mean(), BT["acc"])
    close(bradley_terry(t(0.3), t(0.0), soft=t(VECTORS["cai"]["p"])), [VECTORS["cai"]["pm_loss"]])


def test_all_pairs_of_a_ranking():
    score = t(1, 0.2, -0.3)
    better, worse = torch.triu_indices(3, 3, 1)
    close(bradley_terry(score[better], score[worse]).mean(), VECTORS["kwise"]["instructgpt"])


@pytest.mark.parametrize("centring", [0.0, 0.1])
def test_swapping_the_answers_and_the_label_changes_nothing(centring):
    won, lost, margin, p = t(1.2, -3), t(0.5, 2), t(0.3, 0.7), t(0.8, 0.1)
    one = bradley_terry(won, lost, margin=margin, soft=p, centring=centring)
    other = bradley_terry(lost, won, margin=margin, soft=1 - p, centring=centring)
    close(one, other)
    close(bradley_terry(won, lost, margin=margin, soft=t(1, 1)), bradley_terry(won, lost, margin=margin))


def test_gradients_are_antisymmetric_and_ignore_a_constant_per_prompt():
    won, lost = t(*CHOSEN, grad=True), t(*REJECTED, grad=True)
    bradley_terry(won, lost).sum().backward()
    close(won.grad, -lost.grad)
    close(bradley_terry(won + 7, lost + 7), bradley_terry(won, lost))


def test_centring_alone_feels_the_constant():
    won, lost = t(2.0, grad=True), t(2.0, grad=True)
    bradley_terry(won, lost, centring=0.01).sum().backward()
    close(won.grad, [-0.5 + 0.01 * 2 * 4])
    close(lost.grad, [0.5 + 0.01 * 2 * 4])


def test_a_tie_is_happiest_at_equal_scores():
    won, lost = t(0.4, grad=True), t(0.4)
    loss = bradley_terry(won, lost, soft=t(0.5))
    loss.sum().backward()
    close(loss, [math.log(2)])
    close(won.grad, [0.0])


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_finite_at_the_extremes(gap):
    won, lost = torch.tensor([gap], requires_grad=True), torch.tensor([0.0])
    loss = bradley_terry(won, lost, soft=torch.tensor([1.0]), margin=torch.tensor([0.5]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert won.grad.isfinite().all()


TIED = {"rao_kupper": (rao_kupper, 0.4), "davidson": (davidson, 0.8)}


@pytest.mark.parametrize("name", TIED)
def test_probabilities_of_rules_with_ties(name):
    rule, tie = TIED[name]
    win, lose, even = (x.exp() for x in rule.outcomes(t(0.7), tie=tie))
    for got, key in (win, "win"), (lose, "lose"), (even, "tie"):
        close(got, [VECTORS["ties"][name][key]])
    close(win + lose + even, [1.0])


@pytest.mark.parametrize("name", TIED)
def test_losses_of_rules_with_ties(name):
    """Label 1 is a win, 0 a loss, 0.5 a tie; 0.75 half a win and half a tie."""
    rule, tie = TIED[name]
    p = VECTORS["ties"][name]
    got = rule(t(0.7, 0.7, 0.7, 0.7), t(0, 0, 0, 0), soft=t(1, 0, 0.5, 0.75), tie=tie)
    logs = [-math.log(p[key]) for key in ("win", "lose", "tie")]
    close(got, [*logs, (logs[0] + logs[2]) / 2])


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_symmetric_and_ignores_a_constant(name):
    """Swapping answers and label changes nothing, with margins and flipped labels; probabilities sum to one."""
    rule = RULES[name]
    won, lost, margin, p = t(1.2, -3), t(0.5, 2), t(0.3, 0.7), t(0.8, 0.1)
    how = {"margin": margin, "flip": 0.1, "centring": 0.05}
    close(rule(won, lost, soft=p, **how), rule(lost, won, soft=1 - p, **how))
    close(rule(won + 7, lost + 7, soft=p), rule(won, lost, soft=p))
    close(sum(x.exp() for x in rule.outcomes(won - lost) if x is not None), [1.0, 1.0])
    assert rule.ties == (rule.outcomes(won).tie is not None)
    assert rule(torch.tensor([-1e4, 1e4]), torch.zeros(2), soft=torch.tensor([1.0, 0.5])).isfinite().all()


def test_a_known_share_of_flipped_labels():
    """P~ = (1 - 2 e) sigma(D) + e; its best gap against labels that agree with probability a is where sigma(D) undoes the flips."""
    e, won = 0.25, t(*CHOSEN)
    close(bradley_terry(won, t(*REJECTED), flip=e), -torch.log((1 - 2 * e) * torch.sigmoid(won - t(*REJECTED)) + e))
    gap = t(math.log(0.9 / 0.1), grad=True)  # sigma = 0.9, of noisy labels 0.7 agree
    (0.7 * bradley_terry(gap, t(0.0), flip=e) + 0.3 * bradley_terry(t(0.0), gap, flip=e)).sum().backward()
    close(gap.grad, [0.0])


def test_whole_rankings():
    scores, there = t(1, 0.2, -0.3)[None], torch.ones(1, 3, dtype=torch.bool)
    close(plackett_luce(scores, there), [VECTORS["kwise"]["plackett_luce"]])
    padded = torch.tensor([[1, 0.2, -0.3, 9], [1.2, 0.5, 9, 9]], dtype=torch.double, requires_grad=True)
    there = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    loss = plackett_luce(padded, there)
    close(loss, [VECTORS["kwise"]["plackett_luce"], BT["per"][0]])
    loss.sum().backward()
    assert padded.grad.isfinite().all()
    assert not padded.grad[~there].any()
    close(padded.grad.sum(1), [0.0, 0.0])


def test_steps():
    p = t(0.6)
    close(step_loss(torch.logit(p), t(VECTORS["prm"]["mc_soft_3of8"])), [VECTORS["prm"]["bce_step_soft"]])
    logits = t(0.3, -1.0, 2.0)[None].expand(4, 3)
    logs = -logits[0].log_softmax(-1)
    close(step_loss(logits, t(0, 0.5, 1, 0.75)), [*logs.tolist(), float(logs[1] + logs[2]) / 2])
