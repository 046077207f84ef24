"""What no network is needed for to classify images: logistic regressions on a few numbers.

They are fitted on the training split, as the network is, and read once. One on what varies whatever
the class is must be at chance; one on the true lesions is what the task allows. Needs neither JAX
nor a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from sklearn.decomposition import PCA

from deepsc_jax.evaluation.baselines import logistic_regression
from deepsc_jax.metrics.classification import macro_auc
from deepsc_jax.runtime.types import Untyped

BINS = 32
COMPONENTS = 30
SIDE = 32  # pixels a side that the components are taken of

Pair = tuple[np.ndarray, np.ndarray]  # of training images and of test images, a row each

ROWS = {
    "majority": "the most frequent class of training",
    "nuisances": "what varies whatever the class is: must be at chance",
    "histogram": f"a histogram of {BINS} grey levels",
    "components": f"{COMPONENTS} principal components of {SIDE}x{SIDE} pixels",
    "true_lesions": "the true lesions: number, area, extent, grey levels",
}


@dataclass(frozen=True)
class ImageCase:
    """An image as the baselines see it.

    Attributes:
      image: of [0, 1].
      lesion: where its lesions are; None where that is not known.
      label: class id.
      nuisances: numbers that should tell nothing of the class; the same names in every case.
    """

    image: Float[np.ndarray, "height width"]
    lesion: Bool[np.ndarray, "height width"] | None
    label: int
    nuisances: Mapping[str, float] = field(default_factory=dict)


def image_baselines(
    train: Sequence[ImageCase], test: Sequence[ImageCase]
) -> dict[str, dict[str, float]]:
    """`accuracy` and `auc`, macro, of each of `ROWS` that there is data for.

    Args:
      train: at least two classes, and two images of each.
      test: what is scored.
    """
    truth = np.array([case.label for case in train])
    answer = np.array([case.label for case in test])
    classes = int(max(truth.max(), answer.max())) + 1
    shares = np.bincount(truth, minlength=classes) / len(truth)
    found = {"majority": _figures(answer, np.tile(shares, (len(test), 1)))}
    for name, features in _features(train, test).items():
        x, of_test = features
        probabilities = np.zeros((len(test), classes))
        fitted = logistic_regression(x, truth)
        probabilities[:, fitted.classes_] = fitted.predict_proba(of_test)
        found[name] = _figures(answer, probabilities)
    return found


def _features(train: Sequence[ImageCase], test: Sequence[ImageCase]) -> dict[str, Pair]:
    """The numbers of training and of test images, a row each, by the names of `ROWS`."""

    def both(of: Callable[[ImageCase], Sequence[float] | np.ndarray]) -> Pair:
        one, other = (np.array([of(case) for case in cases], float) for cases in (train, test))
        return one, other

    found: dict[str, Pair] = {}
    names = sorted(train[0].nuisances)
    if names and all(names == sorted(case.nuisances) for case in (*train, *test)):
        found["nuisances"] = both(lambda case: [case.nuisances[name] for name in names])
    found["histogram"] = both(lambda case: np.histogram(case.image, BINS, (0, 1))[0])
    pixels, of_test = both(lambda case: _small(case.image))
    principal = PCA(min(COMPONENTS, *pixels.shape), random_state=0).fit(pixels)
    found["components"] = principal.transform(pixels), principal.transform(of_test)
    if all(case.lesion is not None for case in (*train, *test)):
        found["true_lesions"] = both(lesion_numbers)
    return found


def lesion_numbers(case: ImageCase) -> Float[np.ndarray, "6"]:
    """Number, share of the image, largest share, mean place and grey level; 0 without lesions."""
    assert case.lesion is not None
    if not case.lesion.any():
        return np.zeros(6)
    labelled: Untyped = ndimage.label(case.lesion, np.ones((3, 3), int))
    sizes = np.bincount(labelled[0].ravel())[1:]
    rows, columns = np.nonzero(case.lesion)
    height, width = case.lesion.shape
    outward = np.abs(columns / width - 0.5).mean()  # from the middle
    grey = case.image[case.lesion].mean(dtype=float)
    pixels = case.lesion.size
    shares = sizes.sum() / pixels, sizes.max() / pixels
    return np.array([len(sizes), *shares, rows.mean() / height, outward, grey])


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """`image_baselines` as lines to print below the network's table."""
    lines = [
        f"accuracy  {figures[name]['accuracy']:.3f}  AUC  {figures[name]['auc']:.3f}  {text}"
        for name, text in ROWS.items()
        if name in figures
    ]
    return "\n  ".join(["Without a network (fitted on the training split)", *lines])


def _small(image: np.ndarray) -> np.ndarray:
    """The image's means over `SIDE` by `SIDE` cells, flat; as many pixels as there are if fewer."""
    rows, columns = (np.array_split(np.arange(n), min(SIDE, n)) for n in image.shape)
    means = np.stack([image[part].mean(axis=0) for part in rows])
    return np.stack([means[:, part].mean(axis=1) for part in columns], axis=1).ravel()


def _figures(answer: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    given = probabilities.argmax(axis=1)
    return {
        "accuracy": float((given == answer).mean()),
        "auc": float(macro_auc(answer, probabilities)),
    }
