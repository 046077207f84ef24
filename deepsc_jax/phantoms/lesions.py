"""Phantom chest CT with lesions that follow the paper's findings (section III.B), made on demand.

A phantom is a function of (seed, index) alone. Its class is `index % 3`; the number of the sample
within its class, `index // 3`, drives low-discrepancy draws of lesion count, volume ratio,
peripheral ratio and share of consolidation, so that any run of samples has their distribution.
Anatomy, scanner and distractors come from `anatomy` and know nothing of the class.
"""

from dataclasses import dataclass

import cc3d
import edt
import numpy as np
from scipy.ndimage import correlate1d, maximum_filter, minimum_filter
from scipy.special import ndtri

from deepsc_jax.metrics.findings import PERIPHERY_MM, depth_in_lung, voxel_ml
from deepsc_jax.phantoms import structures
from deepsc_jax.phantoms import thorax as anatomy
from deepsc_jax.phantoms.structures import Structures
from deepsc_jax.phantoms.thorax import BLOOD_HU, Frame, Thorax, smooth_field

COVID, CAP, NON_PNEUMONIA = 0, 1, 2
CORE_MM = 5.0  # every lesion's smallest radius
TYPICAL_LUNG_HU = -860.0
TEXTURE_HU = 85.0  # standard deviation of the pattern inside ground glass


@dataclass(frozen=True)
class Phantom:
    """One phantom scan; arrays are (D, H, W), spacing is (D, H, W) in mm.

    Attributes:
        hu: int16, Hounsfield units.
        lesion_mask: bool, inside `lung_mask`; its 26-connected components are the lesions.
        lung_mask: bool, vessels and lesions included, trachea and main bronchi not.
        spacing_mm: voxel size in mm.
        label: 0 covid-19, 1 cap, 2 non-pneumonia (`config.CLASSES`).
        nuisances: what was drawn alike for all classes, by name.
    """

    hu: np.ndarray
    lesion_mask: np.ndarray
    lung_mask: np.ndarray
    spacing_mm: tuple[float, float, float]
    label: int
    nuisances: dict[str, float]


@dataclass(frozen=True)
class Disease:
    """How one class's lesions are drawn (paper, section III.B; the rest assumed).

    Attributes:
        counts: probability of 1, 2, 3, … lesions.
        log_lvr: mean and standard deviation of log(LVR in percent).
        plr: mean and half range of the peripheral ratio.
        plr_fall: how much it falls per standard deviation of log LVR: large lesions reach inwards.
        consolidation: lowest and highest share of consolidated lesion voxels.
        contrast_hu: range of ground glass above the lung around it.
        size_spread: standard deviation of log size between the lesions of a scan.
        tall: how much lesions reach along the body, against in-plane.
        apart_mm: distance between seeds: lowest, and highest from the first seed.
    """

    counts: tuple[float, ...]
    log_lvr: tuple[float, float]
    plr: tuple[float, float]
    plr_fall: float
    consolidation: tuple[float, float]
    contrast_hu: tuple[float, float]
    size_spread: float
    tall: float
    apart_mm: tuple[float, float]


DISEASES = {
    COVID: Disease(
        counts=(0.11, 0.16, 0.18, 0.14, 0.11, 0.10, 0.07, 0.05, 0.04, 0.02, 0.01, 0.01),
        log_lvr=(2.545, 0.479),
        plr=(0.624, 0.10),
        plr_fall=0.09,
        consolidation=(0.0, 0.0),
        contrast_hu=(165, 205),
        size_spread=0.40,
        tall=1.2,
        apart_mm=(32, 1000),
    ),
    CAP: Disease(
        counts=(0.55, 0.27, 0.12, 0.05, 0.01),
        log_lvr=(1.155, 0.808),
        plr=(0.245, 0.12),
        plr_fall=0.0,
        consolidation=(0.10, 0.56),
        contrast_hu=(175, 225),
        size_spread=0.12,
        tall=1.25,
        apart_mm=(34, 75),
    ),
}


def make_phantom(seed: int, index: int, size: int = 96) -> Phantom:
    """The phantom of this seed and index: always the same one.

    Args:
        seed: a data set's number; other seeds give other patients.
        index: 0, 1, 2, …; its class is `index % 3`.
        size: in-plane voxels; the field of view (307 to 374 mm) does not depend on it.
    """
    label, sample = index % 3, index // 3
    chest_rng, lesion_rng, noise_rng, detail_rng = (
        np.random.default_rng([seed, index, stream]) for stream in range(4)
    )
    nuisances = anatomy.draw_nuisances(chest_rng, size)
    in_plane_mm = nuisances["in_plane_mm"]
    frame = Frame(
        (int(nuisances["slices"]), size, size), (nuisances["slice_mm"], in_plane_mm, in_plane_mm)
    )
    thorax = anatomy.build_thorax(chest_rng, frame, nuisances)
    details = structures.draw_details(detail_rng)
    normal = structures.build_structures(detail_rng, frame, thorax, details)
    nuisances |= details
    nuisances["lung_ml"] = np.count_nonzero(thorax.lung) * voxel_ml(frame.spacing_mm)

    parenchyma = thorax.parenchyma
    lesion = np.zeros(frame.shape, bool)
    if label in DISEASES:
        disease = DISEASES[label]
        drawn = _quasi_random(seed, label, sample)
        owner = _grow(lesion_rng, frame, thorax, disease, drawn)
        lesion = owner > 0
        parenchyma = _fill(lesion_rng, frame, thorax, disease, owner, drawn[3])
    hu = _image(noise_rng, thorax, normal, parenchyma, lesion, nuisances, frame)
    return Phantom(hu, lesion, thorax.lung, frame.spacing_mm, label, nuisances)


def _quasi_random(seed: int, label: int, sample: int) -> np.ndarray:
    """Four numbers in (0, 1) per sample: a Kronecker sequence with a start per seed and class.

    The steps are quadratic irrationals, linearly independent over the rationals, so that every
    run of consecutive samples fills each axis evenly. The golden ratio, the evenest of them,
    goes to the lesion count, whose steps are the largest.
    """
    start = np.random.default_rng([seed, label, 1 << 20]).uniform(size=4)
    step = np.array([(5**0.5 - 1) / 2, 2**0.5, 3**0.5, 7**0.5])
    return np.clip((start + sample * step) % 1, 1e-3, 1 - 1e-3)


def _grow(rng, frame: Frame, thorax: Thorax, disease: Disease, drawn) -> np.ndarray:
    """Number the voxels of each lesion 1..n; the others 0.

    Every lesion has a seed and a field that rises with the distance from it. One threshold for
    all of them gives the drawn volume, one tilt of the fields along the distance from the lung's
    border gives the drawn peripheral ratio. Voxels next to another seed's territory are left
    free, so lesions stay at least two voxels apart.
    """
    lung = thorax.lung
    count = 1 + int(np.searchsorted(np.cumsum(disease.counts)[:-1], drawn[0], side="right"))
    mu, sigma = disease.log_lvr
    target = round(np.exp(mu + sigma * ndtri(drawn[1])) / 100 * np.count_nonzero(lung))
    plr = disease.plr[0] + disease.plr[1] * (2 * drawn[2] - 1)
    plr -= disease.plr_fall * ndtri(drawn[1])

    depth = depth_in_lung(lung, frame.spacing_mm)
    seeds = _seeds(rng, frame, thorax, disease, count, depth)
    box = tuple(slice(a.min() - 1, a.max() + 2) for a in np.nonzero(lung))
    field, owner = _territories(rng, frame, thorax, disease, seeds, box)
    free = lung[box] & (maximum_filter(owner, 3) == minimum_filter(owner, 3)) & np.isfinite(field)

    inside = np.flatnonzero(free)
    values, depths = field.ravel()[inside], depth[box].ravel()[inside]
    # Level inside the periphery: a ramp there would draw shells one voxel thick.
    slope = 1 / (1 + np.exp((PERIPHERY_MM + 1 - depths) / 2))
    target = min(target, len(inside) - 1)
    low, high = -3.0, 3.0
    for _ in range(10):
        tilt = (low + high) / 2
        chosen = np.argpartition(values * np.exp(tilt * slope), target)[:target]
        if np.mean(depths[chosen] <= PERIPHERY_MM) < plr:
            low = tilt
        else:
            high = tilt
    tilted = np.full(owner.shape, np.inf, np.float32)
    tilted.ravel()[inside] = values * np.exp(tilt * slope)
    lesions = np.zeros(frame.shape, np.int32)
    corner = [b.start for b in box]
    lesions[box] = np.where(_seeded_pieces(tilted, seeds - corner, target), owner, 0)
    return lesions


def _seeds(rng, frame, thorax, disease, count: int, depth) -> np.ndarray:
    """Voxels (count, 3) that lesions grow from: at the border, or near one hilum, as PLR asks."""
    peripheral = disease.plr[0] > 0.4
    zone = (depth > 3) & (depth < 12) if peripheral else depth > 14
    voxels = np.argwhere(zone)
    points = frame.points(voxels)
    on_right = np.broadcast_to(thorax.right, zone.shape)[tuple(voxels.T)]
    weight = np.exp(0.005 * points[:, 1] - 0.003 * points[:, 0])  # more behind and below
    if not peripheral:
        hilum = thorax.hila_mm[np.where(on_right, 0, 1)]
        weight = weight * np.exp(-np.linalg.norm(points - hilum, axis=1) / 30)
    seeds = [int(rng.choice(len(voxels), p=weight / weight.sum()))]
    while len(seeds) < count:
        away = np.linalg.norm(points[:, None] - points[None, seeds], axis=2)
        for closer in 0.9 ** np.arange(12):  # crowded lungs: let them come closer
            allowed = away.min(axis=1) > disease.apart_mm[0] * closer
            allowed &= away[:, 0] < disease.apart_mm[1]
            if not peripheral:
                allowed &= on_right == on_right[seeds[0]]
            elif len(seeds) == 1:
                allowed &= on_right != on_right[seeds[0]]
            if allowed.any():
                break
        chance = weight * allowed
        seeds.append(int(rng.choice(len(voxels), p=chance / chance.sum())))
    return voxels[seeds]


def _territories(rng, frame, thorax, disease, seeds, box):
    """The field of the nearest seed and that seed's number, over the box around the lungs."""
    z, y, x = frame.z[box[0]], frame.y[:, box[1]], frame.x[:, :, box[2]]
    right = np.broadcast_to(thorax.right[:, :, box[2]], (1, 1, x.size))
    shape = (z.size, y.size, x.size)
    field, owner = np.full(shape, np.inf, np.float32), np.ones(shape, np.uint8)
    warp = np.exp(0.18 * smooth_field(rng, frame, 22.0)[box])
    for number, (seed, point) in enumerate(zip(seeds, frame.points(seeds), strict=True), 1):
        size = np.exp(disease.size_spread * rng.standard_normal())
        offset = ((z - point[0]) / disease.tall) ** 2 + (y - point[1]) ** 2 + (x - point[2]) ** 2
        distance = np.sqrt(offset) * warp / np.float32(size)
        distance[offset < CORE_MM**2] = 0  # a drawn lesion never vanishes
        distance = np.where(right == thorax.right[0, 0, seed[2]], distance, np.inf)
        nearer = distance < field
        field[nearer], owner[nearer] = distance[nearer], number
    return field, owner


def _seeded_pieces(field, seeds, target: int) -> np.ndarray:
    """The pieces of {field < t} that hold a seed, with t such that they have `target` voxels."""
    ordered = np.sort(field[np.isfinite(field)])
    low, high = 0, len(ordered) - 1
    rank, kept = min(target, high), np.zeros(field.shape, bool)
    for _ in range(10):
        labels = cc3d.connected_components(field <= ordered[rank], connectivity=26)
        wanted = np.zeros(labels.max() + 1, bool)
        wanted[labels[tuple(seeds.T)]] = True
        wanted[0] = False
        kept = wanted[labels]
        missing = target - np.count_nonzero(kept)
        if abs(missing) <= 0.004 * target or high - low <= 1:
            break
        low, high = (rank, high) if missing > 0 else (low, rank)
        rank = rank + missing if low < rank + missing < high else (low + high) // 2
    return kept


def _fill(rng, frame, thorax: Thorax, disease: Disease, owner, drawn: float) -> np.ndarray:
    """The lung's tissue in HU with its lesions: ground glass, and consolidation in their cores."""
    lesion = owner > 0
    contrast = rng.uniform(*disease.contrast_hu, owner.max() + 1).astype(np.float32)
    # Reticulation coarse enough to survive 5 mm voxels.
    texture = TEXTURE_HU * smooth_field(rng, frame, 10.0, band_pass=True)
    # Ground glass takes the place of air, so denser lung gains less.
    air = np.clip(thorax.parenchyma / TYPICAL_LUNG_HU, 0.6, 1.15)
    glass = thorax.parenchyma + contrast[owner] * air + texture
    tissue = np.where(lesion, glass, thorax.parenchyma)
    low, high = disease.consolidation
    if high > 0:
        inner = edt.edt(lesion, anisotropy=frame.spacing_mm) + 4 * smooth_field(rng, frame, 20.0)
        share = low + (high - low) * drawn
        dense = lesion & (inner > np.quantile(inner[lesion], 1 - share))
        tissue[dense] = BLOOD_HU + 18 * smooth_field(rng, frame, 12.0)[dense]
    return tissue


def _image(
    rng, thorax: Thorax, normal: Structures, tissue, lesion, nuisances, frame: Frame
) -> np.ndarray:
    """Normal structures and distractors over the tissue, then motion, blur and noise; int16 HU."""
    inside = tissue + (thorax.opacities + normal.added_hu) * np.where(lesion, 0.15, 1.0)
    inside = np.minimum(inside, 70.0)
    inside += np.maximum(thorax.vessels, normal.tissue) * (BLOOD_HU - inside)
    inside += thorax.airways * (anatomy.AIR_HU - inside)
    inside += normal.calcium_hu
    hu = np.where(thorax.lung, np.maximum(inside, -990.0), thorax.hu).astype(np.float32)

    if nuisances["motion"]:  # the diaphragm and the heart move: the lower third doubles
        fade = nuisances["motion"] * np.clip(1.2 - frame.z / (0.4 * frame.z.max()), 0, 1)
        shift = int(rng.choice([-1, 1]))
        hu += fade * (np.roll(hu, shift, 1) - hu)
    blur = nuisances["blur"]
    for axis, share in enumerate((0.7 * blur, blur, blur)):
        hu = correlate1d(hu, [share, 1 - 2 * share, share], axis, mode="nearest")
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    noise = correlate1d(noise, [0.2, 0.93, 0.2], 2)  # reconstruction correlates neighbours
    hu += nuisances["noise_hu"] * noise
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
