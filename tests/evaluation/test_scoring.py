"""What the baselines need of a store, told before anything is scored."""

from types import SimpleNamespace
from typing import cast

import pytest

from deepsc_jax.config import DataConfig
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.scoring import require_baselines
from deepsc_jax.runtime.errors import InputError


def store(validation: str, test: str = "0", *, lesions: int = 5) -> Store:
    """A stand-in whose splits hold a case of each class id; `x` is one of unknown lesions."""

    def cases(split: str) -> list[SimpleNamespace]:
        labels = {"validation": validation, "test": test}[split]
        return [
            SimpleNamespace(
                label=0 if label == "x" else int(label),
                lesions_known=label != "x",
                lesion_voxels=lesions if label in "01" else 0,
            )
            for label in labels
        ]

    return cast(Store, SimpleNamespace(path="data/store", data=DataConfig(), cases=cases))


def test_two_cases_of_two_classes_are_enough() -> None:
    require_baselines(store("0022"), "test")
    require_baselines(store("001122"), "test")


@pytest.mark.parametrize("validation", ["012", "0012", "00", "", "xx22"])
def test_validation_that_cannot_tune_them_is_refused_with_what_it_has(validation: str) -> None:
    with pytest.raises(InputError, match="the validation split of data/store has") as error:
        require_baselines(store(validation), "test")
    assert len(str(error.value).splitlines()) == 1


def test_what_was_found_is_counted() -> None:
    with pytest.raises(InputError, match="has 1 covid-19, 1 cap, 1 non-pneumonia, 2 of them with"):
        require_baselines(store("012"), "test")


def test_a_split_without_known_lesions_is_refused() -> None:
    with pytest.raises(InputError, match="no case of split test in data/store has known lesions"):
        require_baselines(store("0022", "xx"), "test")
