"""A thorax in HU without lesions: body, bones, mediastinum, lungs, airways, vessels, distractors.

Everything here is drawn alike for every class. Coordinates are millimetres: x from the patient's
right to left, y from anterior to posterior, both from the body's centre, z upwards from the
scan's lowest slice. Arrays are (D, H, W) = (z, y, x).
"""

from dataclasses import dataclass, field

import cc3d
import numpy as np
from scipy.ndimage import uniform_filter
from scipy.special import expit

FAT_HU, MUSCLE_HU, BLOOD_HU, AIR_HU = -100.0, 50.0, 40.0, -1000.0


@dataclass(frozen=True)
class Frame:
    """The sampling grid of a scan: shape (D, H, W), spacing in mm, and the coordinates in mm.

    `x`, `y`, `z` broadcast to the shape; they are float32.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    x: np.ndarray = field(init=False)
    y: np.ndarray = field(init=False)
    z: np.ndarray = field(init=False)

    def __post_init__(self):
        (depth, height, width), (sz, sy, sx) = self.shape, self.spacing_mm
        z = ((np.arange(depth) + 0.5) * sz).astype(np.float32)
        y = ((np.arange(height) - (height - 1) / 2) * sy).astype(np.float32)
        x = ((np.arange(width) - (width - 1) / 2) * sx).astype(np.float32)
        object.__setattr__(self, "z", z[:, None, None])
        object.__setattr__(self, "y", y[None, :, None])
        object.__setattr__(self, "x", x[None, None, :])

    def points(self, index: np.ndarray) -> np.ndarray:
        """Coordinates (n, 3) in mm, (z, y, x) order, of voxel indices (n, 3)."""
        return np.stack(
            [
                self.z.ravel()[index[:, 0]],
                self.y.ravel()[index[:, 1]],
                self.x.ravel()[index[:, 2]],
            ],
            axis=1,
        )

    def around(self, centre_mm: np.ndarray, reach_mm: float):
        """The box (slices) within reach of a point, and the offsets (z, y, x) in mm inside it."""
        box, offsets = [], []
        for axis, values in enumerate((self.z, self.y, self.x)):
            near = np.abs(values - centre_mm[axis]) <= reach_mm
            inside = np.flatnonzero(near)
            box.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0))
            offsets.append(np.take(values, inside, axis) - centre_mm[axis])
        return tuple(box), offsets

    def splat(self, points_mm: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Share weights among the eight voxels around each point (n, 3); float32 (D, H, W)."""
        origin = np.array([self.z.flat[0], self.y.flat[0], self.x.flat[0]])
        position = (points_mm - origin) / np.asarray(self.spacing_mm)
        low = np.floor(position).astype(int)
        fraction = position - low
        inside = np.all((low >= 0) & (low < np.asarray(self.shape) - 1), axis=1)
        low, fraction, weight = low[inside], fraction[inside], weight[inside]
        total = np.zeros(int(np.prod(self.shape)))
        for corner in np.ndindex(2, 2, 2):
            share = np.prod(np.where(corner, fraction, 1 - fraction), axis=1) * weight
            flat = np.ravel_multi_index(tuple((low + corner).T), self.shape)
            total += np.bincount(flat, share, minlength=total.size)
        return total.reshape(self.shape).astype(np.float32)


def smooth_field(rng, frame: Frame, scale_mm: float, band_pass: bool = False) -> np.ndarray:
    """A random field of zero mean and unit variance, smooth over about `scale_mm`.

    Cubic B-splines over random knots, one small matrix per axis. `band_pass` takes the slow part
    out, which leaves a texture of wavelength about twice the scale.
    """
    matrices = []
    for size, spacing in zip(frame.shape, frame.spacing_mm, strict=True):
        position = np.arange(size) * spacing / scale_mm + rng.uniform()
        distance = np.abs(position[:, None] - np.arange(-1, int(position[-1]) + 3)[None])
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = np.clip(2 - distance, 0, None) ** 3 / 6
        matrices.append(np.where(distance < 1, near, far).astype(np.float32))
    knots = rng.standard_normal([m.shape[1] for m in matrices], dtype=np.float32)
    if band_pass:
        knots = knots - uniform_filter(knots, 3)
    values = np.tensordot(matrices[0], knots, (1, 0))
    values = np.einsum("hb,dbc->dhc", matrices[1], values, optimize=True)
    values = values @ matrices[2].T
    return (values - values.mean()) / values.std()


@dataclass(frozen=True)
class Thorax:
    """A chest without lesions, noise or blur. Arrays are (D, H, W).

    Attributes:
        hu: float32, everything outside the lungs.
        lung: bool, vessels included, trachea and main bronchi not.
        right: bool, broadcasts to (D, H, W): the patient's right half.
        parenchyma: float32 HU of the lung's tissue, its slow variations included.
        opacities: float32 HU that the distractors add to the lung's tissue.
        vessels: float32 in [0, 1], share of blood in a lung voxel.
        airways: float32 in [0, 1], share of bronchial air in a lung voxel.
        hila_mm: (2, 3), where vessels enter the right and the left lung, (z, y, x).
    """

    hu: np.ndarray
    lung: np.ndarray
    right: np.ndarray
    parenchyma: np.ndarray
    opacities: np.ndarray
    vessels: np.ndarray
    airways: np.ndarray
    hila_mm: np.ndarray


def draw_nuisances(rng, size: int) -> dict[str, float]:
    """What varies from scan to scan whatever the class: scanner, body, inspiration, motion."""
    chest_mm = rng.uniform(262, 290)
    slices = rng.integers(46, 71)
    return {
        "in_plane_mm": rng.uniform(3.2, 3.9) * 96 / size,
        "slice_mm": chest_mm / slices,
        "slices": float(slices),
        "noise_hu": rng.uniform(6, 18),
        "blur": rng.uniform(0.02, 0.06),
        "motion": float(rng.uniform() < 0.5) * rng.uniform(0.2, 0.4),
        "lung_hu": rng.uniform(-945, -805),
        "gravity_hu": rng.uniform(40, 130),
        "mosaic_hu": rng.uniform(25, 50),
        "opacities": float(rng.integers(2, 7)),
        "atelectasis_hu": float(rng.uniform() < 0.9) * rng.uniform(200, 650),
        "nodules": float(rng.integers(2, 9)),
        "plates": float(rng.integers(1, 6)),
        "body": rng.uniform(0.455, 0.485),
        "flatness": rng.uniform(0.66, 0.74),
        "wall_mm": rng.uniform(24, 34),
        "heart": rng.uniform(0.9, 1.1),
        "dome_mm": rng.uniform(45, 75),
    }


def build_thorax(rng, frame: Frame, drawn: dict[str, float]) -> Thorax:
    """A chest with the drawn properties; `rng` gives the details that have no name."""
    x, y, z = frame.x, frame.y, frame.z
    base = rng.uniform(12, 26)
    apex = frame.shape[0] * frame.spacing_mm[0] - rng.uniform(14, 26)
    u = (z - base) / (apex - base)  # 0 at the lowest lung, 1 at the apices
    extent = min(frame.shape[1] * frame.spacing_mm[1], frame.shape[2] * frame.spacing_mm[2])
    width = drawn["body"] * extent
    depth = width * drawn["flatness"]
    cavity_x, cavity_y = width - drawn["wall_mm"], depth - 0.8 * drawn["wall_mm"]
    taper = np.sqrt(np.clip(1 - np.clip(u, 0, 1) ** 3.4, 0.02, 1))
    taper = taper * (0.93 + 0.07 * np.clip(u / 0.3, 0, 1))
    # Distance in mm from the inner chest wall, negative inside.
    wall = _superellipse(x / (cavity_x * taper), y / (cavity_y * taper), 2.3) - 1
    wall = wall * (0.5 * (cavity_x + cavity_y) * taper) + 3.0 * smooth_field(rng, frame, 45.0)
    spine_y = cavity_y - rng.uniform(8, 14)
    spine = np.hypot(x, 1.15 * (y - spine_y))
    aorta = np.hypot(x - 22, y - spine_y + 27)
    heart = _ellipsoid(frame, (base + 62, -18.0, 22.0), drawn["heart"] * np.array([50, 46, 52]))

    hu = _chest_wall(rng, frame, u, wall, (width, depth, cavity_y), spine, spine_y)
    inside = (wall < 0) & (u < 1)

    middle = 9.5 + 26 * np.sqrt(np.clip(1 - ((y - 4) / 60) ** 2, 0, 1)) * (1 - 0.25 * u)
    right = x < 0
    dome = drawn["dome_mm"] * np.where(right, 1.0, 0.82)
    bulge = ((np.abs(x) - 0.5 * cavity_x) / (0.6 * cavity_x)) ** 2 + (
        (y + 8) / (0.95 * cavity_y)
    ) ** 2
    diaphragm = base + dome * np.clip(1 - bulge, 0, 1)
    lung = inside & (np.abs(x) > middle) & (heart > 1) & (aorta > 13) & (spine > 22)
    lung = _largest(lung & (z > diaphragm) & right) | _largest(lung & (z > diaphragm) & ~right)

    between = inside & ~lung & (spine > 20)
    hu[between] = -70.0
    great = np.hypot(x, y + 6) < 24
    hu[between & (np.abs(x) < 40) & (u > 0.3) & (great | (aorta < 12)) & (u < 0.95)] = BLOOD_HU
    hu[between & ((heart < 0) | (aorta < 12))] = BLOOD_HU
    hu[between & (z <= diaphragm) & (heart > 0)] = np.broadcast_to(
        np.where(right, 60.0, 48.0), hu.shape
    )[between & (z <= diaphragm) & (heart > 0)]

    hilum_z, carina_z = base + 0.50 * (apex - base), base + 0.60 * (apex - base)
    hila = np.array([[hilum_z, 6.0, -38.0], [hilum_z - 4, 6.0, 38.0]])
    _trachea(frame, hu, lung, carina_z, hila)
    vessels, airways = _trees(rng, frame, lung, right, hila)
    parenchyma = (
        drawn["lung_hu"]
        + drawn["gravity_hu"] * (y / (2 * cavity_y))
        + drawn["mosaic_hu"] * smooth_field(rng, frame, 65.0)
        + 10.0 * smooth_field(rng, frame, 8.0)
    ).astype(np.float32)
    opacities = _distractors(rng, frame, lung, wall, drawn)
    return Thorax(hu, lung, right, parenchyma, opacities, vessels, airways, hila)


def _superellipse(a, b, power: float):
    return (np.abs(a) ** power + np.abs(b) ** power) ** (1 / power)


def _ellipsoid(frame: Frame, centre, radii):
    """Roughly the distance in mm from an ellipsoid's surface, negative inside."""
    (cz, cy, cx), (rz, ry, rx) = centre, radii
    q = ((frame.z - cz) / rz) ** 2 + ((frame.y - cy) / ry) ** 2 + ((frame.x - cx) / rx) ** 2
    return (np.sqrt(q) - 1) * float(np.mean(radii))


def _largest(mask: np.ndarray) -> np.ndarray:
    return cc3d.largest_k(mask, k=1, connectivity=6).astype(bool)


def _chest_wall(rng, frame, u, wall, sizes, spine, spine_y) -> np.ndarray:
    """Air, fat, muscle, ribs, sternum, shoulder blades, spine; float32 HU (D, H, W)."""
    x, y, z = frame.x, frame.y, frame.z
    width, depth, cavity_y = sizes
    shoulder = np.clip((u - 0.75) / 0.25, 0, 1)
    skin = _superellipse(
        x / (width * (1 + 0.05 * shoulder)), y / (depth * (1 - 0.08 * shoulder)), 2.4
    )
    hu = np.where(skin < 1, FAT_HU, AIR_HU).astype(np.float32)
    hu[((wall < 13) | (skin < 0.87)) & (skin < 0.97)] = MUSCLE_HU
    # Ribs are slanting rings, cartilage in front.
    rib = ((z + 0.45 * (cavity_y - y)) / rng.uniform(24, 30)) % 1 < 0.36
    rib = rib & (wall > 2) & (wall < 9) & (u < 1.02)
    hu[rib & (y > -0.72 * cavity_y)] = 330.0
    hu[rib & (y <= -0.72 * cavity_y)] = 110.0
    hu[(np.abs(x) < 15) & (wall > 1) & (wall < 10) & (y < 0) & (u > 0.35)] = 220.0
    hu[
        (np.abs(wall - 17) < 4) & (u > 0.5) & (y > 0.3 * cavity_y) & (np.abs(x) > 50) & (skin < 0.9)
    ] = 280.0
    disc = (z / rng.uniform(23, 28)) % 1 < 0.2
    hu[(spine < 20) & disc] = 90.0
    hu[(spine < 20) & ~disc] = 230.0
    hu[(np.abs(x) < 5) & (y > spine_y) & (y < spine_y + 42) & ~disc & (skin < 0.95)] = 280.0
    hu[np.broadcast_to(np.hypot(x, y - spine_y - 25) < 8, hu.shape) & (skin < 0.95)] = 30.0
    return hu


def _trachea(frame, hu, lung, carina_z, hila) -> None:
    """Carve trachea and main bronchi, with walls, into the tissue between the lungs."""
    x, y, z = frame.x, frame.y, frame.z
    tube = np.where(z > carina_z, np.hypot(x, y - 4), np.inf)
    for hz, hy, hx in hila:
        share = np.clip(x / hx, 0, 1)
        line_z, line_y = carina_z + share * (hz - carina_z), 4 + share * (hy - 4)
        bronchus = (
            np.hypot(z - line_z, y - line_y) + 1e3 * (np.abs(x) > abs(hx) + 4) + 1e3 * (x * hx < 0)
        )
        tube = np.minimum(tube, bronchus + 2)
    tissue = ~lung
    hu[tissue & (tube < 10.5) & (hu < BLOOD_HU + 1) & (hu > -200)] = 10.0
    hu[tissue & (tube < 8)] = AIR_HU


def _trees(rng, frame, lung, right, hila, leaves: int = 180):
    """Branching vessels and bronchi of both lungs: shares in [0, 1] of blood and of air."""
    segments = []
    for side, hilum in zip((right, ~right), hila, strict=True):
        voxels = np.argwhere(lung & side)
        targets = frame.points(voxels[rng.integers(len(voxels), size=leaves)])
        targets = targets[np.argsort(np.linalg.norm(targets - hilum, axis=1))]
        bends = rng.normal(0, 2.5, targets.shape)
        nodes = np.concatenate([hilum[None], np.zeros((2 * leaves, 3))])
        parents = np.zeros(len(nodes), int)
        for leaf, target in enumerate(targets):
            known = nodes[: 2 * leaf + 1]
            nearest = int(np.argmin(((known - target) ** 2).sum(axis=1)))
            # A node halfway bends the branch and gives later targets a place to join.
            nodes[2 * leaf + 1] = (known[nearest] + target) / 2 + bends[leaf]
            nodes[2 * leaf + 2] = target
            parents[2 * leaf + 1 : 2 * leaf + 3] = nearest, 2 * leaf + 1
        flow = np.zeros(len(nodes))
        flow[2::2] = 1
        for node in range(len(nodes) - 1, 0, -1):
            flow[parents[node]] += flow[node]
        radius = np.minimum(0.75 * flow**0.42, 5.5)  # Murray's law, a little flattened
        segments.append(np.column_stack([nodes[parents], nodes, radius])[1:])
    segments = np.concatenate(segments)

    # Fill each segment with points: about 1.5 mm apart, in more strands where it is thick.
    length = np.linalg.norm(segments[:, 3:6] - segments[:, :3], axis=1)
    strands = np.maximum(segments[:, 6] ** 2, 1).astype(int)
    number = np.maximum((length / 1.5).astype(int), 2) * strands
    start, end, radius = np.split(np.repeat(segments, number, axis=0), [3, 6], axis=1)
    points = start + (end - start) * rng.uniform(size=radius.shape)
    points += rng.uniform(-0.6, 0.6, points.shape) * radius
    volume = np.repeat(np.pi * segments[:, 6] ** 2 * length / number, number)
    share = volume / np.prod(frame.spacing_mm)
    blood = frame.splat(points, share)
    wide = radius[:, 0] > 2
    beside = np.column_stack([np.zeros(wide.sum()), 2.2 * radius[wide, 0], np.zeros(wide.sum())])
    air = frame.splat(points[wide] + beside, 0.5 * share[wide])
    return np.clip(blood, 0, 1), np.clip(air, 0, 1)


def _distractors(rng, frame, lung, wall, drawn) -> np.ndarray:
    """HU added in every class: soft opacities, bullae, dependent and plate atelectasis, nodules."""
    added = np.zeros(frame.shape, np.float32)
    voxels = np.argwhere(lung)

    def somewhere(count):
        return frame.points(voxels[rng.integers(len(voxels), size=count)])

    for centre in somewhere(int(drawn["opacities"])):
        radii = rng.uniform(16, 40, 3)
        edge = _ellipsoid(frame, centre, radii)
        # No border to point at: the slope takes as long as the patch itself.
        added += rng.choice([-60.0, rng.uniform(120, 240)], p=[0.2, 0.8]) * expit(-edge / 11)
    if drawn["atelectasis_hu"]:
        layer = np.exp(np.clip(wall, None, 0) / rng.uniform(4, 9))
        back = np.clip(frame.y / 25 - 0.4, 0, 1)
        patchy = np.clip(0.7 + 0.6 * smooth_field(rng, frame, 30.0), 0, 1.5)
        added += drawn["atelectasis_hu"] * layer * back * patchy
    for centre in somewhere(int(drawn["plates"])):
        low = 0.3 * frame.z.max() + rng.uniform(0, 40)
        centre = np.array([min(centre[0], low), *centre[1:]])
        normal = rng.normal(0, [1.0, 0.4, 0.4])
        normal /= np.linalg.norm(normal)
        box, offset = frame.around(centre, 45.0)
        across = sum(n * o for n, o in zip(normal, offset, strict=True))
        away = np.sqrt(sum(o**2 for o in offset))
        plate = np.exp(-((across / 2.5) ** 2)) * expit((rng.uniform(15, 32) - away) / 3)
        added[box] += rng.uniform(400, 750) * plate
    for centre in somewhere(int(drawn["nodules"])):
        box, offset = frame.around(centre, 9.0)
        edge = np.sqrt(sum(o**2 for o in offset)) - rng.uniform(2.5, 6.0)
        added[box] += rng.uniform(500, 850) * np.clip(0.5 - edge / 3, 0, 1)
    return added
