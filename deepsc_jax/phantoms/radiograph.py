"""Frontal radiographs of CT phantoms, by projection through an attenuation model.

A beam of parallel rays, from back to front: the path p is the sum of the attenuations times the
voxels' thickness, and a pixel counts Poisson(I0 e^-p + scatter) photons. Several views of a phantom
differ in how it was turned and where it stood.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

WATER_PER_MM = 0.0193  # attenuation of water at about 70 keV
PHOTONS = 1e5  # of a pixel that nothing shades. assumed, as all below
SCATTER = 0.1  # of the primary beam
SCATTER_MM = 30.0  # standard deviation of its blur
TURN_DEGREES, SHIFT_MM = 8.0, 30.0  # largest, of a view
LESION_MM = 2.0  # of a ray through a lesion, above which a pixel shows it
DENSEST_LESION_HU = 100.0
WINDOW = (1.0, 99.0)  # percentiles of an image that become 0 and 255

Hu = Float[np.ndarray, "depth height width"]
Image = Float[np.ndarray, "height width"]


@dataclasses.dataclass(frozen=True)
class View:
    """How the patient stood.

    Attributes:
      turn_degrees: about the body's axis.
      shift_mm: down and to the image's right.
    """

    turn_degrees: float = 0.0
    shift_mm: tuple[float, float] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Radiograph:
    """A frontal X-ray, apex up, the patient's right at the image's left.

    Attributes:
      image: dense is bright.
      lesion_mask: where a ray is longer than 2 mm inside lesions.
      lung_mask: where one meets lungs.
      pixel_mm: the side of a pixel.
    """

    image: UInt8[np.ndarray, "height width"]
    lesion_mask: Bool[np.ndarray, "height width"]
    lung_mask: Bool[np.ndarray, "height width"]
    pixel_mm: float


def draw_view(rng: np.random.Generator) -> View:
    """A view of those that people stand in."""
    turn, down, right = rng.uniform(-1, 1, 3)
    return View(TURN_DEGREES * turn, (SHIFT_MM * down, SHIFT_MM * right))


def radiograph(
    hu: Hu,
    lesion_mask: Bool[np.ndarray, "depth height width"],
    lung_mask: Bool[np.ndarray, "depth height width"],
    spacing_mm: tuple[float, float, float],
    rng: np.random.Generator,
    view: View | None = None,
    size: int | None = None,
    lesion_contrast: float = 1.0,
) -> Radiograph:
    """A radiograph of a scan.

    Args:
      hu: the scan, lowest slice first.
      lesion_mask: of it.
      lung_mask: of it.
      spacing_mm: of its voxels.
      rng: of the photons.
      view: how the patient stood; by default straight.
      size: pixels of a side; by default the scan's width.
      lesion_contrast: how often lesions differ from lungs as they do; 1 is physical.
    """
    view = view or View()
    side = size or hu.shape[2]
    hu = with_contrast(hu, lesion_mask, lung_mask, lesion_contrast)
    path, of_lesion, of_lung = (
        on_detector(project(x, spacing_mm[1], view), spacing_mm, side, view)
        for x in (attenuation(hu), lesion_mask.astype(float), lung_mask.astype(float))
    )
    pixel_mm = spacing_mm[2] * hu.shape[2] / side
    return Radiograph(
        developed(expose(path, pixel_mm, rng)), of_lesion > LESION_MM, of_lung > 0, pixel_mm
    )


def attenuation(hu: Hu) -> Hu:
    """Per mm: that of water is `WATER_PER_MM`, and of air 0."""
    return WATER_PER_MM * np.maximum(0.0, 1 + hu / 1000.0)


def with_contrast(
    hu: Hu,
    lesion_mask: Bool[np.ndarray, "depth height width"],
    lung_mask: Bool[np.ndarray, "depth height width"],
    contrast: float,
) -> Hu:
    """`hu` whose lesions differ from the lungs' median by `contrast` times what they do.

    No lesion becomes denser by it than soft tissue.
    """
    if contrast == 1 or not lesion_mask.any():
        return hu
    lung = float(np.median(hu[lung_mask & ~lesion_mask]))
    stretched = np.minimum(lung + contrast * (hu - lung), np.maximum(hu, DENSEST_LESION_HU))
    return np.where(lesion_mask, stretched, hu)


def project(
    values: Float[np.ndarray, "depth height width"], thickness_mm: float, view: View
) -> Float[np.ndarray, "depth width"]:
    """Sums along rays from front to back, times a voxel's thickness, of what was turned."""
    if view.turn_degrees:
        values = ndimage.rotate(
            values, view.turn_degrees, axes=(1, 2), reshape=False, order=1, cval=0.0
        )
    return values.sum(axis=1) * thickness_mm


def on_detector(
    sums: Float[np.ndarray, "depth width"],
    spacing_mm: tuple[float, float, float],
    size: int,
    view: View,
) -> Image:
    """Sums on square pixels, as many as `size` a side over the scan's width, apex up.

    Linear between the voxels' centres, and 0 outside of the scan.
    """
    depth, width = sums.shape
    pixel_mm = spacing_mm[2] * width / size
    offsets = (np.arange(size) - (size - 1) / 2) * pixel_mm  # from the middle
    rows = (depth - 1) / 2 - (offsets - view.shift_mm[0]) / spacing_mm[0]
    columns = (width - 1) / 2 + (offsets - view.shift_mm[1]) / spacing_mm[2]
    grid = np.meshgrid(rows, columns, indexing="ij")
    return ndimage.map_coordinates(sums, grid, order=1, mode="constant", cval=0.0)


def expose(path: Image, pixel_mm: float, rng: np.random.Generator) -> Image:
    """Photons that each pixel counts behind such paths."""
    primary = PHOTONS * np.exp(-path)
    scattered = SCATTER * ndimage.gaussian_filter(primary, SCATTER_MM / pixel_mm, mode="nearest")
    return rng.poisson(primary + scattered).astype(float)


def developed(counts: Image) -> UInt8[np.ndarray, "height width"]:
    """Logarithms of the counts, dense bright, from `WINDOW`'s percentiles to 0 and 255."""
    density = -np.log(np.maximum(counts, 1) / PHOTONS)
    low, high = np.percentile(density, WINDOW)
    if not high > low:
        return np.zeros(density.shape, np.uint8)
    return np.round(255 * np.clip((density - low) / (high - low), 0, 1)).astype(np.uint8)
