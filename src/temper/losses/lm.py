"""Language modelling. Floor 1: torch only."""

from torch import Tensor


def nll(logp: Tensor, weight: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each token, in nats: -w_t log pi(y_t | y_<t).

    Args:
        logp: [n] log-probabilities of the tokens themselves.
        weight: [n] how much each token is learned: 1 for an answer's tokens with its end of turn, 0 for context,
            in between for a prompt that is learned a little (arXiv:2401.13586). None = all ones.

    Returns:
        [n]. Divided by sum(w) of the whole step it is the token mean; weights of 1 / (tokens of the sequence) and the number of
        sequences make it the sequence mean.
    """
    return -logp if weight is None else -logp * weight
