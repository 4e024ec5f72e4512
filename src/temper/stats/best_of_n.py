"""Best of n: what it gives, how far it goes from the model it samples, from a few scored samples or exactly. Floor 1: numpy and scipy only.

The best of n samples by a score is a policy of its own (arXiv:2009.01325, app. G.3; arXiv:2210.10760, app. I; arXiv:2401.01879). Equal
scores are broken evenly at random everywhere here, so that duplicates of an answer never make a figure depend on their order.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


def weights(score: ArrayLike, n: int) -> Vector:
    """[N] the chance of each of N samples to be the best of n drawn from them without replacement.

    Ranked by score from 1 to N it is C(i - 1, n - 1) / C(N, n); among equal scores it is shared evenly.
    Raises ValueError for n outside 1..N, and for a score that is no number.
    """
    x = np.asarray(score, dtype=np.float64)
    N = len(x)
    if not 1 <= n <= N:
        raise ValueError(f"best of {n} from {N} samples: n must be between 1 and their number")
    if np.isnan(x).any():
        raise ValueError("a score is no number; leave out what could not be rated")
    ranked = np.zeros(N)  # by recursion from the top: binomials of 1000 samples are no floats
    ranked[N - 1] = n / N
    for i in range(N - 1, n - 1, -1):
        ranked[i - 1] = ranked[i] * (i - n + 1) / i
    _, group, count = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    shares = np.add.reduceat(ranked, ends - count) / count
    return shares[group]


def expected(score: ArrayLike, value: ArrayLike, n: int) -> float:
    """Unbiased estimate of E[value of the best of n by score] from N >= n scored samples: a mean over all subsets of n.

    value: what is reported; the score itself, or another rater's, which did not choose.
    """
    return float(weights(score, n) @ np.asarray(value, dtype=np.float64))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(N - c, k) / C(N, k): the chance that one of k samples is correct, unbiased from N of which c are (arXiv:2107.03374, eq. 1).

    Raises ValueError for k outside 1..N or c outside 0..N.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} from {samples} samples of which {correct} are correct: k and these must be at most {samples}")
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: the KL of best of n from its reference is at most this, and this where no score ever comes twice.

    Derived in arXiv:2009.01325 (app. G.3) as an equality; that it is a bound: arXiv:2401.01879, theorem 1.
    """
    return math.log(n) - (n - 1) / n


def policy(p: ArrayLike, score: ArrayLike, n: int) -> Vector:
    """[K] exact probabilities of the best of n draws from p [K]: F(s)^n - F(<s)^n for a score, shared as p shares it."""
    p = np.asarray(p, dtype=np.float64)
    group, mass, below = _steps(p, score)
    chance = (below + mass) ** n - below**n
    return np.where(mass[group] > 0, p / np.where(mass > 0, mass, 1.0)[group], 0.0) * chance[group]


def kl_exact(p: ArrayLike, score: ArrayLike, n: int) -> float:
    """KL(best of n || p) in nats where all K answers and their probabilities p [K] are known."""
    _, mass, below = _steps(np.asarray(p, dtype=np.float64), score)
    chance = (below + mass) ** n - below**n
    held = chance > 0
    return float((chance[held] * np.log(chance[held] / mass[held])).sum())


def kl_estimate(score: ArrayLike, n: int, mass: ArrayLike | None = None, answer: Sequence[object] | None = None) -> float:
    """KL(best of n || reference) in nats from N >= n samples of one prompt. It is at most `kl_bound(n)`.

    With even tie-breaks (an answer and a uniform number), best of n would be at the bound exactly; what answers that come again
    leave of it is, by the chain rule, the bound less what the uniform number knows. For answers of one score that have the
    probability m between F = a and b = a + m that is log(n m / B) + (n - 1) E log F, with B = b^n - a^n, E log F =
    (b^n log b - a^n log a) / B - 1/n. m is the sum of their own probabilities as far as they were sampled; 1 - b is the share of
    samples with a higher score. Equal scores of *different* answers are ties as well, as in `policy`.

    Args:
        score: [N].
        mass: [N] the reference's probability of each sampled answer, exp of its summed log-prob; None: each counts 1 / N, where only
            what comes again counts as an atom.
        answer: [N] by which equal answers are known, so that their mass counts once; needed with `mass`.
    """
    x, w = np.asarray(score, dtype=np.float64), weights(score, n)
    N = len(x)
    _, group, count = np.unique(x, return_inverse=True, return_counts=True)
    chance = np.bincount(group, weights=w)
    above = (N - np.cumsum(count)) / N
    if mass is None:
        own: Vector = np.where(count > 1, count / N, 0.0)
    else:
        names: Sequence[object] = range(N) if answer is None else answer
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        seen = list(first.values())
        own = np.bincount(group[seen], weights=np.asarray(mass, dtype=np.float64)[seen], minlength=len(count)).astype(np.float64)
    b = 1.0 - above
    m = np.minimum(own, b)
    known = [g for g in range(len(count)) if chance[g] > 0 and m[g] > 0]
    return max(0.0, kl_bound(n) - sum(chance[g] * _tie(b[g] - m[g], b[g], n) for g in known))


def _tie(a: float, b: float, n: int) -> float:
    """KL of n v^(n-1) / (b^n - a^n) on [a, b] from the uniform there: what a tie-break between equal scores would know."""
    if n == 1 or b - a < 1e-9 * b:
        return 0.0
    r = a / b  # v / b instead of v: only the ratio counts
    B = -math.expm1(n * math.log(r)) if r > 0 else 1.0
    log_v = (0.0 if r <= 0 else -(r**n) * math.log(r) / B) - 1 / n
    return max(0.0, math.log(n * (1 - r) / B) + (n - 1) * log_v)


def _steps(p: Vector, score: ArrayLike) -> tuple[NDArray[np.intp], Vector, Vector]:
    """(each answer's group of equal scores, each group's mass, the mass below it). Raises ValueError where p is no distribution."""
    if p.ndim != 1 or not p.size or (p < 0).any() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"probabilities that sum to {p.sum():g}: they must be those of all answers")
    _, group = np.unique(np.asarray(score, dtype=np.float64), return_inverse=True)
    mass: Vector = np.bincount(group, weights=p / p.sum()).astype(np.float64)
    return group, mass, np.concatenate([[0.0], np.cumsum(mass)[:-1]])
