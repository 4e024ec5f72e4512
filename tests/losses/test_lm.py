import torch

from temper.losses.lm import nll

from .reference import VECTORS, close, t

LM = VECTORS["lm"]
LOGITS = [[2, 0, -1], [0, 1, 0], [1, 1, 3], [0, 0, 0.5]]
LABELS = [0, 1, 2, 1]


def logp():
    return torch.tensor(LOGITS, dtype=torch.float64).log_softmax(-1)[torch.arange(4), LABELS]


def test_vectors():
    weight = t(0, 1, 1, 1)
    close(nll(logp()), LM["nll"])
    close(nll(logp()).mean(), LM["unmasked_mean"])
    close(nll(logp(), weight).sum() / weight.sum(), LM["masked_mean"])


def test_sums_over_micro_batches_give_the_mean_of_the_step():
    v = VECTORS["grad_accum"]
    micro = [t(*[-s / n] * n) for s, n in zip(v["sums"], v["tokens"], strict=True)]
    sums = [nll(m).sum() for m in micro]
    close(torch.stack(sums), v["sums"])
    close(sum(sums) / sum(v["tokens"]), v["global_mean"])
    close(sum(nll(m).mean() for m in micro) / 2, v["mean_of_means"])  # what averaging inside would have made of it


def test_context_has_exactly_no_gradient():
    x = logp().requires_grad_()
    nll(x, t(0, 0.5, 1, 0)).sum().backward()
    assert x.grad.tolist() == [0, -0.5, -1, 0]
