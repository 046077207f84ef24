"""Images of what is no volume: X-ray files, windows, and boxes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64
from PIL import Image
from scipy import ndimage

from deepsc_jax.data import itk
from deepsc_jax.data.source import require_regular
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import Untyped

PICTURES = (".png", ".jpg", ".jpeg")
GREY_MODES = ("L", "I;16", "I;16B", "I;16L", "I")
COLOUR_MODES = ("RGB", "RGBA", "LA")
MODALITY = "0008|0060"  # of DICOM
VOLUMES = ("CT", "MR", "PT", "NM")  # modalities whose files are slices
LEAST_BOX = 16  # pixels (Liang et al. 2021)

Grey = Float[np.ndarray, "height width"]


class Box(NamedTuple):
    """Pixels from `top` and `left` up to, and without, `bottom` and `right`."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def centre(self) -> tuple[float, float]:
        """In pixels from the image's corner: down, and to the right."""
        return (self.top + self.bottom) / 2, (self.left + self.right) / 2


def read_xray(path: Path) -> Grey:
    """The grey levels of an X-ray file, from its darkest to its brightest, as [0, 1].

    PNG, JPEG or, with SimpleITK, DICOM. All levels are kept, 16 bits too. What DICOM says is
    brightest where it is least dense (MONOCHROME1) is inverted.

    Raises:
      InputError: the file cannot be read, has colours, is no single picture, or is all one grey.
    """
    levels = read_levels(path)
    low, high = float(levels.min()), float(levels.max())
    if not high > low:
        raise InputError(f"{path}: every pixel is {low:g}: expected an image: check the file")
    return ((levels - low) / (high - low)).astype(np.float32)


def read_levels(path: Path) -> Float64[np.ndarray, "height width"]:
    """The grey levels of a picture as its file has them.

    Raises:
      InputError: as `read_xray`, but for one that is all one grey.
    """
    require_regular(path)
    return _picture(path) if path.suffix.lower() in PICTURES else _dicom(path)


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}): give a PNG or JPEG") from error
    if mode in COLOUR_MODES:
        colours = values[..., :3] if mode.startswith("RGB") else values[..., :1]
        if mode.endswith("A") and (values[..., -1] < 255).any():
            raise InputError(f"{path}: is partly transparent: expected an X-ray: export it as grey")
        if (colours != colours[..., :1]).any():
            raise InputError(f"{path}: is a colour image, an X-ray in grey expected: convert it")
        values = colours[..., 0]
    elif mode not in GREY_MODES:
        raise InputError(f"{path}: its pixels are of mode {mode}, grey expected: convert it")
    return values.astype(np.float64)


def _dicom(path: Path) -> np.ndarray:
    with itk.itk_errors(path, "give a DICOM file of one X-ray, a PNG or a JPEG") as sitk:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        image = reader.Execute()
        modality = reader.GetMetaData(MODALITY) if reader.HasMetaDataKey(MODALITY) else ""
        components, values = image.GetNumberOfComponentsPerPixel(), sitk.GetArrayFromImage(image)
    if modality.strip() in VOLUMES:
        raise InputError(
            f"{path}: a slice of {modality.strip()} by its DICOM header, an X-ray expected: CT, as "
            "a folder, is for a model and a store of --modality=ct"
        )
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if components > 1 or values.ndim != 2:
        raise InputError(
            f"{path}: has the shape {values.shape}, one grey picture expected: give an X-ray a file"
        )
    return values.astype(np.float64)  # ITK has inverted MONOCHROME1 (SimpleITK 2.5.7)


def boxes(mask: Bool[np.ndarray, "height width"], least: int = LEAST_BOX) -> list[Box]:
    """A box around each 8-connected lesion of a picture, in order of rows.

    None is smaller than `least` pixels a side; none reaches out of the picture, which must be as
    large.

    Raises:
      ValueError: it is smaller.
    """
    if min(mask.shape) < least:
        raise ValueError(f"a picture of {mask.shape} has no box of {least} pixels a side")
    labelled: Untyped = ndimage.label(mask, np.ones((3, 3), int))
    labels = labelled[0]
    found = []
    for extent in ndimage.find_objects(labels):
        sides = [
            _at_least(e.start, e.stop, least, n) for e, n in zip(extent, mask.shape, strict=True)
        ]
        (top, bottom), (left, right) = sides
        found.append(Box(top, left, bottom, right))
    return sorted(found)


def _at_least(start: int, stop: int, least: int, size: int) -> tuple[int, int]:
    """The extent, grown about its middle to `least` and moved to lie within `size`."""
    length = max(stop - start, least)
    start -= (length - (stop - start)) // 2
    start = min(max(start, 0), size - length)
    return start, start + length


def window(picture: Grey, centre: Sequence[float], side: int) -> Grey:
    """A square of `side` pixels about a centre, without resizing; 0 past the picture's sides.

    Args:
      picture: the image.
      centre: in pixels from its corner, down and to the right, as `Box.centre`.
      side: of the window.
    """
    top, left = (round(c - side / 2) for c in centre)
    found = np.zeros((side, side), picture.dtype)
    rows = slice(max(top, 0), min(top + side, picture.shape[0]))
    columns = slice(max(left, 0), min(left + side, picture.shape[1]))
    if rows.start < rows.stop and columns.start < columns.stop:
        inside = picture[rows, columns]
        at = rows.start - top, columns.start - left
        found[at[0] : at[0] + inside.shape[0], at[1] : at[1] + inside.shape[1]] = inside
    return found
