"""Folds of patients: disjoint, complete, even, and independent of order."""

import dataclasses
import random
from typing import Any

import pytest

from deepsc_jax.config import TrainConfig
from deepsc_jax.data import folds
from deepsc_jax.runtime.errors import InputError

COUNT = 5


@dataclasses.dataclass(frozen=True)
class FakeCase:
    name: str
    patient: str
    split: str
    label: int


def case(patient: int, number: int = 0, split: str = "train", label: int = 0) -> Any:
    return FakeCase(f"{patient}-{number}", f"patient{patient}", split, label)


# 23 patients of three classes, every third of them with two scans, and three test patients.
CASES = [case(i, split="validation" if i % 4 == 0 else "train", label=i % 3) for i in range(23)]
CASES += [case(i, 1, CASES[i].split, i % 3) for i in range(0, 23, 3)]
CASES += [case(i, split="test", label=i % 3) for i in range(100, 103)]


def test_every_patient_is_validation_in_one_fold_and_test_in_none() -> None:
    seen: list[str] = []
    for index in range(COUNT):
        found = folds.of_cases(CASES, index, COUNT)
        assert [c.name for c in found] == [c.name for c in CASES]
        assert {c.name for c in found if c.split == "test"} == {"100-0", "101-0", "102-0"}
        held_out = {c.patient for c in found if c.split == "validation"}
        assert not held_out & {c.patient for c in found if c.split == "train"}
        assert len(held_out) in (4, 5)
        for label in range(3):
            of_class = {c.patient for c in found if c.label == label}
            assert len(held_out & of_class) in (1, 2)
        seen += held_out
    assert sorted(seen) == sorted({c.patient for c in CASES if c.split != "test"})


def test_folds_depend_on_the_patients_alone() -> None:
    shuffled = random.Random(0).sample(CASES, len(CASES))
    resplit = [dataclasses.replace(c, split="train") if c.split != "test" else c for c in shuffled]
    expected = {c.name: c.split for c in folds.of_cases(CASES, 2, COUNT)}
    assert {c.name: c.split for c in folds.of_cases(resplit, 2, COUNT)} == expected


def test_more_folds_than_patients_are_refused() -> None:
    with pytest.raises(InputError, match=r"--fold=0/24: training and validation have 23 patients"):
        folds.of_cases(CASES, 0, 24)


@pytest.mark.parametrize("text", ["5/5", "0/1", "1", "a/b", "-1/5", "1/5/2", "0/99999"])
def test_what_is_no_fold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"fold is {text}: give I/K"):
        TrainConfig(fold=text)


def test_a_fold_is_numbers_and_none_is_none() -> None:
    assert TrainConfig(fold="2/5").folds == (2, 5)
    assert TrainConfig().folds is None
