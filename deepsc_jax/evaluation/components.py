"""What a class of images looks like: its mean and principal components (Liang et al., Fig. 2a)."""

import dataclasses

import numpy as np
from jaxtyping import Float

Images = Float[np.ndarray, "image height width"]
COMPONENTS = 5


@dataclasses.dataclass(frozen=True)
class Components:
    """The principal components of images.

    Attributes:
      mean: of the images.
      eigenvectors: of unit length, the largest share of variance first; the entry of the largest
        magnitude is positive.
      shares: of the variance that each explains.
    """

    mean: Float[np.ndarray, "height width"]
    eigenvectors: Float[np.ndarray, "component height width"]
    shares: Float[np.ndarray, "component"]


def components(images: Images, count: int = COMPONENTS) -> Components:
    """The first `count` components, or as many as so many images have.

    Raises:
      ValueError: there is one image, or all are the same.
    """
    rows = np.asarray(images, float).reshape(len(images), -1)
    mean = rows.mean(axis=0)
    _, singular, vectors = np.linalg.svd(rows - mean, full_matrices=False)
    variance = singular**2
    if len(rows) < 2 or not variance.sum() > 0:
        raise ValueError(f"{len(rows)} images that differ in nothing: give others")
    kept = min(count, len(rows) - 1)
    vectors = vectors[:kept]
    peaks = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)
    sides = np.shape(images)[1:]
    return Components(
        mean.reshape(sides),
        (vectors * np.sign(peaks)).reshape(kept, *sides),
        variance[:kept] / variance.sum(),
    )


def picture(values: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width"]:
    """Values scaled from minimum to maximum to [0, 1]; constant ones are 0."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
