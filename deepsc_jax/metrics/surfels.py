"""Surfels: the area of a mask's surface round every corner of its voxels, as DeepMind's package.

Marching cubes lays the surface between the eight voxels round a voxel corner; which of them are in
the mask is the corner's neighbour code (`surface-distance`; Nikolov et al. 2021).
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

Corner = tuple[int, int, int]
# Bit i of a neighbour code is the voxel at CORNERS[i].
CORNERS: list[Corner] = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]


def neighbour_codes(mask: Bool[np.ndarray, "D H W"]) -> UInt8[np.ndarray, "D+1 H+1 W+1"]:
    """Which of the eight voxels round each voxel corner are in the mask.

    Returns:
        Bit i is the voxel at offset `CORNERS[i]` of the corner's eight.
    """
    codes = np.pad(mask, 1).view(np.uint8)
    # An axis at a time: three passes instead of eight. In place: new memory costs more than sums.
    for axis, shift in ((2, 1), (1, 2), (0, 4)):
        lower, upper = (
            tuple(part if i == axis else slice(None) for i in range(3))
            for part in (slice(None, -1), slice(1, None))
        )
        codes[lower] |= codes[upper] << shift
        codes = codes[lower]
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
