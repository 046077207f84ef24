"""Radiographs of phantoms as files, as a user's X-rays come: PNG."""

import io
import pathlib

import numpy as np
from PIL import Image

from deepsc_jax.data.datasets import Case
from deepsc_jax.data.images import LEAST_BOX, boxes
from deepsc_jax.phantoms.lesions import Phantom
from deepsc_jax.phantoms.radiograph import draw_view, radiograph
from deepsc_jax.runtime.errors import AbortError
from deepsc_jax.runtime.files import aside

VIEW_STREAM = 17  # of random numbers: none that a phantom is made with


def write_views(
    made: Phantom,
    name: str,
    split: str,
    folder: pathlib.Path,
    *,
    seed: tuple[int, int],
    views: int,
    lesion_contrast: float,
) -> dict[Case, dict[str, float]]:
    """Write views of a phantom, as of one patient, with masks of lesions and lungs.

    Args:
      made: the phantom.
      name: of the patient.
      split: of all its views.
      folder: for the files.
      seed: of the views, and the phantom's index.
      views: how many.
      lesion_contrast: as of `radiograph`.

    Returns:
      The cases, each with what varies whatever the class is.
    """
    cases = {}
    for view in range(views):
        rng = np.random.default_rng([*seed, VIEW_STREAM, view])
        stood = draw_view(rng)
        taken = radiograph(
            made.hu.astype(float),
            made.lesion_mask,
            made.lung_mask,
            made.spacing_mm,
            rng,
            stood,
            lesion_contrast=lesion_contrast,
        )
        of_view = f"{name}-view-{view + 1}"
        save = {"": taken.image, "-lesion": taken.lesion_mask, "-lung": taken.lung_mask}
        image, lesion, lung = (
            _save(255 * array.astype(np.uint8) if array.dtype == bool else array, folder, file)
            for file, array in ((f"{of_view}{end}.png", array) for end, array in save.items())
        )
        small = min(taken.image.shape) < LEAST_BOX
        around = () if small else tuple(boxes(taken.lesion_mask))
        case = Case(of_view, name, split, made.label, image, lesion, lung, "xray", around)
        down, right = stood.shift_mm
        how = {"turn_degrees": stood.turn_degrees, "down_mm": down, "right_mm": right}
        cases[case] = made.nuisances | how
    return cases


def _save(array: np.ndarray, folder: pathlib.Path, name: str) -> pathlib.Path:
    """Write a picture, unless it is there.

    Raises:
      AbortError: another one is.
    """
    content, path = io.BytesIO(), folder / name
    Image.fromarray(array).save(content, "PNG")
    if not (path.exists() or path.is_symlink()):
        with aside(path) as partial:
            partial.write_bytes(content.getvalue())
    elif not path.is_file() or path.read_bytes() != content.getvalue():
        raise AbortError(
            f"{path}: exists and is another file than would be written, so it is not overwritten: "
            "choose another --out, or move it away"
        )
    return path
