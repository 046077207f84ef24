"""Centres of the salient regions of a heat map, and how far they are from annotated ones.

Liang et al. 2021 find them by DBSCAN. They give none of its parameters, nor how centres are paired.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import DBSCAN

from deepsc_jax.metrics.regression import Fit, fit, pooled

Points = Float[np.ndarray, "centre axis"]
SALIENT = 0.5  # of the maximum. assumed, as all below
REACH = 1.5  # in cells of the map: eight neighbours
GRID = 64  # cells a side, on which an image's regions are found
LEAST = 4  # cells that make a region


def on_grid(heat: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "row column"]:
    """The heat of an image on a grid of `GRID` cells a side: means of what each cell covers."""
    cells = Image.fromarray(heat.astype(np.float32))
    return np.asarray(cells.resize((GRID, GRID), Image.Resampling.BILINEAR))


def salient_centres(heat: Float[np.ndarray, "*space"]) -> Points:
    """The heat's centre of mass in each salient region, the hottest region first.

    As shares of the sides, so that cell i of n has its centre at (i + 1/2) / n.
    """
    peak = float(heat.max(initial=0))
    cells = np.argwhere(heat >= SALIENT * peak) if peak > 0 else np.empty((0, heat.ndim), int)
    if not len(cells):
        return np.empty((0, heat.ndim))
    region = DBSCAN(eps=REACH, min_samples=LEAST).fit_predict(cells)
    weights = heat[tuple(cells.T)].astype(float)
    found = []
    for number in range(region.max() + 1):
        chosen = region == number
        centre = np.average(cells[chosen] + 0.5, axis=0, weights=weights[chosen])
        found.append((weights[chosen].sum(), centre / heat.shape))
    return np.array([centre for _, centre in sorted(found, key=lambda row: -row[0])]).reshape(
        -1, heat.ndim
    )


@dataclasses.dataclass(frozen=True)
class Matched:
    """Pairs of centres by least total distance, and those that have no partner.

    Attributes:
      truth, given: the pairs' centres, row by row.
      missed: annotated centres without a salient one.
      extra: salient centres without an annotated one.
    """

    truth: Points
    given: Points
    missed: int
    extra: int


def match(truth: Points, given: Points) -> Matched:
    """Pair the centres of one image; either may have none."""
    rows, columns = linear_sum_assignment(cdist(truth, given))
    pairs = len(rows)
    return Matched(truth[rows], given[columns], len(truth) - pairs, len(given) - pairs)


def figures(matched: list[Matched]) -> dict[str, Fit]:
    """The figures of each axis by itself, `axis 0` and so on, and `pooled`.

    Pooled coordinates correlate by the axes' different means alone.

    Raises:
      ValueError: there is no pair.
    """
    truth, given = (
        np.concatenate([getattr(one, name) for one in matched]) for name in ("truth", "given")
    )
    alone = {f"axis {i}": fit(truth[:, i], given[:, i]) for i in range(truth.shape[1])}
    return {**alone, "pooled": pooled(truth, given)}
