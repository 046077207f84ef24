"""Cross-validation: training and validation split anew, patient by patient; test stays as it is."""

import dataclasses
import hashlib
from collections.abc import Sequence

from deepsc_jax.data.records import StoredCase
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.names import counted


def of_cases(cases: Sequence[StoredCase], index: int, count: int) -> list[StoredCase]:
    """The cases with fold `index` of `count` as validation, the others of both splits as training.

    A patient's scans are in one fold, and the patients of each class, or set of classes, are spread
    over all of them. Which fold a patient is in depends on the patients alone: on no seed, and not
    on their order, so that runs of one store have the same folds.

    Raises:
      InputError: there are fewer patients than folds.
    """
    labels: dict[str, set[int]] = {}
    for case in cases:
        if case.split != "test":
            labels.setdefault(case.patient, set()).add(case.label)
    if len(labels) < count:
        raise InputError(
            f"--fold={index}/{count}: training and validation have "
            f"{counted(len(labels), 'patient')}: give at most as many folds"
        )
    # Dealt in turn, class by class, so that folds differ by at most one patient, of each class too.
    order = sorted(labels, key=lambda patient: (sorted(labels[patient]), _rank(patient)))
    held_out = set(order[index::count])

    def split_of(case: StoredCase) -> str:
        if case.split == "test":
            return "test"
        return "validation" if case.patient in held_out else "train"

    return [dataclasses.replace(case, split=split_of(case)) for case in cases]


def _rank(patient: str) -> str:
    return hashlib.sha256(patient.encode("utf-8", "surrogateescape")).hexdigest()
