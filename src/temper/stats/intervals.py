"""Means with their 95% intervals, over observations that may come in clusters. Floor 1: numpy and scipy only.

Answers to one prompt, or votes of one rater, are not independent: name the group of each observation in `cluster` and the interval
is that of the groups. Where the data cannot give an interval (one observation, one cluster), it is infinitely wide.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # not scipy.stats, whose import takes most of a second

LEVEL = 0.95
_TAIL = (1 + LEVEL) / 2


@dataclass(frozen=True)
class Interval:
    """A mean, the ends of its 95% interval, and the number of observations."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: nothing is rounded; an end that is not finite is None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def mean_interval(x: ArrayLike, cluster: Sequence[Any] | NDArray | None = None) -> Interval:
    """t interval of a mean: mean +- t(G - 1) sqrt(V).

    V = G / (G - 1) * sum over clusters of (sum of x_i - mean)^2 / n^2, the cluster-robust (sandwich) variance of a mean. With every
    observation its own cluster, as without `cluster`, that is s^2 / n, the ordinary t interval.

    Args:
        x: [n] observations; True and False count as 1 and 0.
        cluster: [n] the group of each observation, by any name (a prompt, a rater).

    Raises:
        ValueError: no observations, one that is not finite, or `cluster` of another length.
    """
    values = _observations(x)
    mean, variance, clusters = _mean_and_variance(values, cluster)
    if clusters < 2:
        return Interval(mean, -math.inf, math.inf, len(values))
    half = float(special.stdtrit(clusters - 1, _TAIL)) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half, len(values))


def share_interval(x: ArrayLike, cluster: Sequence[Any] | NDArray | None = None) -> Interval:
    """Wilson's interval of a share: never outside [0, 1], and not of width zero when all observations agree.

    With clusters it is Wilson's with the effective number of observations n* = p (1 - p) / V (at most n; the number of clusters
    when all agree), V as in `mean_interval`, and t(G - 1) for the normal quantile. Halves for ties make it conservative, for their variance
    is below p (1 - p).

    Args:
        x: [n] in [0, 1], usually True and False.
        cluster: [n] the group of each observation.

    Raises:
        ValueError: as `mean_interval`, or a value outside [0, 1].
    """
    values = _observations(x)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"a share is made of values in [0, 1], these reach from {values.min():g} to {values.max():g}")
    share, variance, clusters = _mean_and_variance(values, cluster)
    n, quantile = float(len(values)), float(special.ndtri(_TAIL))
    if cluster is not None:
        if clusters < 2:
            return Interval(share, 0.0, 1.0, len(values))
        quantile = float(special.stdtrit(clusters - 1, _TAIL))
        agree = share in (0.0, 1.0)
        if agree or variance > 0:
            n = float(clusters) if agree else min(n, share * (1 - share) / variance)
    low, high = _wilson(share, n, quantile)
    return Interval(share, low, high, len(values))


def paired_difference(x: ArrayLike, y: ArrayLike, cluster: Sequence[Any] | NDArray | None = None) -> Interval:
    """t interval of mean(x - y), x_i and y_i measured on the same item.

    Raises:
        ValueError: as `mean_interval`, or the two have different lengths.
    """
    return mean_interval(_difference(x, y), cluster)


def win_rate(x: ArrayLike, y: ArrayLike, cluster: Sequence[Any] | NDArray | None = None) -> Interval:
    """Share of items on which x scores higher than y, a tie counting half; its interval is that of `share_interval`.

    Raises:
        ValueError: as `paired_difference`.
    """
    return share_interval((np.sign(np.round(_difference(x, y), 9)) + 1) / 2, cluster)  # sums of the same terms in another order are ties


def _observations(x: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"an interval needs a list of at least one observation, not shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"observation {int(np.argmin(np.isfinite(values)))} is not finite")
    return values


def _difference(x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    a, b = _observations(x), _observations(y)
    if len(a) != len(b):
        raise ValueError(f"a paired comparison needs one y for each x, not {len(b)} for {len(a)}")
    return a - b


def _mean_and_variance(x: NDArray[np.float64], cluster: Sequence[Any] | NDArray | None) -> tuple[float, float, int]:
    """The mean, the cluster-robust variance of the mean (0 where there is one cluster), and the number of clusters."""
    mean = float(x.mean())
    residual: NDArray[Any] = x - mean
    if cluster is not None:
        if len(cluster) != len(x):
            raise ValueError(f"`cluster` names {len(cluster)} observations, there are {len(x)}")
        index: dict[Any, int] = {}
        groups = [index.setdefault(c, len(index)) for c in cluster]
        residual = np.bincount(groups, weights=residual)
    g = len(residual)
    variance = g / (g - 1) * float(residual @ residual) / len(x) ** 2 if g > 1 else 0.0
    return mean, variance, g


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """The shares that n observations of mean p do not reject (Wilson, 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if p == 0 else max(0.0, centre - half)), (1.0 if p == 1 else min(1.0, centre + half))
