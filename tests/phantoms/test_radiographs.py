"""Views of phantoms as files, and what a store of them says of itself."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from deepsc_jax.data import datasets, images
from deepsc_jax.data.records import Contents
from deepsc_jax.data.scans import load_scan
from deepsc_jax.phantoms.lesions import make_phantom
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime.errors import AbortError, InputError


def test_a_phantom_is_one_patient_with_several_views(tmp_path: pathlib.Path) -> None:
    cases = write_phantoms((1, 0, 1), tmp_path, seed=5, size=48, workers=1, views=2)
    assert datasets.read_cases(tmp_path / "cases.csv") == cases
    assert [case.name for case in cases] == [
        f"phantom-{split}-0000-view-{view}" for split in ("train", "test") for view in (1, 2)
    ]
    first, second, *_ = cases
    assert first.patient == second.patient == "phantom-train-0000"
    assert (first.label, first.modality) == (0, "xray")
    pixels = [np.asarray(Image.open(case.scan)) for case in (first, second)]
    assert pixels[0].shape == (48, 48)
    assert (pixels[0] != pixels[1]).any()
    assert first.lesion_mask is not None
    lesion = images.read_levels(first.lesion_mask)
    assert set(np.unique(lesion)) == {0, 255}
    inside = np.zeros(lesion.shape, bool)
    for box in first.boxes:
        inside[box[0] : box[2], box[1] : box[3]] = True
    assert inside[lesion > 0].all()


def test_what_is_there_is_left_and_what_was_changed_is_kept(tmp_path: pathlib.Path) -> None:
    (case, *_) = write_phantoms((1, 0, 0), tmp_path, seed=5, size=48, workers=1, views=1)
    written = case.scan.stat().st_mtime_ns
    write_phantoms((1, 0, 0), tmp_path, seed=5, size=48, workers=1, views=1)
    assert case.scan.stat().st_mtime_ns == written
    case.scan.write_bytes(b"a user's own")
    with pytest.raises(AbortError, match="is another file than would be written"):
        write_phantoms((1, 0, 0), tmp_path, seed=5, size=48, workers=1, views=1)
    assert case.scan.read_bytes() == b"a user's own"


def test_contrast_and_classes_are_as_asked(tmp_path: pathlib.Path) -> None:
    """Of CT: the second class's first phantom, whose lesions are farther from the lungs."""
    (case,) = write_phantoms(
        (1, 0, 0),
        tmp_path,
        seed=5,
        size=48,
        workers=1,
        lesion_contrast=2.0,
        classes=("cap", "covid-19"),
    )
    made = make_phantom(15, 1, 48)
    assert case.label == 0
    hu = load_scan(case.scan).values
    assert hu[made.lesion_mask].mean() > made.hu[made.lesion_mask].mean() + 50
    np.testing.assert_array_equal(hu[~made.lesion_mask], made.hu[~made.lesion_mask])
    with pytest.raises(InputError, match="there are no phantoms of influenza"):
        write_phantoms((1, 0, 0), tmp_path, seed=5, size=48, classes=("cap", "influenza"))


def test_reports_repeat_the_contrast() -> None:
    assert Contents().text("ct") == "scans"
    assert Contents().text("xray") == "X-rays"
    assert Contents(phantoms=True).text("ct") == "phantoms"
    assert Contents(phantoms=True, lesion_contrast=3).text("ct") == "phantoms, lesion contrast 3"
    assert Contents(phantoms=True).text("xray") == "X-ray phantoms, lesion contrast 1"
