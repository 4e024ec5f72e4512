"""Whether probabilities mean what they say: reliability, expected calibration error, confidence against accuracy. Floor 1: numpy only."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from temper.stats.intervals import LEVEL, Interval, mean_interval, paired_difference

BINS = 10
RESAMPLES = 400


class Bin(NamedTuple):
    """Predictions in [low, high): their mean, and what came."""

    low: float
    high: float
    expected: float
    observed: Interval


class Calibration(NamedTuple):
    """ece: sum over bins of n_b / n |observed - expected| (arXiv:1706.04599), with the percentile interval of a bootstrap over clusters. It
    is biased upwards where bins are small: noise adds to it too. gap: mean of expected - observed, so above 0 is overconfidence."""

    ece: Interval
    gap: Interval
    bins: list[Bin]


def calibration(
    expected: ArrayLike, observed: ArrayLike, cluster: Sequence[Any] | None = None, low: float = 0.0, high: float = 1.0
) -> Calibration:
    """expected: [n] predicted probabilities in [low, high], cut into BINS bins of one width; observed: [n] what came, 0 or 1, or its exact
    probability. cluster: [n], see `mean_interval`. The bootstrap's seed is fixed. Raises ValueError as `paired_difference`."""
    p, y = np.asarray(expected, dtype=float), np.asarray(observed, dtype=float)
    gap = paired_difference(p, y, cluster)
    place = np.clip(((p - low) / (high - low) * BINS).astype(int), 0, BINS - 1)
    groups = np.unique(np.arange(len(p)) if cluster is None else np.asarray(cluster), return_inverse=True)[1]
    table = np.zeros((groups.max() + 1, BINS))  # of each cluster the sum of expected - observed in each bin
    np.add.at(table, (groups, place), p - y)
    draws = np.random.default_rng(0).integers(len(table), size=(RESAMPLES, len(table)))
    sizes = np.bincount(groups)
    drawn = np.array([np.abs(table[d].sum(0)).sum() / sizes[d].sum() for d in draws])
    ends = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    ece = Interval(float(np.abs(table.sum(0)).sum() / len(p)), float(ends[0]), float(ends[1]), len(p))
    width = (high - low) / BINS
    bins = []
    for b in range(BINS):
        here = place == b
        if here.any():
            inside = None if cluster is None else groups[here]
            bins.append(Bin(low + b * width, low + (b + 1) * width, float(p[here].mean()), mean_interval(y[here], inside)))
    return Calibration(ece, gap, bins)
