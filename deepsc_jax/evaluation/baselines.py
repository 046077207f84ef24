"""What no network is needed for: the best HU band, and logistic regression on a few numbers.

A model has learnt something only if it beats these. Everything is tuned on validation cases and
read once on test cases. Needs neither jax nor a file.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepsc_jax.metrics.findings import label_components, peripheral_ratio, voxel_ml

SIGMAS_MM = (0.0, 3.0, 6.0, 9.0)
MIN_MLS = (0.1, 1.0, 5.0, 20.0)
BIN_HU = 20.0
REGULARISATION = tuple(10.0**k for k in range(-2, 4))


@dataclass(frozen=True)
class BaselineCase:
    """One scan as the baselines see it; arrays are (D, H, W).

    Attributes:
        values: HU.
        lesion: bool, the truth.
        lung: bool.
        spacing_mm: voxel size (D, H, W) in mm.
        label: class id.
        nuisances: numbers that should tell nothing of the class; the same names in every case.
    """

    values: np.ndarray
    lesion: np.ndarray
    lung: np.ndarray
    spacing_mm: tuple[float, float, float]
    label: int
    nuisances: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Band:
    """Lesion = lung voxels whose smoothed value lies in [low, high), in components of `min_ml`."""

    low: float
    high: float
    sigma_mm: float
    min_ml: float


def fit_band(cases: Sequence[BaselineCase]) -> Band:
    """The band, smoothing and smallest component with the best mean DSC over `cases` with lesions.

    All pairs of band ends on a 20-HU raster are tried for each smoothing without a smallest
    component, then the smallest component for the best band of each smoothing.

    Raises:
        ValueError: no case has a lesion.
    """
    cases = [_crop(case) for case in cases if case.lesion.any()]
    if not cases:
        raise ValueError("fit_band: no case has a lesion: give validation cases with lesions")
    best, best_dice = Band(0.0, 0.0, 0.0, 0.0), -1.0
    for sigma_mm in SIGMAS_MM:
        smoothed = [_smooth(case, sigma_mm) for case in cases]
        inside = np.concatenate([s[c.lung] for s, c in zip(smoothed, cases, strict=True)])
        edges = np.arange(
            np.floor(inside.min() / BIN_HU) * BIN_HU, inside.max() + BIN_HU + 1, BIN_HU
        )
        table = np.mean(
            [_dice_table(s, c, edges) for s, c in zip(smoothed, cases, strict=True)], axis=0
        )
        low, high = np.unravel_index(np.argmax(table), table.shape)
        for min_ml in MIN_MLS:
            band = Band(float(edges[low]), float(edges[high]), sigma_mm, min_ml)
            dice = np.mean(
                [
                    _dice(_band_mask(band, s, c), c.lesion)
                    for s, c in zip(smoothed, cases, strict=True)
                ]
            )
            if dice > best_dice:
                best, best_dice = band, float(dice)
    return best


def predict_band(band: Band, case: BaselineCase) -> np.ndarray:
    """The lesion mask that a band yields on one case, bool (D, H, W)."""
    return _band_mask(band, _smooth(case, band.sigma_mm), case)


def lesion_features(mask: np.ndarray, values: np.ndarray, lung: np.ndarray, spacing_mm):
    """Volume in ml, number of components of at least 0.1 ml, PLR, mean HU; zeros if empty."""
    if not mask.any():
        return np.zeros(4)
    count = label_components(mask, spacing_mm).max()
    volume = np.count_nonzero(mask) * voxel_ml(spacing_mm)
    plr = peripheral_ratio(mask, lung, spacing_mm)
    return np.array([volume, count, plr, values[mask].mean(dtype=float)])


def classification_baseline(train_x, train_y, test_x, test_y) -> float:
    """Test accuracy of `logistic_regression`."""
    fitted = logistic_regression(train_x, train_y)
    return float(np.mean(fitted.predict(test_x) == np.asarray(test_y)))


def logistic_regression(train_x, train_y) -> GridSearchCV:
    """A standardised logistic regression, fitted; its C by 5-fold validation on train.

    The features are (n, features), the class ids (n,).
    """
    folds = int(min(5, np.bincount(train_y)[np.unique(train_y)].min()))
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    search = GridSearchCV(
        pipeline,
        {"logisticregression__C": REGULARISATION},
        cv=StratifiedKFold(max(folds, 2), shuffle=True, random_state=0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return search.fit(train_x, train_y)


def run_baselines(
    validation: Sequence[BaselineCase], test: Sequence[BaselineCase]
) -> dict[str, float | None]:
    """The four figures a model is printed beside.

    The band is tuned, and every logistic regression fitted, on the validation cases alone (C by
    cross-validation inside them); `test` is only scored.

    Returns:
        `band_dsc`: mean DSC of the band over test cases with lesions (None if no case has one);
        `band_accuracy`: logistic regression on `lesion_features` of the band's masks;
        `true_mask_accuracy`: the same on the true masks;
        `nuisance_accuracy`: on the nuisances alone (None without nuisances);
        `chance_accuracy`: one over the number of classes;
        `band_low_hu`, `band_high_hu`, `band_sigma_mm`, `band_min_ml`: the band chosen.
    """
    band = fit_band(validation)
    train_y = np.array([case.label for case in validation])
    test_y = np.array([case.label for case in test])

    def accuracy(features):
        train_x = np.array([features(case) for case in validation])
        test_x = np.array([features(case) for case in test])
        return classification_baseline(train_x, train_y, test_x, test_y)

    def of_mask(mask, case):
        return lesion_features(mask, case.values, case.lung, case.spacing_mm)

    dice = [_dice(predict_band(band, case), case.lesion) for case in test if case.lesion.any()]
    names = sorted(validation[0].nuisances)
    return {
        "band_dsc": float(np.mean(dice)) if dice else None,
        "band_accuracy": accuracy(lambda case: of_mask(predict_band(band, case), case)),
        "true_mask_accuracy": accuracy(lambda case: of_mask(case.lesion, case)),
        "nuisance_accuracy": accuracy(lambda case: [case.nuisances[name] for name in names])
        if names
        else None,
        "chance_accuracy": 1 / len(np.unique(train_y)),
        "band_low_hu": band.low,
        "band_high_hu": band.high,
        "band_sigma_mm": band.sigma_mm,
        "band_min_ml": band.min_ml,
    }


def _crop(case: BaselineCase) -> BaselineCase:
    """The case cut to the box around its lungs; the rest plays no part."""
    if not case.lung.any():
        return case
    box = tuple(slice(a.min(), a.max() + 1) for a in np.nonzero(case.lung))
    return BaselineCase(
        case.values[box], case.lesion[box], case.lung[box], case.spacing_mm, case.label
    )


def _smooth(case: BaselineCase, sigma_mm: float) -> np.ndarray:
    """Gaussian mean over the lung's voxels only, so that the chest wall does not leak in."""
    values = case.values.astype(np.float32)
    if sigma_mm == 0:
        return values
    sigma = [sigma_mm / spacing for spacing in case.spacing_mm]
    total = gaussian_filter(np.where(case.lung, values, 0), sigma, truncate=3)
    weight = gaussian_filter(case.lung.astype(np.float32), sigma, truncate=3)
    return total / np.maximum(weight, 1e-3)


def _band_mask(band: Band, smoothed, case: BaselineCase) -> np.ndarray:
    mask = case.lung & (smoothed >= band.low) & (smoothed < band.high)
    return label_components(mask, case.spacing_mm, band.min_ml) > 0


def _dice_table(smoothed, case: BaselineCase, edges) -> np.ndarray:
    """DSC of every band [edges[i], edges[j]), (edges, edges); 0 where j <= i."""
    all_voxels, _ = np.histogram(smoothed[case.lung], edges)
    lesion_voxels, _ = np.histogram(smoothed[case.lesion & case.lung], edges)
    all_below = np.concatenate([[0], np.cumsum(all_voxels)])
    lesion_below = np.concatenate([[0], np.cumsum(lesion_voxels)])
    hits = np.maximum(lesion_below[None] - lesion_below[:, None], 0)
    marked = np.maximum(all_below[None] - all_below[:, None], 0)
    return 2 * hits / (marked + np.count_nonzero(case.lesion))


def _dice(prediction, truth) -> float:
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(prediction & truth) / total if total else 1.0


def table(figures: dict[str, float | None]) -> str:
    """`run_baselines` as lines to print below the network's table."""
    band = "best HU band [{:.0f}, {:.0f}), sigma {:.1f} mm, at least {:.2f} ml".format(
        *(figures[f"band_{k}"] for k in ("low_hu", "high_hu", "sigma_mm", "min_ml"))
    )
    rows = [
        ("band_dsc", f"DSC       {{:.3f}}  {band}"),
        ("band_accuracy", "accuracy  {:.3f}  logistic regression on that band's findings"),
        ("true_mask_accuracy", "accuracy  {:.3f}  the same on the true lesion masks"),
        ("nuisance_accuracy", "accuracy  {:.3f}  on the nuisances alone ({chance:.3f} is chance)"),
    ]
    chance = figures["chance_accuracy"]
    lines = [
        text.format(figures[name], chance=chance)
        for name, text in rows
        if figures[name] is not None
    ]
    return "\n  ".join(["Without a network (tuned on validation)", *lines])
