"""Invented indicators: their ceilings, and what they do not depend on."""

import pathlib

import numpy as np
import pytest

from deepsc_jax.data.datasets import read_cases
from deepsc_jax.phantoms.indicators import CEILINGS, Lesions, draw
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime.errors import InputError

NAMES = tuple(CEILINGS)


def test_each_indicator_follows_its_signal_as_far_as_its_ceiling() -> None:
    rng = np.random.default_rng(0)
    facts = rng.normal(size=(4000, 2)) * [0.7, 90] + [3, -400]
    drawn = draw(NAMES, [Lesions(*row) for row in facts.tolist()], seed=1)
    volume, density = ((facts - facts.mean(axis=0)) / facts.std(axis=0)).T
    signals = (volume, -volume, 0.6 * volume + 0.8 * density, density, volume)
    found = [np.corrcoef(s, y)[0, 1] for s, y in zip(signals, drawn.T, strict=True)]
    # 3 deviations of r, which is (1 - r²) / √n.
    np.testing.assert_allclose(found, list(CEILINGS.values()), atol=3 / np.sqrt(4000))
    np.testing.assert_allclose(drawn.std(axis=0), 1, atol=0.05)


def test_an_indicator_does_not_depend_on_which_others_there_are() -> None:
    lesions = [Lesions(1.0, -300.0), Lesions(2.0, -500.0), Lesions(0.5, -100.0)]
    alone = draw(("density",), lesions, seed=0)
    np.testing.assert_array_equal(alone[:, 0], draw(NAMES, lesions, seed=0)[:, 3])


def test_views_of_a_phantom_share_them_and_the_list_has_a_column_each(
    tmp_path: pathlib.Path,
) -> None:
    classes, names = ("covid-19", "cap"), ("volume", "noise")
    cases = write_phantoms(
        (2, 0, 0), tmp_path, seed=0, size=48, workers=1, views=2, classes=classes, indicators=names
    )
    assert read_cases(tmp_path / "cases.csv", classes=classes, indicators=names) == cases
    assert [len(case.targets) for case in cases] == [2] * 4
    assert cases[0].targets == cases[1].targets != cases[2].targets
    assert (tmp_path / "oracle.json").exists()


@pytest.mark.parametrize(
    ("counts", "names", "said"),
    [
        ((3, 0, 0), ("volume",), "phantom-train-0002 has no lesion, two phantoms or more that all"),
        ((1, 0, 0), ("volume",), "1 phantom, two phantoms or more"),
        ((2, 0, 0), ("crp",), "--indicators=crp: phantoms have no crp: give some of volume,"),
    ],
)
def test_phantoms_that_have_none_are_refused(
    tmp_path: pathlib.Path, counts: tuple[int, int, int], names: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        write_phantoms(counts, tmp_path, seed=0, size=48, workers=1, indicators=names)
