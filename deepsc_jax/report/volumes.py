"""Volumes as a page carries them: cut to the lungs, 8 bit, NIfTI, gzip, base64.

Arrays are (D, H, W) in canonical order, spacings in mm in that order. In the page a volume is
turned to NIfTI's axes, towards right, front and head, in millimetres from the corner of the cut
that is the lowest, foremost and rightmost of the patient. All volumes of a page share that corner,
however coarse each is.
"""

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Num, UInt8

MARGIN_MM = 10.0
MOST_BYTES = 24_900_000
"""Of a page."""


@dataclass(frozen=True)
class Cut:
    """A part of a scan, and how coarse it is shown.

    Attributes:
      start: first voxel, in (D, H, W) order.
      stop: one past the last.
      step: voxels of the scan that make one of the page, in (D, H, W) order.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    step: tuple[int, int, int] = (1, 1, 1)

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The part, to index a scan with."""
        depth, height, width = map(slice, self.start, self.stop)
        return depth, height, width


def around(
    mask: Bool[np.ndarray, "D H W"], spacing_mm: Sequence[float], margin_mm: float = MARGIN_MM
) -> Cut:
    """The box of a mask and a margin round it; all of the scan where the mask is empty."""
    start, stop = [], []
    for axis, (size, mm) in enumerate(zip(mask.shape, spacing_mm, strict=True)):
        others = tuple(other for other in range(3) if other != axis)
        inside = np.flatnonzero(mask.any(axis=others))
        margin = round(margin_mm / mm)
        start.append(max(int(inside[0]) - margin, 0) if inside.size else 0)
        stop.append(min(int(inside[-1]) + margin + 1, size) if inside.size else size)
    return Cut(tuple(start), tuple(stop))


def coarser(
    array: Num[np.ndarray, "D H W"], step: Sequence[int], *, largest: bool = False
) -> np.ndarray:
    """Blocks of `step` voxels made one: their mean, or (of masks) their largest.

    Where the sides are no multiples, the last block repeats the border.
    """
    if tuple(step) == (1, 1, 1):
        return array
    padding = [(0, -size % by) for size, by in zip(array.shape, step, strict=True)]
    padded = np.pad(array, padding, mode="edge")
    shape = [part for size, by in zip(padded.shape, step, strict=True) for part in (size // by, by)]
    blocks = padded.reshape(shape)
    return blocks.max(axis=(1, 3, 5)) if largest else blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def as_bytes(
    array: Num[np.ndarray, "D H W"], low: float, high: float
) -> UInt8[np.ndarray, "D H W"]:
    """Values from `low` to `high` as 0 to 255, rounded; those beyond are cut."""
    scaled = (array.astype(np.float32) - low) * (255 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def encoded(
    array: UInt8[np.ndarray, "D H W"],
    spacing_mm: Sequence[float],
    low: float = 0.0,
    high: float = 255.0,
) -> str:
    """A volume as base64 of a gzipped NIfTI file, the same for the same volume.

    Args:
      array: of bytes.
      spacing_mm: of its voxels.
      low: value that 0 stands for.
      high: value that 255 stands for.
    """
    depth_mm, height_mm, width_mm = spacing_mm
    turned = np.asfortranarray(array[:, ::-1, ::-1].T)  # towards right, front and head
    affine = np.diag([width_mm, height_mm, depth_mm, 1.0])
    _, height, width = array.shape
    affine[:3, 3] = [(0.5 - width) * width_mm, (0.5 - height) * height_mm, 0.5 * depth_mm]
    image = nib.Nifti1Image(turned, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter((high - low) / 255, low)
    header = image.header.copy()
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    content = header.binaryblock + bytes(4) + turned.tobytes(order="F")
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


def halved(cut: Cut, spacing_mm: Sequence[float]) -> Cut:
    """The same part, coarser along the axes whose voxels are smallest: within the slices first."""
    sizes = [mm * by for mm, by in zip(spacing_mm, cut.step, strict=True)]
    depth, height, width = (
        by * (2 if size < 2 * min(sizes) else 1) for size, by in zip(sizes, cut.step, strict=True)
    )
    return Cut(cut.start, cut.stop, (depth, height, width))


def at_least(step: Sequence[int], spacing_mm: Sequence[float], mm: float) -> tuple[int, int, int]:
    """Steps that are multiples of `step`, with voxels of about `mm` at least."""
    sizes = [size * by for size, by in zip(spacing_mm, step, strict=True)]
    depth, height, width = (
        by * max(1, round(mm / size)) for by, size in zip(step, sizes, strict=True)
    )
    return depth, height, width
