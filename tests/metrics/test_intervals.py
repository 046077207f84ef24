"""Intervals: scipy's on the same resamples, and how often they cover."""

import math

import numpy as np
import pytest
from scipy import stats

from deepsc_jax.metrics.intervals import interval
from deepsc_jax.metrics.statistics import roc_area

X = np.random.default_rng(1).gamma(2.0, size=40)


def mean(rows: np.ndarray) -> float:
    return float(X[rows].mean())


@pytest.mark.parametrize(("method", "theirs"), [("percentile", "percentile"), ("bca", "BCa")])
def test_the_ends_are_scipys_on_the_same_resamples(method: str, theirs: str):
    found = interval(mean, np.arange(40), level=0.9, method=method, resamples=500, seed=7)
    expected = stats.bootstrap(
        (X,),
        np.mean,
        n_resamples=500,
        confidence_level=0.9,
        method=theirs,
        rng=np.random.default_rng(7),
    ).confidence_interval
    np.testing.assert_allclose([found.low, found.high], expected, rtol=1e-12)
    assert (found.value, found.method, found.resamples) == (X.mean(), method, 500)


def test_patients_are_drawn_whole():
    patients = np.repeat(np.arange(8), 5)
    values = np.random.default_rng(0).normal(size=8)[patients]  # of a patient all alike
    for method in ("percentile", "bca"):
        found = interval(lambda rows: float(values[rows].mean()), patients, method=method)
        alone = interval(lambda rows: float(values[::5][rows].mean()), np.arange(8), method=method)
        # BCa counts the resamples below the mean: rounding decides of those that equal it.
        np.testing.assert_allclose([found.low, found.high], [alone.low, alone.high], rtol=1e-3)


def test_where_there_is_no_bca_the_method_says_percentile():
    constant = interval(lambda _: 1.0, np.arange(9), method="bca", resamples=50)
    assert (constant.low, constant.high, constant.method) == (1, 1, "percentile")
    # An area is undefined in some of the resamples of two positive cases.
    truth = np.arange(12) < 2
    area = interval(
        lambda rows: roc_area(truth[rows], X[:12][rows]),
        np.arange(12),
        method="bca",
        resamples=200,
    )
    assert area.method == "percentile"
    assert area.undefined > 0
    assert 0 <= area.low <= area.value <= area.high <= 1
    assert interval(mean, np.zeros(40), method="bca", resamples=9).method == "percentile"


def test_what_is_always_undefined_has_no_interval():
    found = interval(lambda _: math.nan, np.arange(5), resamples=20)
    assert found.undefined == 20
    assert math.isnan(found.low)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="method is normal: expected one of percentile, bca"):
        interval(mean, np.arange(40), method="normal")
    with pytest.raises(ValueError, match="there are no cases"):
        interval(mean, np.arange(0))


def covered(draw, true: float, n: int, draws: int) -> float:
    """The share of percentile intervals of means that hold the true one."""
    held = 0
    for seed in range(draws):
        x = draw(np.random.default_rng(seed), n)
        found = interval(lambda rows, x=x: float(x[rows].mean()), np.arange(n), seed=seed)
        held += found.low <= true <= found.high
    return held / draws


@pytest.mark.slow
def test_intervals_of_a_normal_mean_cover():
    share = covered(lambda rng, n: rng.normal(size=n), 0.0, 200, 1000)
    print(f"n = 200: {share:.3f}")
    assert 0.93 <= share <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 60])
def test_intervals_of_few_or_skewed_cases_are_reported(n: int):
    """No bar: percentile intervals of few cases are known to be too short."""
    normal = covered(lambda rng, n: rng.normal(size=n), 0.0, n, 300)
    skewed = covered(lambda rng, n: rng.lognormal(size=n), math.exp(0.5), n, 300)
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        truth = np.arange(n) % 2 == 0
        scores = rng.normal(size=n) + truth
        found = interval(
            lambda rows, t=truth, s=scores: roc_area(t[rows], s[rows]),
            np.arange(n),
            resamples=200,
            seed=seed,
        )
        held += found.low <= stats.norm.cdf(math.sqrt(0.5)) <= found.high
    print(f"n = {n}: normal {normal:.3f}, log-normal {skewed:.3f}, AUC {held / 100:.3f}")
    assert all(0.5 < share < 1 for share in (normal, skewed))
