import pytest
import torch

from temper.losses.kl import adaptive_beta, horizon_rate, k1, k2, k3, slope

from .reference import VECTORS, close, t

KL = VECTORS["kl"]
PI, REF = t(0.5, 0.3, 0.2), t(0.4, 0.4, 0.2)


def test_vectors():
    logp, ref_logp = PI.log(), REF.log()
    for name, estimator in {"k1": k1, "k2": k2, "k3": k3}.items():
        close(estimator(logp, ref_logp), KL[name])
        close((PI * estimator(logp, ref_logp)).sum(), KL[f"E_{name}"])
    close((PI * (logp - ref_logp)).sum(), KL["exact"])


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_expected_gradient_as_a_loss(estimator):
    logits = PI.log().requires_grad_()
    (PI * estimator(logits.log_softmax(-1), REF.log())).sum().backward()  # expectation over samples that are data
    close(logits.grad, KL[f"Egrad_{estimator.__name__}"])


def test_what_those_gradients_are():
    close(t(*KL["Egrad_k1"]), [0, 0, 0])
    for divergence, name in ((lambda q: (q * (q.log() - REF.log())).sum(), "k2"), (lambda q: (REF * (REF.log() - q.log())).sum(), "k3")):
        logits = PI.log().requires_grad_()
        divergence(logits.softmax(-1)).backward()
        close(logits.grad, KL[f"Egrad_{name}"])


def test_k1_in_the_reward_is_the_gradient_of_the_reverse_kl():
    logits = PI.log().requires_grad_()
    logp = logits.log_softmax(-1)
    (PI * k1(logp, REF.log()).detach() * logp).sum().backward()
    close(logits.grad, KL["grad_exact_reverseKL"])


def test_k3_is_not_rounding_noise_near_zero():
    logp, ref_logp = torch.tensor([-3.0]), torch.tensor([-3.0]) + 2**-12
    torch.testing.assert_close(k3(logp, ref_logp), torch.tensor([2.0**-25]), rtol=1e-3, atol=0)


def test_adaptive_beta():
    v = VECTORS["adaptive_kl"]
    assert adaptive_beta(0.2, 9, 6) == pytest.approx(v["ziegler_K0p1"], abs=1e-12)
    assert adaptive_beta(0.2, 9, 6, rate=horizon_rate(256, 10_000)) == pytest.approx(v["horizon10000_n256"], abs=1e-12)
    assert adaptive_beta(0.2, 5.5, 6) == pytest.approx(v["below"], abs=1e-12)
    assert adaptive_beta(0.2, 6, 6) == 0.2
    assert adaptive_beta(0.2, -100, 6) == pytest.approx(0.2 * 0.98, abs=1e-12)


def test_what_an_estimator_pushes_each_token_with():
    logp, ref = t(-1, -2, -0.5), t(-1.2, -1, -0.5)
    close(slope(k2, logp, ref), logp - ref)
    close(slope(k3, logp, ref), 1 - (ref - logp).exp())
    with torch.no_grad():
        assert not slope(k3, logp, ref).requires_grad
