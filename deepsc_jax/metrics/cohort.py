"""Section III.B of the paper: the lesions of a class of scans, and of two classes compared."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.signal import find_peaks

from deepsc_jax.metrics.comparison import holm, permutation_test
from deepsc_jax.metrics.findings import HU_EDGES, PERIPHERY_MM, THICKNESSES_MM, ScanFindings
from deepsc_jax.metrics.intervals import interval
from deepsc_jax.metrics.scan_figures import defined
from deepsc_jax.metrics.statistics import RESAMPLES, Rows, rows_of_patients
from deepsc_jax.runtime.types import JsonObject

GLASS_HU = (-960.0, -600.0)  # where most of COVID-19's is
CAP_HU = ((-970.0, -580.0), (-70.0, 140.0))  # where most of CAP's is; the second is consolidation
PERCENTILES = (5.0, 95.0)  # assumed: of "over 90 %" of lesions, between which a span is
PROMINENCE = 0.1  # assumed: of the highest bin, by which a peak stands out
# Percent; of the groups the paper names the one from 4 to 6 alone.
LVR_GROUPS = ((0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12), (12, 100))
PAPERS_GROUP = (4, 6)


@dataclasses.dataclass(frozen=True)
class Cohort:
    """The findings of the scans of a class that have lesions, and whose scans they are."""

    patients: Shaped[np.ndarray, "scan"]
    counts: Int[np.ndarray, "scan"]
    lvr: Float[np.ndarray, "scan"]
    spread_mm: Float[np.ndarray, "scan"]
    plr: Float[np.ndarray, "scan thickness"]
    hu_ml: Float[np.ndarray, "scan bin"] | None
    sizes_mm: tuple[Float[np.ndarray, "lesion 3"], ...]

    @property
    def scans(self) -> int:
        """How many there are."""
        return len(self.counts)

    @property
    def every(self) -> Rows:
        """The rows of all scans."""
        return np.arange(self.scans)


def cohort(scans: Sequence[ScanFindings], patients: Sequence[str]) -> Cohort:
    """Scans as one; those without a lesion are left out.

    Raises:
      ValueError: no scan has a lesion.
    """
    pairs = [pair for pair in zip(scans, patients, strict=True) if pair[0].count]
    if not pairs:
        raise ValueError(f"none of {len(scans)} scans has a lesion: expected at least one")
    found = [scan for scan, _ in pairs]
    hu_ml = [scan.hu_ml for scan in found if scan.hu_ml is not None]
    return Cohort(
        patients=np.array([patient for _, patient in pairs]),
        counts=np.array([scan.count for scan in found]),
        lvr=np.array([scan.lvr for scan in found]),
        spread_mm=np.array([scan.spread_mm for scan in found]),
        plr=np.array([scan.plr for scan in found]),
        hu_ml=np.array(hu_ml) if len(hu_ml) == len(found) else None,
        sizes_mm=tuple(scan.sizes_mm for scan in found),
    )


def joined(cohorts: Sequence[Cohort]) -> Cohort:
    """The scans of several classes as one cohort, in their order."""
    hu_ml = [one.hu_ml for one in cohorts if one.hu_ml is not None]
    fields = ("patients", "counts", "lvr", "spread_mm", "plr")
    return Cohort(
        **{name: np.concatenate([getattr(one, name) for one in cohorts]) for name in fields},
        hu_ml=np.concatenate(hu_ml) if len(hu_ml) == len(cohorts) else None,
        sizes_mm=tuple(itertools.chain.from_iterable(one.sizes_mm for one in cohorts)),
    )


def hu_share(scans: Cohort, rows: Rows, *bands: tuple[float, float]) -> float:
    """The share of these scans' lesion volume in bands of HU; a bin cut by an end in proportion."""
    if scans.hu_ml is None:
        return math.nan
    pooled = scans.hu_ml[rows].sum(axis=0)
    cumulative = np.concatenate([[0], np.cumsum(pooled)]) / pooled.sum()
    ends = np.interp(np.asarray(bands), HU_EDGES, cumulative)
    return float((ends[:, 1] - ends[:, 0]).sum())


def hu_peaks(scans: Cohort) -> list[float]:
    """The middles of the bins in HU at which the distribution of the lesions' values peaks."""
    if scans.hu_ml is None:
        return []
    padded = np.concatenate([[0], scans.hu_ml.sum(axis=0), [0]])
    places, _ = find_peaks(padded, prominence=PROMINENCE * padded.max())
    width = HU_EDGES[1] - HU_EDGES[0]
    return [float(HU_EDGES[place - 1] + width / 2) for place in places]


def spread_between(scans: Cohort, rows: Rows, low: float, high: float) -> float:
    """The mean spread of those scans whose LVR is at least `low` and below `high` percent."""
    lvr = scans.lvr[rows] * 100
    group = scans.spread_mm[rows][(lvr >= low) & (lvr < high)]
    return float(group.mean()) if len(group) else math.nan


def _span(axis: int) -> Callable[[Cohort, Rows], float]:
    def span(scans: Cohort, rows: Rows) -> float:
        sizes = np.concatenate([scans.sizes_mm[i] for i in rows])[:, axis]
        low, high = np.percentile(sizes, PERCENTILES)
        return float(high - low)

    return span


def _plr(scans: Cohort, rows: Rows) -> float:
    return float(scans.plr[rows, THICKNESSES_MM.index(int(PERIPHERY_MM))].mean())


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a class's scans.

    Attributes:
      finding: of the paper's four, the one that it belongs to.
      title: what it is, with its unit.
      of: the figure of some of the scans, given by their rows.
      paper: what the paper says of a class, by its name.
      sign: of COVID-19's less CAP's in the paper; 0 where it does not say.
      digits: after the point.
    """

    finding: int
    title: str
    of: Callable[[Cohort, Rows], float]
    paper: Mapping[str, str]
    sign: int
    digits: int


def _said(covid: str, cap: str) -> dict[str, str]:
    return {"covid-19": covid, "cap": cap}


def _mean(name: str) -> Callable[[Cohort, Rows], float]:
    return lambda scans, rows: float(getattr(scans, name)[rows].mean())


FIGURES: dict[str, Figure] = {
    "count": Figure(1, "lesions a scan", _mean("counts"), _said("4.4", "1.7"), 1, 2),
    "one_lesion": Figure(
        1,
        "share of scans with one lesion",
        lambda scans, rows: float(np.mean(scans.counts[rows] == 1)),
        _said("", "0.548"),
        -1,
        3,
    ),
    "four_lesions": Figure(
        1,
        "share of scans with 4 lesions or more",
        lambda scans, rows: float(np.mean(scans.counts[rows] >= 4)),
        _said("0.552", ""),
        1,
        3,
    ),
    "lvr": Figure(2, "lesion volume ratio (LVR)", _mean("lvr"), _said("0.143", "0.044"), 1, 3),
    "lvr_12": Figure(
        2,
        "share of scans with an LVR above 0.12",
        lambda scans, rows: float(np.mean(scans.lvr[rows] > 0.12)),
        _said("above 0.5", "0.05"),
        1,
        3,
    ),
    "width_span": Figure(2, "span of widths, mm", _span(2), _said("125", "70"), 1, 0),
    "length_span": Figure(2, "span of lengths, mm", _span(1), _said("155", "63"), 1, 0),
    "height_span": Figure(2, "span of heights, mm", _span(0), _said("210", "75"), 1, 0),
    "glass": Figure(
        3,
        "share of lesions from −960 to −600 HU",
        lambda scans, rows: hu_share(scans, rows, GLASS_HU),
        _said("above 0.7", ""),
        0,
        3,
    ),
    "cap_bands": Figure(
        3,
        "share from −970 to −580 or from −70 to 140 HU",
        lambda scans, rows: hu_share(scans, rows, *CAP_HU),
        _said("", "above 0.75"),
        0,
        3,
    ),
    "dense": Figure(
        3,
        "share from −70 to 140 HU (consolidation)",
        lambda scans, rows: hu_share(scans, rows, CAP_HU[1]),
        _said("", ""),
        -1,
        3,
    ),
    "spread": Figure(4, "spread of lesions, mm", _mean("spread_mm"), _said("", ""), 1, 1),
    "spread_4_6": Figure(
        4,
        "spread of lesions, LVR from 0.04 to 0.06, mm",
        lambda scans, rows: spread_between(scans, rows, *PAPERS_GROUP),
        _said("86.0", "15.6"),
        1,
        1,
    ),
    "plr": Figure(
        4,
        f"peripheral lesion ratio (PLR), {PERIPHERY_MM:g} mm",
        _plr,
        _said("0.624", "0.245"),
        1,
        3,
    ),
}
PEAKS = _said("1", "2")  # of the distribution of HU, in the paper


def summary(scans: Cohort, *, resamples: int = RESAMPLES, seed: int = 0) -> JsonObject:
    """Every figure of a class with its interval, over resamples of patients, and its curves."""

    def of(figure: Callable[[Cohort, Rows], float]) -> JsonObject:
        found = interval(
            lambda rows: figure(scans, rows), scans.patients, resamples=resamples, seed=seed
        )
        ends = defined(found.low), defined(found.high)
        if found.undefined and found.low == found.high:  # of one scan, drawn or not
            ends = None, None
        return {"value": defined(found.value), "low": ends[0], "high": ends[1]}

    groups = {
        f"{low}-{high}": of(lambda c, rows, ends=(low, high): spread_between(c, rows, *ends))
        | {"n": int(np.sum((scans.lvr * 100 >= low) & (scans.lvr * 100 < high)))}
        for low, high in LVR_GROUPS
    }
    curve = [
        of(lambda c, rows, column=i: float(c.plr[rows, column].mean()))
        for i in range(len(THICKNESSES_MM))
    ]
    return {
        "scans": scans.scans,
        "patients": len(np.unique(scans.patients)),
        "lesions": int(scans.counts.sum()),
        "figures": {key: of(figure.of) for key, figure in FIGURES.items()},
        "hu_peaks": hu_peaks(scans),
        "spread_by_lvr_percent": groups,
        "plr_by_thickness_mm": curve,
    }


def comparisons(
    classes: Mapping[str, Cohort], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[JsonObject]:
    """Every figure of every two classes compared; the p are Holm's over all of them.

    `as_in_paper` says whether the difference has the paper's sign; None where it names none, or
    the classes are not its two.
    """
    rows: list[JsonObject] = []
    for (one, first), (other, second) in itertools.combinations(classes.items(), 2):
        both = joined([first, second])
        groups = [rows_of_patients(first.patients), rows_of_patients(second.patients)]
        groups[1] = [each + first.scans for each in groups[1]]
        for key, figure in FIGURES.items():
            found = permutation_test(
                lambda chosen, of=figure.of, scans=both: of(scans, chosen),
                *groups,
                resamples=resamples,
                seed=seed,
            )
            sign = figure.sign * _direction(one, other)
            known = sign and not math.isnan(found.difference)
            rows.append(
                {
                    "first": one,
                    "second": other,
                    "figure": key,
                    "difference": defined(found.difference),
                    "low": defined(found.interval.low),
                    "high": defined(found.interval.high),
                    "p": defined(found.p),
                    "as_in_paper": found.difference * sign > 0 if known else None,
                }
            )
    p = holm([math.nan if row["p"] is None else row["p"] for row in rows])
    return [row | {"p_holm": defined(float(each))} for row, each in zip(rows, p, strict=True)]


def _direction(one: str, other: str) -> int:
    """1 where the classes are the paper's in its order, -1 in the other, else 0."""
    pairs = {("covid-19", "cap"): 1, ("cap", "covid-19"): -1}
    return pairs.get((one.lower(), other.lower()), 0)
