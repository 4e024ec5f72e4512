import numpy as np
import pytest

from temper.stats.calibration import calibration


def test_by_hand():
    """Two bins: 0.55 said and 1 of 2 came; 0.95 said and 2 of 2 came."""
    found = calibration([0.55, 0.55, 0.95, 0.95], [0, 1, 1, 1], low=0.5)
    assert found.ece.mean == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert found.gap.mean == pytest.approx(0.75 - 0.75)
    assert [(round(b.low, 2), b.expected, b.observed.mean, b.observed.n) for b in found.bins] == [
        (0.55, pytest.approx(0.55), 0.5, 2),
        (0.95, pytest.approx(0.95), 1.0, 2),
    ]


def test_honest_and_boastful_predictions():
    rng = np.random.default_rng(3)
    p = rng.uniform(0.5, 1, 4000)
    y = rng.random(4000) < p
    honest = calibration(p, y, low=0.5)
    assert honest.gap.low < 0 < honest.gap.high
    assert honest.ece.mean < 0.03
    loud = calibration(np.minimum(1, p + 0.2), y, low=0.5)
    assert loud.gap.low > 0.1
    assert loud.ece.low > honest.ece.high


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(5)
    p, y = np.repeat(rng.uniform(0.5, 1, 100), 10), np.repeat(rng.random(100) < 0.7, 10)
    alone, together = calibration(p, y), calibration(p, y, np.repeat(np.arange(100), 10))
    assert together.gap.high - together.gap.low > 2 * (alone.gap.high - alone.gap.low)
    assert together.ece.high - together.ece.low > alone.ece.high - alone.ece.low
