"""Sums of sources: what belongs to one, and what does not matter."""

import hashlib
import os
import pathlib

import pytest

from deepsc_jax.data.sums import meanwhile, source_sum
from deepsc_jax.runtime.errors import InputError


def write(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """The folder, with these files in it."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_file_has_the_sum_that_other_programs_give(tmp_path):
    path = write(tmp_path, {"a.nii": b"scan"}) / "a.nii"
    assert source_sum(path) == hashlib.sha256(b"scan").hexdigest()


def test_the_slices_of_a_dicom_folder_are_one_source(tmp_path):
    one = source_sum(write(tmp_path / "one", {"a": b"first", "b": b"second"}))
    assert source_sum(write(tmp_path / "renamed", {"x": b"second", "y": b"first"})) == one
    assert source_sum(write(tmp_path / "one", {".DS_Store": b"of a file browser"})) == one
    assert source_sum(write(tmp_path / "changed", {"a": b"first", "b": b"seconds"})) != one
    assert source_sum(write(tmp_path / "one", {"c": b""})) != one


@pytest.mark.parametrize(
    ("header", "content", "data"),
    [
        ("a.hdr", b"header", "a.img"),
        ("a.img", b"voxels", "a.hdr"),
        ("a.mhd", b"NDims = 3\nElementDataFile = other one.raw\n", "other one.raw"),
        ("a.nhdr", b"NRRD0004\r\ndata file: a.raw.gz\r\n\r\n", "a.raw.gz"),
    ],
)
def test_voxels_that_lie_in_a_file_of_their_own_belong_to_it(tmp_path, header, content, data):
    path = write(tmp_path, {header: content, data: b"1"}) / header
    before = source_sum(path)
    write(tmp_path, {"b.raw": b"of another"})
    assert source_sum(path) == before
    write(tmp_path, {data: b"2"})
    assert source_sum(path) != before


def test_what_cannot_be_summed_is_said_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo.nii")
    os.mkfifo(tmp_path / "fifo.mhd")
    for name, words in [
        ("fifo.nii", "is a FIFO"),
        ("fifo.mhd", "is a FIFO"),
        ("gone.nii", "no such file"),
        ("gone.mhd", "no such file"),
        ("x" * 300, "cannot be looked at"),
    ]:
        with pytest.raises(InputError, match=words):
            source_sum(tmp_path / name)


def test_sums_are_taken_while_the_files_are_read(tmp_path):
    path = write(tmp_path, {"a.nii": b"scan"}) / "a.nii"
    with meanwhile({"scan": path}) as sums:
        assert path.read_bytes() == b"scan"
    assert sums.result() == {"scan": source_sum(path)}
    with meanwhile({"scan": tmp_path / "gone"}) as sums:
        pass
    with pytest.raises(InputError, match="no such file"):
        sums.result()
