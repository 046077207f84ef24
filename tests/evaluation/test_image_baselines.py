"""Baselines of images: what separates the classes is found, and what does not is at chance."""

import numpy as np
import pytest

from deepsc_jax.evaluation.image_baselines import ImageCase, image_baselines, lesion_numbers


def case(index: int, seed: int) -> ImageCase:
    """Of class 1 the lesion is brighter and larger; nuisances are random."""
    rng, label = np.random.default_rng([seed, index]), index % 2
    image = rng.uniform(0, 0.5, (40, 48))
    lesion = np.zeros(image.shape, bool)
    lesion[10 : 14 + 4 * label, 20:30] = True
    image[lesion] += 0.2 + 0.25 * label
    return ImageCase(image, lesion, label, {"a": rng.normal(), "b": rng.normal()})


def test_each_finds_what_it_can_see() -> None:
    train = [case(i, 0) for i in range(60)]
    test = [case(i, 1) for i in range(60)]
    figures = image_baselines(train, test)
    assert figures["majority"] == {"accuracy": 0.5, "auc": 0.5}
    for name in ("histogram", "components", "true_lesions"):
        assert figures[name]["auc"] > 0.95, name
    # 60 cases: the standard error of a guess's AUC is 0.075.
    assert abs(figures["nuisances"]["auc"] - 0.5) < 0.25


def test_what_is_not_known_is_left_out() -> None:
    cases = [ImageCase(one.image, None, one.label) for one in (case(i, 0) for i in range(8))]
    assert list(image_baselines(cases, cases)) == ["majority", "histogram", "components"]


def test_a_lesions_numbers() -> None:
    lesion = np.zeros((10, 20), bool)
    lesion[0, :10] = lesion[5:7, 10:15] = True
    found = lesion_numbers(ImageCase(lesion * 0.5, lesion, 1))
    rows = (10 * 0 + 5 * 5 + 5 * 6) / 20 / 10
    outward = np.mean([abs(c / 20 - 0.5) for c in [*range(10), *range(10, 15), *range(10, 15)]])
    assert found == pytest.approx([2, 0.1, 0.05, rows, outward, 0.5])
    assert not lesion_numbers(ImageCase(lesion * 0.5, ~lesion & lesion, 0)).any()
