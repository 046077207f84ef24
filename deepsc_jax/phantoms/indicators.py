"""Invented indicators of phantoms, of which it is known how well they can be predicted.

Each is a signal of the case's lesions, of mean 0 and deviation 1 over all phantoms, and noise:
`y = w·signal + √(1 − w²)·noise`. So no prediction can reach a correlation above w but by chance,
and the indicator without a signal must stay at 0.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from deepsc_jax.data.datasets import Case
from deepsc_jax.phantoms.lesions import Phantom
from deepsc_jax.runtime.errors import InputError

STREAM = 18  # of random numbers: none that a phantom is made with
MIXED = (0.6, 0.8)  # of volume and density


class Lesions(NamedTuple):
    """What the signals are of: the logarithm of the lesions' volume in ml, and their mean HU."""

    log_ml: float
    hu: float


# The correlation that is the ceiling of each. Liang et al.'s five are of patients' blood.
CEILINGS = {
    "volume": 0.95,
    "inverse_volume": 0.9,
    "mixed": 0.9,
    "density": 0.8,
    "noise": 0.0,
}


def lesions_of(phantom: Phantom) -> Lesions | None:
    """The facts of a phantom's lesions; None where it has none."""
    if not phantom.lesion_mask.any():
        return None
    ml = float(phantom.lesion_mask.sum()) * float(np.prod(phantom.spacing_mm)) / 1000
    return Lesions(float(np.log(ml)), float(phantom.hu[phantom.lesion_mask].mean(dtype=float)))


def require_known(names: Sequence[str]) -> None:
    """Refuse indicators that phantoms have not.

    Raises:
      InputError: there is one.
    """
    unknown = [name for name in names if name not in CEILINGS]
    if unknown:
        raise InputError(
            f"--indicators={','.join(names)}: phantoms have no {unknown[0]}: give some of "
            f"{','.join(CEILINGS)}"
        )


def with_indicators(
    cases: Sequence[Case], lesions: Mapping[str, Lesions | None], names: Sequence[str], seed: int
) -> tuple[list[Case], dict[str, dict[str, float]]]:
    """The cases with indicators, all views of a phantom with the same; and their lesions' facts.

    Args:
      cases: of phantoms.
      lesions: of each phantom, by patient.
      names: of `CEILINGS`.
      seed: of the noise.

    Raises:
      InputError: a phantom has no lesion, or there is one phantom alone.
    """
    known = {patient: facts for patient, facts in lesions.items() if facts is not None}
    free = [patient for patient in lesions if patient not in known]
    if free or len(known) < 2:
        what = f"{free[0]} has no lesion" if free else "1 phantom"
        raise InputError(
            f"--indicators={','.join(names)}: {what}, two phantoms or more that all have lesions "
            "expected: give --classes=covid-19,cap --lesion_free= and more --phantoms"
        )
    drawn = draw(names, list(known.values()), seed).round(4).tolist()
    of = dict(zip(known, map(tuple, drawn), strict=True))
    facts = {case.name: known[case.patient]._asdict() for case in cases}
    return [dataclasses.replace(case, targets=of[case.patient]) for case in cases], facts


def draw(
    names: Sequence[str], lesions: Sequence[Lesions], seed: int
) -> Float[np.ndarray, "phantom indicator"]:
    """The indicators of phantoms; those of a name do not depend on which others are asked for.

    Args:
      names: of `CEILINGS`.
      lesions: of each phantom, two of them or more that differ in volume and in density.
      seed: of the noise.
    """
    facts = np.array(lesions)
    volume, density = ((facts - facts.mean(axis=0)) / facts.std(axis=0)).T
    mixed = MIXED[0] * volume + MIXED[1] * density
    signals = {
        "volume": volume,
        "inverse_volume": -volume,
        "mixed": mixed / mixed.std(),
        "density": density,
        "noise": np.zeros(len(facts)),
    }
    noise = np.random.default_rng([seed, STREAM]).normal(size=(len(facts), len(CEILINGS)))
    drawn = {
        name: w * signals[name] + np.sqrt(1 - w**2) * column
        for (name, w), column in zip(CEILINGS.items(), noise.T, strict=True)
    }
    return np.stack([drawn[name] for name in names], axis=1)
