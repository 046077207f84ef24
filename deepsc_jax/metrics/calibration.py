"""Are class probabilities as often right as they say? And how to make them so.

Confidence is the probability of the most probable class, unless a class is given.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from deepsc_jax.metrics.classification import Labels, Probabilities, check_scores

BINS = 15  # Guo et al. 2017
# Of log temperature: between them a probability of 1e-6 becomes 0.4, or 0.
LOG_TEMPERATURES = (-5.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Reliability:
    """A reliability curve: bins of equal width of confidence; those without a scan are left out.

    Attributes:
      confidence: the mean in each bin.
      frequency: the share of its scans that are of the class, or are given the right one.
      scans: how many it holds.
    """

    confidence: Float[np.ndarray, "bin"]
    frequency: Float[np.ndarray, "bin"]
    scans: Int[np.ndarray, "bin"]


def reliability(
    labels: Labels, probabilities: Probabilities, class_id: int | None = None, bins: int = BINS
) -> Reliability:
    """The reliability curve, of one class against the rest or of the most probable class.

    A bin holds its lower end and not its upper one; the last one both.

    Raises:
        ValueError: labels and probabilities do not fit each other, or do not sum to 1.
    """
    labels, probabilities = check_probabilities(labels, probabilities)
    if class_id is None:
        confidence = probabilities.max(axis=1)
        right = probabilities.argmax(axis=1) == labels
    else:
        confidence, right = probabilities[:, class_id], labels == class_id
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="right")
    scans = np.bincount(bin_of, minlength=bins)
    filled = scans > 0
    means = [
        np.bincount(bin_of, weights, bins)[filled] / scans[filled]
        for weights in (confidence, right)
    ]
    return Reliability(means[0], means[1], scans[filled])


def expected_calibration_error(
    labels: Labels, probabilities: Probabilities, class_id: int | None = None, bins: int = BINS
) -> float:
    """ECE: by how much confidence is off from frequency, the mean over scans, bin by bin.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3.

    Raises:
        ValueError: labels and probabilities do not fit each other, or do not sum to 1.
    """
    curve = reliability(labels, probabilities, class_id, bins)
    gaps = np.abs(curve.confidence - curve.frequency)
    return float(gaps @ curve.scans / curve.scans.sum())


def brier_score(labels: Labels, probabilities: Probabilities) -> float:
    """The mean over scans of the squared errors summed over classes: 0 at best, 2 at worst.

    Brier's own definition of 1950; for two classes twice what is usual there.

    Raises:
        ValueError: labels and probabilities do not fit each other, or do not sum to 1.
    """
    labels, probabilities = check_probabilities(labels, probabilities)
    errors = probabilities - np.eye(probabilities.shape[1])[labels]
    return float(np.square(errors).sum(axis=1).mean())


def fit_temperature(labels: Labels, probabilities: Probabilities) -> float:
    """The temperature by which the logits are to be divided, from scans of validation.

    It minimises the negative log likelihood (Guo et al. 2017, section 4.2). Above 1 the network was
    too sure. Between exp(-5) and exp(5), of which one is taken where no scan, or every scan, is
    given the right class with certainty.

    Raises:
        ValueError: labels and probabilities do not fit each other, or do not sum to 1.
    """
    labels, probabilities = check_probabilities(labels, probabilities)
    logits = _log(probabilities)
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(special.logsumexp(scaled, axis=1) - scaled[rows, labels]))

    found = optimize.minimize_scalar(
        loss, bounds=LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-10}
    )
    return float(np.exp(found.x))


def scale_by_temperature(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Probabilities of logits divided by the temperature; the most probable class stays.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: expected a positive number")
    return special.softmax(_log(np.asarray(probabilities, float)) / temperature, axis=1)


def check_probabilities(
    labels: Labels, probabilities: Probabilities
) -> tuple[Labels, Probabilities]:
    """Both as arrays; raises ValueError unless they fit each other and rows sum to 1."""
    labels, probabilities = check_scores(labels, probabilities)
    # float32 softmax is off by 1e-6 at most.
    wrong = (np.abs(probabilities.sum(axis=1) - 1) > 1e-4) | (probabilities < 0).any(axis=1)
    if wrong.any():
        scan = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"the probabilities of scan {scan} are {probabilities[scan]}: expected none below 0, "
            "with a sum of 1"
        )
    return labels, probabilities.astype(float)


def _log(probabilities: Probabilities) -> Probabilities:
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
