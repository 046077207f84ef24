"""Figures of indicators, by hand and by scikit-learn and scipy."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from deepsc_jax.metrics.regression import critical_r, fit, fits, pooled


def test_figures_are_scikit_learns_and_scipys():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=30)
    given = 0.5 * truth + 0.1 * rng.normal(size=30)
    found = fit(truth, given)
    assert found.mse == pytest.approx(metrics.mean_squared_error(truth, given))
    assert found.mae == pytest.approx(metrics.mean_absolute_error(truth, given))
    assert found.rmse == pytest.approx(metrics.root_mean_squared_error(truth, given))
    assert found.r2 == pytest.approx(metrics.r2_score(truth, given))
    assert found.r == pytest.approx(stats.pearsonr(truth, given)[0])
    assert found.n == 30


def test_a_constant_predictor_correlates_only_where_indicators_are_pooled():
    truth = np.array([[0.1, 0.8], [0.2, 0.9], [0.3, 0.7]])
    given = np.tile(truth.mean(axis=0), (3, 1))
    assert all(math.isnan(one.r) for one in fits(truth, given))
    assert [one.r2 for one in fits(truth, given)] == pytest.approx([0, 0], abs=1e-12)
    assert pooled(truth, given).r > 0.95


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite numbers"):
        fit(np.array([1.0, math.nan]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"shape \(2,\) and predictions of shape \(3,\)"):
        fit(np.zeros(2), np.zeros(3))


def test_the_critical_correlation():
    """The paper's 0.6524 is that of 22 cases, 20 degrees of freedom; 20 cases have 0.6788."""
    assert critical_r(22, 0.001) == pytest.approx(0.6524, abs=1e-4)
    assert critical_r(20, 0.001) == pytest.approx(0.6788, abs=1e-4)
    # By definition: a correlation of that size has the p.
    r = critical_r(20, 0.05)
    assert stats.t.sf(r * math.sqrt(18 / (1 - r * r)), 18) == pytest.approx(0.025)


def test_a_constant_has_no_correlation_whatever_its_mean_is_rounded_to():
    constant, varied = np.full(20, 7.003123), np.arange(20.0)
    assert constant.mean() != constant[0]
    assert math.isnan(fit(varied, constant).r)
    assert math.isnan(fit(constant, varied).r)
    assert math.isnan(fit(constant, varied).r2)
