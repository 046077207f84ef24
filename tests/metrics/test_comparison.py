"""Two runs compared: a published example, pairs counted one by one, and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from deepsc_jax.metrics import statistics
from deepsc_jax.metrics.comparison import (
    delong_area,
    delong_test,
    holm,
    paired_bootstrap,
    permutation_test,
)

# Hanley and McNeil, Radiology 1982, table I: ratings 1 to 5 of 58 normal and 51 abnormal images.
NORMAL, ABNORMAL = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)


def two_scores(seed: int = 0, n: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth and two scores that agree in part, with ties."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(size=n) < 0.4
    shared = rng.normal(size=n) + truth
    one, other = (np.round(shared + rng.normal(size=n), 1) for _ in range(2))
    return truth, one, other


def test_delong_of_a_published_example():
    """The area is theirs, 0.893; the error as Stata's manual prints it for these (roctab)."""
    truth = np.repeat([False, True], [sum(NORMAL), sum(ABNORMAL)])
    ratings = np.concatenate([np.repeat(np.arange(1, 6), row) for row in (NORMAL, ABNORMAL)])
    found = delong_area(truth, ratings)
    assert found.area == pytest.approx(0.8932, abs=5e-5)
    assert found.error == pytest.approx(0.0307, abs=5e-5)
    ends = found.interval()
    np.testing.assert_allclose([ends.low, ends.high], [0.83295, 0.95339], atol=5e-6)
    assert ends.method == "delong"


def test_delong_counts_every_pair():
    truth, one, other = two_scores()
    placed = []
    for scores in (one, other):
        pairs = scores[truth][:, None] - scores[~truth]
        wins = (pairs > 0) + 0.5 * (pairs == 0)
        placed.append((wins.mean(axis=1), wins.mean(axis=0)))
    of_positive, of_negative = (np.cov([side[i] for side in placed]) for i in (0, 1))
    covariance = of_positive / truth.sum() + of_negative / (~truth).sum()
    for scores, variance in zip((one, other), np.diag(covariance), strict=True):
        area = delong_area(truth, scores)
        assert area.area == pytest.approx(statistics.roc_area(truth, scores))
        assert area.error == pytest.approx(math.sqrt(variance))
    found = delong_test(truth, one, other)
    error = math.sqrt(np.array([1, -1]) @ covariance @ np.array([1, -1]))
    assert found.difference == pytest.approx(placed[0][0].mean() - placed[1][0].mean())
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.difference) / error))
    assert found.interval.high - found.difference == pytest.approx(1.959964 * error)


def test_delong_of_scores_alike_and_of_classes_that_part():
    truth, one, _ = two_scores()
    alike = delong_test(truth, one, 2 * one + 1)
    assert (alike.difference, alike.p) == (0, 1)
    parted = delong_area(truth, truth.astype(float)).interval()
    assert (parted.value, parted.low, parted.high) == (1, 1, 1)


def test_delong_refuses_what_has_no_error():
    with pytest.raises(ValueError, match="1 positive and 3 negative cases: expected two of each"):
        delong_area(np.array([True, False, False, False]), np.arange(4.0))
    with pytest.raises(ValueError, match=r"scores are of shape \(3,\): expected as many"):
        delong_area(np.array([True, False]), np.arange(3.0))
    with pytest.raises(ValueError, match="finite"):
        delong_area(np.array([True, False]), np.array([1, math.nan]))


def test_paired_bootstrap_sees_a_difference_and_none():
    rng = np.random.default_rng(0)
    one = rng.normal(size=60)
    better, patients = one + 0.1 + 0.1 * rng.normal(size=60), np.arange(60)

    def mean_of(x: np.ndarray):
        return lambda rows: float(x[rows].mean())

    found = paired_bootstrap(mean_of(better), mean_of(one), patients)
    assert found.difference == pytest.approx(np.mean(better - one))
    assert found.interval.low > 0
    assert found.p == pytest.approx(2 / 1001)  # no resample on the other side
    back = paired_bootstrap(mean_of(one), mean_of(better), patients)
    assert (back.difference, back.p) == (-found.difference, found.p)
    assert paired_bootstrap(mean_of(one), mean_of(one), patients, resamples=99).p == 1
    shuffled = paired_bootstrap(mean_of(one), mean_of(rng.permutation(one)), patients)
    assert shuffled.p > 0.9
    bca = paired_bootstrap(mean_of(better), mean_of(one), patients, method="bca")
    assert bca.interval.method == "bca"


def test_holm_by_hand():
    # 0.01·4, then 0.02·3, then 0.03·2, which is not below the one before; then 0.04.
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.6]), [1, 1])
    np.testing.assert_allclose(holm([0.02, math.nan, 0.01]), [0.02, math.nan, 0.02])
    assert holm([]).size == 0


def mean_of(values: np.ndarray):
    return lambda rows: float(values[rows].mean())


def test_permutation_counts_the_ways_to_deal_patients():
    """Against scipy's exact test: all 252 ways to deal ten patients into two fives."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=10) + np.repeat([0.9, 0.0], 5)
    patients = [np.array([i]) for i in range(10)]
    found = permutation_test(mean_of(values), patients[:5], patients[5:], resamples=4000)
    exact = stats.permutation_test(
        (values[:5], values[5:]), lambda a, b: a.mean() - b.mean(), n_resamples=1000
    )
    assert found.difference == pytest.approx(exact.statistic)
    # Four standard errors of a share of 4,000 draws.
    assert found.p == pytest.approx(exact.pvalue, abs=4 * np.sqrt(0.25 / 4000))
    assert found.interval.low < found.difference < found.interval.high


def test_permutation_keeps_the_scans_of_a_patient_together():
    """Two patients of many scans each: however far apart, two ways to deal say nothing."""
    values = np.repeat([0.0, 1.0], 50)
    groups = [[np.arange(50)], [np.arange(50, 100)]]
    assert permutation_test(mean_of(values), *groups, resamples=200).p == 1


def test_permutation_of_what_is_undefined_has_no_p():
    patients = [np.array([i]) for i in range(4)]
    found = permutation_test(lambda _: math.nan, patients[:2], patients[2:], resamples=10)
    assert math.isnan(found.p)
    with pytest.raises(ValueError, match="0 and 2 patients"):
        permutation_test(mean_of(np.zeros(4)), [], patients[2:])
