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
    both = [case for case in cases if case.split != "test"]
    held_out = _patients(
        both, index, count, f"--fold={index}/{count}: training and validation have"
    )

    def split_of(case: StoredCase) -> str:
        if case.split == "test":
            return "test"
        return "validation" if case.patient in held_out else "train"

    return [dataclasses.replace(case, split=split_of(case)) for case in cases]


def of_training(
    cases: Sequence[StoredCase], index: int, count: int, *, held_out: bool
) -> list[StoredCase]:
    """The cases, of whose training split fold `index` of `count` is left, or all other folds.

    The folds are as those of `of_cases`, of the training split's patients.

    Args:
      cases: of all splits.
      index: of the fold, from 0.
      count: of folds.
      held_out: whether the fold itself is left, and not what it is held out of.

    Raises:
      InputError: there are fewer patients than folds.
    """
    train = [case for case in cases if case.split == "train"]
    fold = _patients(train, index, count, f"fold {index + 1} of {count}: the training split has")
    return [c for c in cases if c.split != "train" or (c.patient in fold) == held_out]


def _patients(cases: Sequence[StoredCase], index: int, count: int, which: str) -> set[str]:
    """The patients of a fold of these cases; an error begins with `which`."""
    labels: dict[str, set[int]] = {}
    for case in cases:
        labels.setdefault(case.patient, set()).add(case.label)
    if len(labels) < count:
        raise InputError(f"{which} {counted(len(labels), 'patient')}: give at most as many folds")
    # Dealt in turn, class by class, so that folds differ by at most one patient, of each class too.
    order = sorted(labels, key=lambda patient: (sorted(labels[patient]), _rank(patient)))
    return set(order[index::count])


def _rank(patient: str) -> str:
    return hashlib.sha256(patient.encode("utf-8", "surrogateescape")).hexdigest()
