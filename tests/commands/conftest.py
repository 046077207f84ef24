"""Phantoms on disk, and a case of them, for the tests of `prepare`."""

import pathlib
import shutil

import pytest
from preparing import DATA, SIZE

from deepsc_jax.data import datasets, preparation
from deepsc_jax.phantoms.writing import write_phantoms


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> pathlib.Path:
    """A folder with phantoms, their case list and their store."""
    out = tmp_path_factory.mktemp("phantoms")
    cases = write_phantoms([3, 0, 1], out, seed=5, size=SIZE, workers=1)
    assert preparation.prepare(cases, out, DATA, workers=1) == []
    return out


@pytest.fixture
def source_case(phantoms, tmp_path) -> datasets.Case:
    """A case with files of its own, in `tmp_path`/scans."""
    case = datasets.read_cases(phantoms / "cases.csv")[0]
    (tmp_path / "scans").mkdir()
    scan, lesion, lung = (
        pathlib.Path(shutil.copy(path, tmp_path / "scans")) for path in case.files()
    )
    return datasets.Case("own", "p", "train", 0, scan, lesion, lung)
