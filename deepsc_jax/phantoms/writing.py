"""Phantoms as files, as a user's scans come: NIfTI, or PNG of X-rays, and a case list."""

import dataclasses
import functools
import gzip
import pathlib
import zlib
from collections.abc import Sequence

import nibabel as nib
import numpy as np

from deepsc_jax.config import CLASSES
from deepsc_jax.data import datasets
from deepsc_jax.data.datasets import SPLITS, Case
from deepsc_jax.data.lungs import lung_mask
from deepsc_jax.phantoms import lesions as phantom
from deepsc_jax.phantoms.indicators import Lesions, lesions_of, require_known, with_indicators
from deepsc_jax.phantoms.radiograph import with_contrast
from deepsc_jax.phantoms.radiographs import write_views
from deepsc_jax.runtime.errors import AbortError, InputError
from deepsc_jax.runtime.files import aside, own, require_own, write_json
from deepsc_jax.runtime.pool import in_parallel

FOUND_SHARE = 0.5  # of the phantoms have a lung mask as `lungs` finds it, the others the exact one
FOUND_STREAM = 16  # of random numbers: none that a phantom is made with


def write_phantoms(
    counts: Sequence[int],
    out: pathlib.Path,
    *,
    seed: int,
    size: int,
    workers: int = 2,
    views: int = 0,
    lesion_contrast: float = 1.0,
    classes: Sequence[str] = CLASSES,
    indicators: Sequence[str] = (),
) -> list[Case]:
    """Write phantoms as files below `out`/scans, and their list, `out`/cases.csv.

    NIfTI files of scans, or PNGs of X-rays. Half of the scans have a lung mask as it is found in
    users' scans, the others, and X-rays, the exact one. What varies between phantoms whatever their
    class is in `out`/nuisances.json, what indicators are made of in `out`/oracle.json. A phantom
    that is there already is left as it is.

    Args:
      counts: phantoms of each split, in the order of `SPLITS`; their classes take turns.
      out: the folder.
      seed: other seeds give other phantoms; the splits of a seed and of any other are disjoint.
      size: side of the phantoms' slices, in voxels.
      workers: processes.
      views: X-rays of each phantom; 0 for its scan.
      lesion_contrast: how often lesions differ from lungs as they do (`radiograph.with_contrast`).
      classes: of `CLASSES`, which take turns.
      indicators: of `indicators.CEILINGS`, which all cases have then.

    Raises:
      InputError: other files have the names that these would have, nothing can be written, or there
        are no phantoms of a class, or of a class with lesions where indicators are asked for.
    """
    foreign = [name for name in classes if name not in CLASSES]
    if foreign:
        raise InputError(
            f"--classes={','.join(classes)}: there are no phantoms of {foreign[0]}: give some of "
            f"{','.join(CLASSES)}"
        )
    require_known(indicators)
    for name in ("cases.csv", "nuisances.json", "oracle.json"):
        require_own(out / name)
    wanted = [(split, index) for split, n in zip(SPLITS, counts, strict=True) for index in range(n)]
    job = functools.partial(
        _write_phantom,
        out=out,
        seed=seed,
        size=size,
        views=views,
        lesion_contrast=lesion_contrast,
        classes=classes,
    )
    cases, nuisances, lesions = list[Case](), {}, dict[str, Lesions | None]()
    try:
        (out / "scans").mkdir(parents=True, exist_ok=True)
        for result in in_parallel(job, wanted, workers, "phantoms"):
            if isinstance(result, InputError):
                raise result
            made, found = result
            cases += made
            nuisances |= {case.name: facts for case, facts in made.items()}
            lesions |= {case.patient: found for case in made}
        with own(out / "nuisances.json") as partial:
            write_json(nuisances, partial)
        if indicators:
            cases, facts = with_indicators(cases, lesions, indicators, seed)
            with own(out / "oracle.json") as partial:
                write_json(facts, partial)
        with own(out / "cases.csv") as partial:
            datasets.write_cases(cases, partial, classes, indicators)
    except OSError as error:
        raise InputError(
            f"--out: {out} cannot be written to ({error.strerror}): make room or name another"
        ) from error
    return cases


def _write_phantom(
    wanted: tuple[str, int],
    out: pathlib.Path,
    seed: int,
    size: int,
    views: int,
    lesion_contrast: float,
    classes: Sequence[str],
) -> tuple[dict[Case, dict[str, float]], Lesions | None]:
    """The cases of a phantom, written, each with its nuisances; and the facts of its lesions."""
    split, number = wanted
    turn, label = divmod(number, len(classes))
    index = len(CLASSES) * turn + CLASSES.index(classes[label])  # a phantom's class is its index's
    seed = seed * len(SPLITS) + SPLITS.index(split)
    made = dataclasses.replace(phantom.make_phantom(seed, index, size), label=label)
    name = f"phantom-{split}-{number:04d}"
    if views:
        written = write_views(
            made,
            name,
            split,
            out / "scans",
            seed=(seed, index),
            views=views,
            lesion_contrast=lesion_contrast,
        )
        return written, lesions_of(made)
    lungs, found = given_lungs(made, seed, index)
    hu = with_contrast(made.hu, made.lesion_mask, made.lung_mask, lesion_contrast)
    depth_mm, height_mm, width_mm = made.spacing_mm
    # Canonical order is LPS (left, posterior, superior), NIfTI's world is RAS.
    affine = np.diag([-width_mm, -height_mm, depth_mm, 1.0])

    def save(array: np.ndarray, suffix: str) -> pathlib.Path:
        path = out / "scans" / f"{name}{suffix}.nii.gz"
        image = nib.Nifti1Image(np.ascontiguousarray(array.T), affine)
        image.header.set_xyzt_units("mm")
        if path.exists() or path.is_symlink():
            _require_same(path, image.to_bytes())
        else:
            with aside(path) as partial:
                image.to_filename(partial)
        return path

    case = Case(
        name=name,
        patient=name,
        split=split,
        label=made.label,
        scan=save(np.rint(hu).astype(np.int16), ""),
        lesion_mask=save(made.lesion_mask.astype(np.uint8), "-lesion"),
        lung_mask=save(lungs.astype(np.uint8), "-lung"),
    )
    return {case: made.nuisances | {"lungs_found": float(found)}}, lesions_of(made)


def given_lungs(made: phantom.Phantom, seed: int, index: int) -> tuple[np.ndarray, bool]:
    """The lung mask that comes with a phantom, as users' do: exact, or found; and whether found."""
    found = bool(np.random.default_rng([seed, index, FOUND_STREAM]).uniform() < FOUND_SHARE)
    if not found:
        return made.lung_mask, False
    return lung_mask(made.hu, made.spacing_mm, f"phantom {index} of seed {seed}"), True


def _require_same(path: pathlib.Path, content: bytes) -> None:
    """Raise AbortError unless the compressed file at `path` holds `content`."""
    try:
        same = gzip.decompress(path.read_bytes()) == content
    except (OSError, EOFError, zlib.error):
        same = False
    if not same:
        raise AbortError(
            f"{path}: exists and is another file than would be written, so it is not overwritten: "
            "choose another --out, or move it away"
        )
