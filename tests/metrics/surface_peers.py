"""Surface measures beside other packages': how far apart they are, and how long each takes.

    pip install surface-distance medpy monai      # medpy: in an environment of its own if you like
    python tests/metrics/surface_peers.py [speed | PAIRS]

surface-distance has the same definitions, MedPy and MONAI have others: their distances are between
border voxels, each counting alike, and MedPy's HD95 is of both directions pooled. `speed` times
NSD at 1, 2, 3 and 5 mm, HD95 and ASSD of masks of 150 x 512 x 512 voxels, ours and
surface-distance's in turn, in one process.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import surface_distance
from mask_pairs import PAIRS, Pair, random_pairs, scan_pair

from deepsc_jax.metrics import root_mean_square_surface_distance
from deepsc_jax.metrics.surface import surface_distances

TOLERANCES_MM = (1.0, 2.0, 3.0, 5.0)
ROUNDS = 5


def ours(pair: Pair) -> dict[str, float]:
    found = surface_distances(*pair)
    nsd = {f"NSD at {mm:g} mm": found.normalized_dice(mm) for mm in TOLERANCES_MM}
    return nsd | {"HD95": found.hausdorff_mm(), "ASSD": found.average_mm()}


def deepminds(pair: Pair) -> dict[str, float]:
    found = surface_distance.compute_surface_distances(pair.truth, pair.pred, pair.spacing_mm)
    areas = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
    average = surface_distance.compute_average_surface_distance(found)
    nsd = {
        f"NSD at {mm:g} mm": surface_distance.compute_surface_dice_at_tolerance(found, mm)
        for mm in TOLERANCES_MM
    }
    return nsd | {
        "HD95": surface_distance.compute_robust_hausdorff(found, 95),
        "ASSD": np.dot(average, areas) / sum(areas),
    }


def medpys(pair: Pair) -> dict[str, float]:
    from medpy.metric import binary  # pyright: ignore[reportMissingImports]

    return {
        "HD95": binary.hd95(*pair[:2], pair.spacing_mm),
        "ASSD": binary.assd(*pair[:2], pair.spacing_mm),
    }


def monais(pair: Pair) -> dict[str, float]:
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.surface_distance import compute_average_surface_distance

    masks = [torch.from_numpy(mask)[None, None] for mask in pair[:2]]
    nsd = {
        f"NSD at {mm:g} mm": compute_surface_dice(
            masks[0],
            masks[1],
            [mm],
            include_background=True,
            spacing=pair.spacing_mm,
            use_subvoxels=True,
        ).item()
        for mm in TOLERANCES_MM
    }
    distances = {
        "HD95": compute_hausdorff_distance(
            *masks, include_background=True, percentile=95, spacing=pair.spacing_mm
        ).item(),
        "ASSD": compute_average_surface_distance(
            *masks, include_background=True, symmetric=True, spacing=pair.spacing_mm
        ).item(),
    }
    return nsd | distances


def differences(name: str, peer: Callable[[Pair], dict[str, float]], count: int) -> None:
    rows: dict[str, list[float]] = {}
    for pair in random_pairs(count):
        found = ours(pair)
        for key, theirs in peer(pair).items():
            rows.setdefault(key, []).append(abs(found[key] - theirs))
    for key, row in rows.items():
        unit = "" if "NSD" in key else " mm"
        print(f"{name:18}{key:14}mean {np.mean(row):9.2e}{unit}  largest {np.max(row):9.2e}{unit}")


def speed() -> None:
    pair = scan_pair()
    seconds: dict[str, list[float]] = {}
    sides = {
        "ours": lambda: ours(pair),
        "surface-distance": lambda: deepminds(pair),
        "RMSD, ours": lambda: root_mean_square_surface_distance(*pair),
    }
    for _ in range(ROUNDS):
        for name, call in sides.items():
            begun = time.perf_counter()
            call()
            seconds.setdefault(name, []).append(time.perf_counter() - begun)
    for name, row in seconds.items():
        print(f"{name:18}{statistics.median(row):8.2f} s  ({min(row):.2f} to {max(row):.2f})")
    print(f"found {ours(pair)}\ntheirs {deepminds(pair)}")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["surface-distance"], strict=True)]
    print(f"ours is {statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} at least)")


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    if "speed" in sys.argv[1:]:
        speed()
    else:
        pairs = int(sys.argv[1]) if sys.argv[1:] else PAIRS
        differences("surface-distance", deepminds, pairs)
        differences("MedPy", medpys, pairs)
        differences("MONAI", monais, pairs)
