"""Files damaged at random end in a good scan or in one line, and take no more memory than others.

`fuzzed.py` draws them and loads each in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's: /proc"
)


def survey(kind: str, count: int) -> dict:
    pytest.importorskip("SimpleITK")
    done = subprocess.run(
        [sys.executable, str(TESTS / "fuzzed.py"), kind, str(count)],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_bounded(found: dict, count: int) -> None:
    assert found["failures"] == []
    assert sum(found["counts"].values()) == count
    assert found["beyond"] == 0, (found["largest_peak"], found["honest_peak"])
    # Neither may swallow the other: files that all pass or all fail test nothing.
    assert min(found["counts"]["good"], found["counts"]["refused"]) > count // 10


@pytest.mark.parametrize(("kind", "count"), [("nifti", 60), ("itk", 24), ("dicom", 12)])
def test_damaged_files_give_a_scan_or_one_line(kind, count):
    assert_bounded(survey(kind, count), count)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("nifti", 1500), ("itk", 600), ("dicom", 400)])
def test_many_damaged_files_give_a_scan_or_one_line(kind, count):
    assert_bounded(survey(kind, count), count)
