import math

import pytest
import torch

from temper.losses.reward import bradley_terry

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
