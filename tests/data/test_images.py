"""X-ray files, windows and boxes; real files, numbers by hand."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from deepsc_jax.data.images import Box, boxes, read_xray, window
from deepsc_jax.runtime.errors import InputError

LEVELS = np.array([[100, 300], [500, 1100]], np.uint16)
SHOWN = [[0, 0.2], [0.4, 1]]


def save(path: pathlib.Path, array: np.ndarray) -> pathlib.Path:
    Image.fromarray(array).save(path)
    return path


def test_all_levels_of_a_png_are_kept(tmp_path: pathlib.Path):
    np.testing.assert_allclose(read_xray(save(tmp_path / "a.png", LEVELS)), SHOWN, rtol=1e-6)
    eight = save(tmp_path / "b.png", (LEVELS // 10).astype(np.uint8))
    np.testing.assert_allclose(read_xray(eight), SHOWN, rtol=1e-6)


def test_grey_in_three_channels_is_grey_and_colours_are_refused(tmp_path: pathlib.Path):
    grey = np.repeat((LEVELS // 10).astype(np.uint8)[..., None], 3, axis=2)
    np.testing.assert_allclose(read_xray(save(tmp_path / "a.png", grey)), SHOWN, rtol=1e-6)
    grey[0, 0, 1] += 1
    with pytest.raises(InputError, match=r"b\.png: is a colour image, an X-ray in grey expected"):
        read_xray(save(tmp_path / "b.png", grey))
    alpha = np.dstack([grey[..., :1].repeat(3, axis=2), np.full((2, 2), 128, np.uint8)])
    with pytest.raises(InputError, match="is partly transparent"):
        read_xray(save(tmp_path / "c.png", alpha))


def test_a_jpeg_is_read(tmp_path: pathlib.Path):
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 16, axis=0)
    found = read_xray(save(tmp_path / "a.jpg", ramp))
    np.testing.assert_allclose(found, np.repeat(np.linspace(0, 1, 64)[None], 16, 0), atol=0.02)


def test_what_is_no_image_is_one_line(tmp_path: pathlib.Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a\.png: cannot be read .*: give a PNG or JPEG"):
        read_xray(tmp_path / "a.png")
    whole = save(tmp_path / "b.png", np.arange(4096, dtype=np.uint8).reshape(64, 64)).read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"b\.png: cannot be read"):
        read_xray(tmp_path / "b.png")
    data = whole.index(b"IDAT")
    (tmp_path / "d.png").write_bytes(whole[: data - 4] + bytes((0, 0, 0, 8)) + whole[data:])
    with pytest.raises(InputError, match=r"d\.png: cannot be read \(broken PNG file"):
        read_xray(tmp_path / "d.png")
    with pytest.raises(InputError, match=r"c\.png: every pixel is 7: expected an image"):
        read_xray(save(tmp_path / "c.png", np.full((3, 3), 7, np.uint8)))


def test_dicom_that_is_bright_where_it_is_thin_is_inverted(tmp_path: pathlib.Path):
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(LEVELS), str(tmp_path / "a.dcm"))
    np.testing.assert_allclose(read_xray(tmp_path / "a.dcm"), SHOWN, rtol=1e-6)
    content = (tmp_path / "a.dcm").read_bytes()
    assert content.count(b"MONOCHROME2") == 1
    (tmp_path / "b.dcm").write_bytes(content.replace(b"MONOCHROME2", b"MONOCHROME1"))
    np.testing.assert_allclose(read_xray(tmp_path / "b.dcm"), 1 - np.array(SHOWN), rtol=1e-6)
    (tmp_path / "c.dcm").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"c\.dcm: cannot be read .*: give a DICOM file"):
        read_xray(tmp_path / "c.dcm")


def test_boxes_are_padded_and_stay_inside():
    mask = np.zeros((40, 60), bool)
    mask[0:2, 0:4] = True  # in a corner
    mask[10:30, 20:30] = True  # taller than the least
    mask[35, 50] = mask[36, 51] = True  # joined by a corner, near the lower edge
    assert boxes(mask) == [Box(0, 0, 16, 16), Box(10, 17, 30, 33), Box(24, 43, 40, 59)]
    assert boxes(np.zeros((20, 20), bool)) == []
    assert Box(10, 17, 30, 33).centre == (20, 25)
    with pytest.raises(ValueError, match="no box of 16"):
        boxes(np.ones((20, 8), bool))


def test_a_window_is_cut_without_resizing_and_padded_with_0():
    picture = np.arange(1, 31.0).reshape(5, 6)
    np.testing.assert_array_equal(window(picture, (2, 3), 2), picture[1:3, 2:4])
    corner = window(picture, (0, 0), 4)
    np.testing.assert_array_equal(corner[2:, 2:], picture[:2, :2])
    assert not corner[:2].any()
    assert not corner[:, :2].any()
    assert not window(picture, (50, 50), 4).any()
