"""Statistics of decisions: the tables of Liang et al. 2021, scikit-learn, scipy, and by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from deepsc_jax.metrics.statistics import (
    THRESHOLDS,
    Bootstrap,
    Confusion,
    bootstrap,
    confusion,
    curves,
    mcnemar,
    pr_area,
    roc_area,
)

COLUMNS = ("f1", "kappa", "specificity", "sensitivity", "precision")
# TP, FP, FN, TN, and the paper's figures in the order of COLUMNS.
TABLE_2 = {
    "CNNCF": ((59, 1, 3, 149), (0.9672, 0.9540, 0.9933, 0.9516, 0.9833)),
    "respiratory": ((62, 5, 0, 145), (0.9612, 0.9443, 0.9667, 1, 0.9254)),
    "emergency": ((62, 8, 0, 142), (0.9394, 0.9121, 0.9467, 1, 0.8857)),
    "intern": ((58, 17, 4, 133), (0.8467, 0.7745, 0.8867, 0.9355, 0.7733)),
    "radiologist, 5th year": ((62, 2, 0, 148), (0.9841, 0.9774, 0.9867, 1, 0.9688)),
    "radiologist, 3rd year": ((58, 15, 4, 135), (0.8593, 0.7942, 0.9, 0.9355, 0.7945)),
}
TABLE_3 = {
    "B, CNNCF": ((20, 0, 0, 20), (1, 1, 1, 1, 1)),
    # The paper prints a kappa of 0.95 for one of two readers with these very figures.
    "B, intern": ((19, 1, 1, 19), (0.95, 0.9, 0.95, 0.95, 0.95)),
    # A transposed matrix: of 15 positive cases it makes 14.
    "C, emergency": ((13, 2, 1, 19), (0.8966, 0.8236, 0.9048, 0.9286, 0.8667)),
    "C, intern": ((12, 3, 3, 17), (0.8, 0.65, 0.85, 0.8, 0.8)),
    "C, radiologist, 5th year": ((15, 1, 0, 19), (0.9677, 0.9421, 0.95, 1, 0.9375)),
    "C, radiologist, 3rd year": ((13, 2, 2, 18), (0.8667, 0.7667, 0.9, 0.8667, 0.8667)),
}
# Table 2's intervals of CNNCF.
INTERVALS = {
    "f1": (0.9307, 0.9890),
    "kappa": (0.9030, 0.9924),
    "specificity": (0.9792, 1),
    "sensitivity": (0.8889, 1),
    "precision": (0.9444, 1),
}


def decisions(cells: Confusion) -> tuple[np.ndarray, np.ndarray]:
    """Truth and decisions with these cells: TP, FN, FP, TN in this order."""
    truth = [True] * (cells.tp + cells.fn) + [False] * (cells.fp + cells.tn)
    given = [True] * cells.tp + [False] * cells.fn + [True] * cells.fp + [False] * cells.tn
    return np.array(truth), np.array(given)


@pytest.mark.parametrize("row", [*TABLE_2.values(), *TABLE_3.values()], ids=[*TABLE_2, *TABLE_3])
def test_a_confusion_matrix_gives_the_papers_figures(row: tuple[tuple, tuple]):
    cells = Confusion(*row[0])
    found = [getattr(cells, name) for name in COLUMNS]
    np.testing.assert_allclose(found, row[1], atol=1e-4)  # it prints four digits
    assert confusion(*decisions(cells)) == cells


def test_figures_are_scikit_learns():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        truth, given = rng.uniform(size=(2, 80)) < share
        cells = confusion(truth, given)
        for name, theirs in (
            ("accuracy", metrics.accuracy_score(truth, given)),
            ("sensitivity", metrics.recall_score(truth, given)),
            ("specificity", metrics.recall_score(~truth, ~given)),
            ("precision", metrics.precision_score(truth, given)),
            ("f1", metrics.f1_score(truth, given)),
            ("kappa", metrics.cohen_kappa_score(truth, given)),
        ):
            assert getattr(cells, name) == pytest.approx(theirs, abs=1e-12), name


def test_what_is_undefined_is_nan():
    nothing_called = Confusion(0, 0, 3, 4)
    assert math.isnan(nothing_called.precision)
    assert nothing_called.f1 == 0
    assert math.isnan(Confusion(0, 0, 0, 7).sensitivity)
    assert math.isnan(Confusion(0, 0, 0, 7).kappa)
    one_class = np.array([True, True])
    assert math.isnan(roc_area(one_class, np.array([0.1, 0.2])))
    assert math.isnan(pr_area(~one_class, np.array([0.1, 0.2])))


def test_decisions_of_other_cases_are_refused():
    with pytest.raises(ValueError, match=r"truth is bool \(2,\) and decisions are bool \(3,\)"):
        confusion(np.ones(2, bool), np.ones(3, bool))
    with pytest.raises(ValueError, match="decisions are float64"):
        confusion(np.ones(2, bool), np.ones(2))  # pyright: ignore


def test_curves_at_201_thresholds():
    truth = np.array([True, True, False, False])
    scores = np.array([0.9, 0.4, 0.4, 0.1])
    found = curves(truth, scores)
    assert len(THRESHOLDS) == 201
    at = {t: i for i, t in enumerate(THRESHOLDS.tolist())}
    # A score that equals the threshold is positive.
    for threshold, rate, sensitivity, precision in (
        (0.0, 1, 1, 0.5),
        (0.1, 1, 1, 0.5),
        (0.105, 0.5, 1, 2 / 3),
        (0.4, 0.5, 1, 2 / 3),
        (0.405, 0, 0.5, 1),
        (0.9, 0, 0.5, 1),
        (1.0, 0, 0, math.nan),
    ):
        i = at[threshold]
        np.testing.assert_allclose(
            [found.false_positive_rate[i], found.sensitivity[i], found.precision[i]],
            [rate, sensitivity, precision],
        )
    # Of the pairs of a positive and a negative case three are in order and one is a tie.
    assert roc_area(truth, scores) == 3.5 / 4
    # Precision 1 up to half of the positive cases, 2/3 up to all.
    assert pr_area(truth, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_bootstrap_intervals_are_the_papers():
    truth, given = decisions(Confusion(59, 1, 3, 149))
    for name, expected in INTERVALS.items():
        found = bootstrap(
            lambda rows, name=name: getattr(confusion(truth[rows], given[rows]), name),
            np.arange(len(truth)),
        )
        assert found.undefined == 0
        # 1,000 resamples, theirs and ours: each end is good to about 0.01.
        np.testing.assert_allclose(found.interval(), expected, atol=0.01)


def test_a_patients_cases_are_drawn_together():
    patients = np.array(["b", "a", "b", "c"])
    seen: list[list[int]] = []

    def figure(rows: np.ndarray) -> float:
        seen.append(sorted(rows.tolist()))
        return float(len(rows))

    found = bootstrap(figure, patients, resamples=200, seed=3)
    for rows in seen:
        assert rows.count(0) == rows.count(2)
        assert rows.count(0) + rows.count(1) + rows.count(3) == 3
    assert {3.0, 6.0} < set(found.values)
    again = bootstrap(figure, patients, resamples=200, seed=3)
    np.testing.assert_array_equal(found.values, again.values)


def test_the_interval_of_a_mean_is_that_of_its_distribution():
    x = np.random.default_rng(0).normal(size=400)
    found = bootstrap(lambda rows: float(x[rows].mean()), np.arange(400))
    error = x.std() / 20
    expected = x.mean() - 1.96 * error, x.mean() + 1.96 * error
    np.testing.assert_allclose(found.interval(), expected, atol=0.01)


def test_undefined_resamples_are_counted_and_in_no_interval():
    found = Bootstrap(np.array([math.nan, 1, 2, 3]))
    assert found.undefined == 1
    assert found.interval(0.5) == (1.5, 2.5)
    assert all(math.isnan(end) for end in Bootstrap(np.array([math.nan])).interval())


def test_a_paired_difference_is_surer_than_two_intervals():
    rng = np.random.default_rng(0)
    truth = np.arange(200) % 2 == 0
    scores = truth + rng.normal(size=200)
    better = scores + 0.2 * truth
    patients = np.arange(200)

    def area(rows: np.ndarray, which: np.ndarray) -> float:
        return roc_area(truth[rows], which[rows])

    low, high = bootstrap(
        lambda rows: area(rows, better) - area(rows, scores), patients, resamples=200
    ).interval()
    assert low > 0
    alone = bootstrap(lambda rows: area(rows, scores), patients, resamples=200).interval()
    assert high - low < 0.3 * (alone[1] - alone[0])


def test_mcnemar_of_cnncf_and_the_intern_whatever_their_overlap():
    """CNNCF errs in 4 cases and the intern in 21 of 212: between 0 and 4 of them are the same."""
    truth = np.ones(212, bool)
    values = []
    for shared in range(5):
        one, other = np.ones((2, 212), bool)
        one[:4] = False
        other[4 - shared : 25 - shared] = False
        only_other, only_one = 21 - shared, 4 - shared
        p = mcnemar(truth, one, other)
        assert p == stats.binomtest(only_one, only_one + only_other).pvalue
        values.append(p)
    assert min(values) == pytest.approx(1.5e-5, rel=0.05)
    assert max(values) == pytest.approx(9.1e-4, rel=0.01)


def test_mcnemar_counts_what_one_alone_has_right():
    truth = np.array([True, True, False, False, True])
    one = np.array([True, True, False, True, False])
    other = np.array([True, False, True, False, False])
    # Alone right: the first in cases 1 and 2, the second in case 3.
    assert mcnemar(truth, one, other) == pytest.approx(1.0)
    assert mcnemar(truth, one, one) == 1
    assert mcnemar(truth, truth, ~truth) == pytest.approx(2 / 2**5)
