"""Memory, time and kinds of file: hostile ones are refused before they cost anything."""

import gzip
import os
import socket
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scan_files import affine_of, ct, edit_header, refused, write

from deepsc_jax.data.scans import load_mask, load_scan
from deepsc_jax.runtime.errors import InputError

MIB = 1 << 20


def refused_within(memory: int, path: Path, said: str, **options) -> None:
    tracemalloc.start()
    try:
        refused(path, said, **options)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


def header_of(shape, dtype: type = np.int16) -> bytes:
    image = nib.Nifti1Image(np.zeros((1, 1, 1), dtype), affine_of())
    header = image.header
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)


def zeros_gz(path: Path, header: bytes, count: int) -> Path:
    """A header and so many zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        file.write(packer.compress(header))
        for _ in range(count // MIB):
            file.write(packer.compress(bytes(MIB)))
        file.write(packer.flush())
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory) -> Path:
    """256 MiB of zeros for a header that promises them: 512 × 512 × 512 of int16."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.nii.gz"
    return zeros_gz(path, header_of((512, 512, 512)), 256 * MIB)


def test_a_gzip_bomb_is_refused_before_it_unpacks(bomb):
    assert bomb.stat().st_size < MIB
    refused_within(MIB, bomb, r"268435456 bytes of voxels, compressed into \d+, expected at most")


def test_a_bomb_behind_honest_voxels_stops_early(tmp_path):
    header = header_of((64, 64, 16))
    path = zeros_gz(tmp_path / "case.nii.gz", header, 64 * MIB)
    refused_within(3 * MIB, path, "more voxels follow the 131072 bytes")


def test_a_bomb_given_as_a_mask_is_measured_by_its_scan(tmp_path, bomb):
    scan = load_scan(write(tmp_path / "case.nii", ct()))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"lung mask is \(512, 512, 512\), its scan"):
            load_mask(bomb, scan, "lung mask")
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_a_large_mask_that_packs_well_is_no_bomb(tmp_path):
    """Masks are mostly 0: the ratio is judged of scans alone."""
    scan = load_scan(write(tmp_path / "case.nii", ct((256, 256, 10))))
    mask = zeros_gz(tmp_path / "mask.nii.gz", header_of((256, 256, 10), np.uint8), 0)
    whole = gzip.decompress(mask.read_bytes()) + bytes(256 * 256 * 10)
    mask.write_bytes(gzip.compress(whole))
    assert not load_mask(mask, scan, "lung mask").any()


@pytest.mark.parametrize("factor", [1000, 10**6])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_with_more_slices_than_the_file_is_refused_at_the_files_cost(
    tmp_path, factor, suffix
):
    shape = (32, 32, 30)
    image = nib.Nifti2Image(ct(shape), affine_of())
    image.to_filename(tmp_path / "honest.nii")
    whole = bytearray((tmp_path / "honest.nii").read_bytes())
    struct.pack_into("<q", whole, 16 + 3 * 8, shape[2] * factor)  # NIfTI-2's dim[3]
    path = tmp_path / f"case{suffix}"
    path.write_bytes(gzip.compress(whole) if suffix.endswith("gz") else whole)
    honest = 2 * int(np.prod(shape))
    said = "truncated or damaged|expected at most"
    refused_within(3 * honest + MIB // 2, path, said)


def test_slices_beyond_the_limit_are_refused(tmp_path):
    write(tmp_path / "long.nii", ct((8, 8, 5000)))
    refused(tmp_path / "long.nii", "scan of 5000 slices, expected at most 4096")


def test_thickness_times_a_thousand_is_refused_by_the_voxel_it_gives(tmp_path):
    path = write(tmp_path / "thick.nii", ct(), affine_of(spacing=(0.7, 0.9, 2500)))
    refused(path, "voxels measure 0.7 × 0.9 × 2500 mm")


def test_files_that_are_no_regular_ones_are_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "fifo.nii")
    refused(tmp_path / "fifo.nii", "a FIFO, expected a regular file")  # reading would hang
    os.mkfifo(tmp_path / "fifo.nrrd")
    refused(tmp_path / "fifo.nrrd", "a FIFO, expected a regular file")
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    refused(tmp_path / "zero.nii", "a device, expected a regular file")
    server = socket.socket(socket.AF_UNIX)
    folder = os.getcwd()
    try:
        os.chdir(tmp_path)  # a socket's path is short
        server.bind("socket.nii.gz")
    finally:
        os.chdir(folder)
        server.close()
    refused(tmp_path / "socket.nii.gz", "a socket, expected a regular file")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    refused(tmp_path / "loop.nii", "cannot be read|no such file")


def test_a_fifo_in_a_dicom_folder_is_left_out(tmp_path):
    pytest.importorskip("SimpleITK")
    os.mkfifo(tmp_path / "fifo.dcm")
    refused(tmp_path, "a folder without a DICOM series")


def test_a_pair_whose_header_is_a_fifo_is_refused(tmp_path):
    nib.save(nib.Nifti1Pair(ct(), affine_of()), tmp_path / "case.img")
    (tmp_path / "case.hdr").unlink()
    os.mkfifo(tmp_path / "case.hdr")
    with pytest.raises(InputError, match="a FIFO, expected a regular file"):
        load_scan(tmp_path / "case.img")


def test_a_scan_takes_three_times_its_voxels(tmp_path):
    """As int16, then as float32 beside it."""
    shape = (128, 128, 64)
    voxels = ct(shape)
    for suffix in (".nii", ".nii.gz"):
        path = write(tmp_path / f"case{suffix}", voxels)
        tracemalloc.start()
        try:
            load_scan(path)
            assert tracemalloc.get_traced_memory()[1] < 3.3 * voxels.nbytes + 2 * MIB
        finally:
            tracemalloc.stop()


def test_an_offset_that_no_file_reaches_is_refused(tmp_path):
    path = write(tmp_path / "case.nii", ct())
    refused(edit_header(path, "vox_offset", 1e7), "truncated or damaged")
    path.with_suffix(".nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    refused_within(3 * MIB, path.with_suffix(".nii.gz"), "truncated or damaged")
