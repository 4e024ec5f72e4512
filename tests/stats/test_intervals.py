import json
import math

import numpy as np
import pytest
from scipy import stats

from temper.stats.intervals import Interval, mean_interval, paired_difference, share_interval, win_rate

ANSWERS = [1.0, 2.0, 4.0, 5.0]
PROMPTS = ["a", "a", "b", "b"]


def ends(i):
    return i.low, i.high


def test_mean_by_hand():
    # mean 3, s^2 = (4 + 1 + 1 + 4) / 3, standard error sqrt(10 / 12), t(3) at 97.5% = 3.182446
    i = mean_interval(ANSWERS)
    half = 3.182446305284263 * math.sqrt(10 / 12)
    assert (i.mean, i.n) == (3, 4)
    assert ends(i) == pytest.approx((3 - half, 3 + half), abs=1e-12)


def test_mean_is_the_t_interval():
    x = np.random.default_rng(0).normal(size=30)
    assert ends(mean_interval(x)) == pytest.approx(stats.t.interval(0.95, 29, x.mean(), stats.sem(x)), abs=1e-12)


def test_clustered_mean_by_hand():
    # residuals (-2, -1, 1, 2) sum to -3 and 3 per prompt: V = 2 / 1 * (9 + 9) / 16 = 2.25, t(1) = 12.706205
    i = mean_interval(ANSWERS, cluster=PROMPTS)
    half = 12.706204736432095 * 1.5
    assert (i.mean, i.n) == (3, 4)
    assert ends(i) == pytest.approx((3 - half, 3 + half), abs=1e-9)


def test_equal_clusters_are_an_interval_over_their_means():
    x = np.random.default_rng(1).normal(size=(12, 5))
    assert ends(mean_interval(x.ravel(), np.repeat(np.arange(12), 5))) == pytest.approx(ends(mean_interval(x.mean(1))), abs=1e-12)


def test_clusters_of_one_are_no_clusters():
    assert ends(mean_interval(ANSWERS, cluster=range(4))) == pytest.approx(ends(mean_interval(ANSWERS)), abs=1e-12)


def test_the_order_of_the_observations_does_not_matter():
    order = [2, 0, 3, 1]
    mixed = mean_interval([ANSWERS[i] for i in order], [PROMPTS[i] for i in order])
    assert ends(mixed) == pytest.approx(ends(mean_interval(ANSWERS, PROMPTS)), abs=1e-12)


@pytest.mark.parametrize(("hits", "n"), [(8, 10), (1, 30), (50, 100)])
def test_share_is_wilsons(hits, n):
    i = share_interval([True] * hits + [False] * (n - hits))
    want = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert (i.mean, i.n) == (hits / n, n)
    assert ends(i) == pytest.approx((want.low, want.high), abs=1e-12)


def test_a_share_of_nothing_or_everything_still_has_a_width():
    z = 1.959963984540054
    none, everything = share_interval([0] * 20), share_interval([1] * 20)
    assert (none.low, everything.high) == (0, 1)
    assert none.high == pytest.approx(z * z / (20 + z * z), abs=1e-12)
    assert everything.low == pytest.approx(1 - none.high, abs=1e-12)


def test_clustered_share_by_hand():
    # shares 1, 1, 0 and 0.5 of four prompts of two: mean .625, V = 4 / 3 * (.75^2 + .75^2 + 1.25^2 + .25^2) / 64 = .0572917,
    # so that 8 answers count for .625 * .375 / .0572917 = 4.0909; t(3) = 3.182446
    i = share_interval([1, 1, 1, 1, 0, 0, 0, 1], cluster=[0, 0, 1, 1, 2, 2, 3, 3])
    n, t = 0.625 * 0.375 / (4 / 3 * 2.75 / 64), 3.182446305284263
    edge = [p for p in ends(i) if 0 < p < 1]
    assert i.mean == 0.625
    assert len(edge) == 2
    for p in edge:  # Wilson's ends are where the mean is t standard errors away
        assert (0.625 - p) ** 2 == pytest.approx(t * t * p * (1 - p) / n, abs=1e-12)


def test_when_all_agree_a_cluster_counts_once():
    wide = share_interval([1] * 40, cluster=[i // 10 for i in range(40)])
    t = 3.182446305284263
    assert wide.low == pytest.approx(1 - t * t / (4 + t * t), abs=1e-12)
    assert wide.low < share_interval([1] * 40).low


def test_coverage_with_clusters():
    """Prompts that are hard or easy as a whole: 95% intervals must hold the truth about as often, and without clusters they do not."""
    rng, held = np.random.default_rng(2), np.zeros(3)
    cluster = np.repeat(np.arange(40), 8)
    for _ in range(400):
        x = rng.random(320) < np.repeat(rng.beta(1, 1, 40), 8)
        for k, i in enumerate((share_interval(x, cluster), mean_interval(x, cluster), share_interval(x))):
            held[k] += i.low <= 0.5 <= i.high
    assert (held[:2] / 400 > 0.92).all()
    assert held[2] / 400 < 0.8


def test_few_observations():
    i = mean_interval([0.60, 0.64, 0.68])
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * 0.04 / math.sqrt(3)  # t(2) has a closed form
    assert i.n == 3
    assert (i.mean, *ends(i)) == pytest.approx((0.64, 0.64 - half, 0.64 + half), abs=1e-12)


def test_paired_difference():
    x, y = [3.0, 5.0, 9.0, 11.0], [2.0, 3.0, 5.0, 6.0]
    assert paired_difference(x, y) == mean_interval(ANSWERS)
    assert paired_difference(x, y, PROMPTS) == mean_interval(ANSWERS, PROMPTS)
    back = paired_difference(y, x)
    assert (-back.mean, -back.high, -back.low) == (3, *ends(paired_difference(x, y)))


def test_win_rate_counts_a_tie_as_half():
    i, back = win_rate([2, 1, 1, 5], [1, 1, 2, 0]), win_rate([1, 1, 2, 0], [2, 1, 1, 5])
    assert i.mean == 2.5 / 4
    assert i == share_interval([1, 0.5, 0, 1])
    assert (1 - back.mean, 1 - back.high, 1 - back.low) == pytest.approx((i.mean, *ends(i)), abs=1e-12)
    assert win_rate([1, 2], [1, 2]).mean == 0.5


def test_one_observation_says_nothing_about_its_error():
    for i in (mean_interval([2.0]), mean_interval(ANSWERS, [1] * 4)):
        assert ends(i) == (-math.inf, math.inf)
    assert ends(share_interval([1, 0], cluster=[1, 1])) == (0, 1)
    assert json.dumps(mean_interval([2.0]).to_dict()) == '{"mean": 2.0, "low": null, "high": null, "n": 1}'


def test_to_dict_rounds_nothing():
    third = 1 / 3
    assert Interval(third, third / 2, third * 2, 9).to_dict() == {"mean": third, "low": third / 2, "high": third * 2, "n": 9}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mean_interval([]), "at least one"),
        (lambda: mean_interval([1.0, math.nan]), "observation 1 is not finite"),
        (lambda: mean_interval([1.0, 2.0], cluster=[1]), "names 1 observations, there are 2"),
        (lambda: share_interval([0.5, 1.5]), r"\[0, 1\].*1.5"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "not 2 for 1"),
    ],
)
def test_refuses(call, says):
    with pytest.raises(ValueError, match=says):
        call()
