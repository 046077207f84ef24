"""Baselines: the band's parts by hand, and the four figures on phantoms."""

import numpy as np
import pytest

from deepsc_jax.evaluation.baselines import (
    Band,
    BaselineCase,
    classification_baseline,
    fit_band,
    lesion_features,
    predict_band,
    run_baselines,
    table,
)
from deepsc_jax.phantoms.lesions import make_phantom

SPACING_MM = (5.0, 4.0, 4.0)


def slab_case(lesion_hu: float, seed: int = 0) -> BaselineCase:
    """A block of lung at -850 HU with a cube of lesion and the noise of 10 HU."""
    rng = np.random.default_rng(seed)
    lung = np.zeros((16, 24, 24), bool)
    lung[2:14, 2:22, 2:22] = True
    lesion = np.zeros_like(lung)
    lesion[5:10, 6:14, 6:14] = True
    values = np.where(lung, -850.0, 50.0)
    values[lesion] = lesion_hu
    return BaselineCase(values + rng.normal(0, 10, lung.shape), lesion, lung, SPACING_MM, 0)


def phantom_case(seed: int, index: int) -> BaselineCase:
    p = make_phantom(seed, index)
    return BaselineCase(p.hu, p.lesion_mask, p.lung_mask, p.spacing_mm, p.label, p.nuisances)


def test_band_finds_lesions_that_a_threshold_can_find():
    band = fit_band([slab_case(-600, 0), slab_case(-600, 1)])
    case = slab_case(-600, 2)
    assert np.array_equal(predict_band(band, case), case.lesion)


def test_band_stays_inside_the_lung_and_drops_small_components():
    case = slab_case(-600)
    case.values[12, 20, 20] = -600.0  # one voxel of 0.08 ml
    mask = predict_band(Band(-700, 200, 0.0, 0.1), case)
    assert not mask[12, 20, 20]
    assert not np.any(mask & ~case.lung)
    assert predict_band(Band(-700, 200, 0.0, 0.0), case)[12, 20, 20]


def test_smoothing_does_not_let_the_chest_wall_in():
    case = slab_case(-850)
    mask = predict_band(Band(-800, 200, 9.0, 0.0), case)
    assert not mask.any()


def test_fit_band_needs_a_lesion():
    case = slab_case(-600)
    empty = BaselineCase(case.values, np.zeros_like(case.lesion), case.lung, SPACING_MM, 2)
    with pytest.raises(ValueError, match="no case has a lesion"):
        fit_band([empty])


def test_lesion_features_by_hand():
    case = slab_case(-600)
    values = np.where(case.lesion, -600.0, case.values)
    volume, count, plr, mean_hu = lesion_features(case.lesion, values, case.lung, SPACING_MM)
    assert volume == pytest.approx(5 * 8 * 8 * 0.08)
    assert count == 1
    assert mean_hu == pytest.approx(-600)
    # The lung spans voxels 2..21: up to 10 mm are two voxels, so 6..13 lie deeper.
    assert plr == 0
    assert np.array_equal(
        lesion_features(np.zeros_like(case.lung), values, case.lung, SPACING_MM), np.zeros(4)
    )


def test_logistic_regression_separates_what_is_separable():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 2)) + 8 * np.stack([y == 1, y == 2], axis=1)
    assert classification_baseline(x[:30], y[:30], x[30:], y[30:]) == 1.0


def test_chance_is_of_as_many_classes_as_there_are():
    names = ("low_hu", "high_hu", "sigma_mm", "min_ml")
    figures: dict[str, float | None] = {f"band_{name}": 1.0 for name in names}
    figures |= {"band_dsc": None, "band_accuracy": None, "true_mask_accuracy": None}
    figures |= {"nuisance_accuracy": 0.6, "chance_accuracy": 0.5}
    assert table(figures).endswith("0.600  on the nuisances alone (0.500 is chance)")


@pytest.mark.slow
def test_phantoms_defeat_the_band_but_not_the_true_masks():
    # 24 of each: about half the demo's, so the bars have room for the scatter.
    figures = run_baselines(
        [phantom_case(101, i) for i in range(24)], [phantom_case(102, i) for i in range(24)]
    )
    bounds = {
        "band_dsc": (0, 0.50),
        "band_accuracy": (0, 0.85),
        "true_mask_accuracy": (0.90, 1),
        "nuisance_accuracy": (0, 0.65),
    }
    for name, (low, high) in bounds.items():
        found = figures[name]
        assert found is not None
        assert low <= found <= high
