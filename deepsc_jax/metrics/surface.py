"""Distances between the surfaces of a predicted and a true lesion mask, in mm.

Two definitions of a surface are in use here, because two measures ask for them:

- normalised surface Dice is DeepMind's (`surface-distance`; Nikolov et al., "Clinically applicable
  segmentation of head and neck anatomy for radiotherapy", J. Med. Internet Res. 2021): the surface
  is made of the surfels that marching cubes lays between the eight voxels round a voxel corner, and
  each surfel weighs by its area in mm²;
- root mean square distance is over border voxels, unweighted.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import edt
import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from deepsc_jax.metrics.overlap import check_masks

# `edt` works in float32: without this a surfel just at the tolerance would count or not by chance.
DISTANCE_SLACK_MM = 1e-4

Corner = tuple[int, int, int]
# Bit i of a neighbour code is the voxel at CORNERS[i].
CORNERS: list[Corner] = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]


def normalized_surface_dice(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
    tolerance_mm: float = 3.0,
) -> float:
    """Normalised surface Dice (NSD): the share of both surfaces within the tolerance of the other.

    The area of the surfels of either mask that lie no further than `tolerance_mm` from the other
    mask's surface, over the area of both surfaces. What lies beyond the array is outside the mask.

    A missed lesion (empty `pred`, some `truth`) scores 0, and so does a lesion predicted where
    there is none. Two empty masks have no surface: nan, as in DeepMind's package.

    Args:
        pred: the predicted mask (D, H, W).
        truth: the true mask (D, H, W).
        spacing_mm: voxel spacing in (D, H, W) order, mm.
        tolerance_mm: the distance that still counts as agreement, mm.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, or a spacing is not positive.
    """
    _check_volumes(pred, truth, spacing_mm)
    pred, truth = _crop_to_union(pred, truth)
    if not (pred.any() and truth.any()):
        return 0.0 if pred.any() or truth.any() else math.nan
    areas = surfel_areas(spacing_mm)
    pred_codes, truth_codes = neighbour_codes(pred), neighbour_codes(truth)
    pred_surface, truth_surface = (_is_surface(codes) for codes in (pred_codes, truth_codes))
    reach = tolerance_mm + DISTANCE_SLACK_MM
    near_truth = _distance_mm(truth_surface, spacing_mm)[pred_surface] <= reach
    near_pred = _distance_mm(pred_surface, spacing_mm)[truth_surface] <= reach
    pred_areas, truth_areas = areas[pred_codes[pred_surface]], areas[truth_codes[truth_surface]]
    within = pred_areas[near_truth].sum() + truth_areas[near_pred].sum()
    return float(within / (pred_areas.sum() + truth_areas.sum()))


def root_mean_square_surface_distance(
    pred: Bool[np.ndarray, "D H W"],
    truth: Bool[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
) -> float:
    """Symmetric root mean square surface distance (RMSD) in mm.

    For every border voxel of either mask, the distance from its centre to the centre of the nearest
    border voxel of the other; the root of the mean of all their squares, pooled over both ways. A
    border voxel is one with a face neighbour outside its mask; beyond the array is outside.

    nan if either mask is empty: there is no distance to a surface that does not exist. Such a scan
    is counted as missed (see `summary`), not given a distance.

    Args:
        pred: the predicted mask (D, H, W).
        truth: the true mask (D, H, W).
        spacing_mm: voxel spacing in (D, H, W) order, mm.

    Raises:
        ValueError: the masks are not boolean volumes of one shape, or a spacing is not positive.
    """
    _check_volumes(pred, truth, spacing_mm)
    pred, truth = _crop_to_union(pred, truth)
    if not (pred.any() and truth.any()):
        return math.nan
    pred_border, truth_border = (
        mask & ~np.asarray(ndimage.binary_erosion(mask), bool) for mask in (pred, truth)
    )
    distances = np.concatenate(
        [
            _distance_mm(truth_border, spacing_mm)[pred_border],
            _distance_mm(pred_border, spacing_mm)[truth_border],
        ]
    )
    return float(np.sqrt(np.mean(np.square(distances, dtype=np.float64))))


def neighbour_codes(mask: Bool[np.ndarray, "D H W"]) -> np.ndarray:
    """Which of the eight voxels round each voxel corner are in the mask.

    Returns:
        uint8 (D+1, H+1, W+1): bit i is the voxel at offset `CORNERS[i]` of the corner's eight.
    """
    padded = np.pad(mask, 1)
    depth, height, width = (extent + 1 for extent in mask.shape)
    codes = np.zeros((depth, height, width), np.uint8)
    for bit, (z, y, x) in enumerate(CORNERS):
        codes |= padded[z : z + depth, y : y + height, x : x + width].astype(np.uint8) << bit
    return codes


def surfel_areas(spacing_mm: Sequence[float]) -> Float[np.ndarray, "neighbour_code=256"]:
    """The area in mm² of the surface inside a cell of eight voxel centres, for each neighbour code.

    The surface cuts each cell edge between a voxel inside and one outside in its middle. Inside
    voxels that are connected along cell edges are wrapped together, others apart; where more than
    half of the voxels are inside, the outside ones are wrapped instead (so a mask and its
    complement have one surface). See `_polygon_triangles` for polygons that are not flat.

    Args:
        spacing_mm: voxel spacing in (D, H, W) order, mm.
    """
    depth, height, width = spacing_mm
    faces_mm2 = np.array([height * width, depth * width, depth * height])
    return np.linalg.norm(_surfel_normals() * faces_mm2, axis=-1).sum(axis=-1)


@functools.cache
def _surfel_normals() -> Float[np.ndarray, "neighbour_code=256 triangles=4 3"]:
    """The triangles of each code's surface in the unit cell: normals as long as their area."""
    normals = np.zeros((256, 4, 3))
    for code in range(256):
        inside = {corner for bit, corner in enumerate(CORNERS) if code >> bit & 1}
        if len(inside) > 4:
            inside = set(CORNERS) - inside
        polygons = map(_cut_polygon, _edge_components(inside))
        triangles = [_normals(polygon, _polygon_triangles(polygon)) for polygon in polygons]
        if triangles:
            surface = np.concatenate(triangles)
            normals[code, : len(surface)] = surface
    return normals


def _edge_components(corners: set[Corner]) -> list[set[Corner]]:
    remaining, components = set(corners), []
    while remaining:
        component, front = set(), [remaining.pop()]
        while front:
            corner = front.pop()
            component.add(corner)
            reached = remaining & set(_edge_neighbours(corner))
            remaining -= reached
            front += reached
        components.append(component)
    return components


def _edge_neighbours(corner: Corner) -> list[Corner]:
    z, y, x = corner
    return [(1 - z, y, x), (z, 1 - y, x), (z, y, 1 - x)]


def _cut_polygon(component: set[Corner]) -> Float[np.ndarray, "vertices 3"]:
    """The closed polygon through the middles of the cell edges that leave the component.

    Consecutive vertices lie on a common face of the cell: that orders them.
    """
    unordered = [
        (np.array(corner) + np.array(neighbour)) / 2
        for corner in sorted(component)
        for neighbour in _edge_neighbours(corner)
        if neighbour not in component
    ]
    polygon = [unordered.pop(0)]
    while unordered:
        on_common_face = (
            i
            for i, vertex in enumerate(unordered)
            if np.any((vertex == polygon[-1]) & (vertex != 0.5))
        )
        polygon.append(unordered.pop(next(on_common_face)))
    return np.array(polygon)


def _polygon_triangles(polygon: Float[np.ndarray, "vertices 3"]) -> list[Corner]:
    """The polygon cut into triangles of vertex indices: of all ways, the largest on the unit cell.

    Only two shapes are not flat (three voxels in an L, four along three axes), where the area
    depends on the cut; this rule gives the areas of DeepMind's table for all 256 codes and any
    spacing. Ways that tie differ only in how they cut a flat part.
    """

    def area(triangles: list[Corner]) -> float:
        return round(float(np.linalg.norm(_normals(polygon, triangles), axis=1).sum()), 9)

    return max(_triangulations(range(len(polygon))), key=area)


def _triangulations(vertices: Sequence[int]) -> Iterable[list[Corner]]:
    """All ways to cut a convex polygon into triangles."""
    if len(vertices) < 3:
        yield []
        return
    first, last = vertices[0], vertices[-1]
    for middle in range(1, len(vertices) - 1):
        halves = (vertices[: middle + 1], vertices[middle:])
        for left, right in itertools.product(*map(_triangulations, halves)):
            yield [(first, vertices[middle], last), *left, *right]


def _normals(
    polygon: Float[np.ndarray, "vertices 3"], triangles: list[Corner]
) -> Float[np.ndarray, "triangles 3"]:
    a, b, c = (polygon[[triangle[i] for triangle in triangles]] for i in range(3))
    return np.cross(b - a, c - a) / 2


def _is_surface(codes: np.ndarray) -> np.ndarray:
    return (codes != 0) & (codes != 255)


def _distance_mm(points: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The distance in mm of every voxel to the nearest True one; float32."""
    return edt.edt(np.ascontiguousarray(~points), anisotropy=tuple(map(float, spacing_mm)))


def _crop_to_union(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks within their common bounding box: all surfaces lie in it, and little else."""
    union = pred | truth
    box = []
    for axis in range(3):
        occupied = np.flatnonzero(union.any(axis=tuple({0, 1, 2} - {axis})))
        box.append(slice(occupied[0], occupied[-1] + 1) if occupied.size else slice(0, 0))
    return pred[tuple(box)], truth[tuple(box)]


def _check_volumes(pred: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> None:
    check_masks(pred=pred, truth=truth)
    if pred.ndim != 3 or len(spacing_mm) != 3:
        raise ValueError(
            f"masks of shape {pred.shape} with spacing {tuple(spacing_mm)}: expected (D, H, W) "
            "masks and three spacings in mm"
        )
    if not all(math.isfinite(step) and step > 0 for step in spacing_mm):
        raise ValueError(
            f"spacing_mm is {tuple(spacing_mm)}: expected three positive numbers in mm"
        )
