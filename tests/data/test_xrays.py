"""X-rays on their way into a store: real files of each kind, and what is refused in one line."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from deepsc_jax.config import DataConfig
from deepsc_jax.data import datasets, preparation, xrays
from deepsc_jax.data.store import Store
from deepsc_jax.runtime.errors import InputError

DATA = DataConfig(
    modality="xray",
    mask="none",
    working_size=(32, 48),
    tile=(1, 32, 48),
    depth_bucket=1,
    slices=1,
)
RNG = np.random.default_rng(0)
LEVELS = RNG.integers(0, 60000, (40, 60)).astype(np.uint16)


def save(path: pathlib.Path, array: np.ndarray) -> pathlib.Path:
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    """X-rays of every kind, masks, and what is no X-ray."""
    eight = (LEVELS // 256).astype(np.uint8)
    save(tmp_path / "deep.png", LEVELS)
    save(tmp_path / "flat.png", eight)
    save(tmp_path / "photo.jpg", np.roll(eight, 7))
    save(tmp_path / "colour.png", np.stack([eight, eight, 255 - eight], axis=-1))
    save(tmp_path / "small.png", eight[:8])
    lesion = np.zeros((40, 60), np.uint8)
    lesion[10:20, 30:45] = 255
    save(tmp_path / "lesion.png", lesion)
    save(tmp_path / "wide.png", np.zeros((40, 61), np.uint8))
    save(tmp_path / "grey.png", eight)
    (tmp_path / "scan.nii.gz").write_bytes(b"a scan")
    (tmp_path / "series").mkdir()
    return tmp_path


def test_it_is_stretched_as_pil_does() -> None:
    """To a grey level: PIL rounds to levels after each axis."""
    eight = (LEVELS // 256).astype(np.uint8)
    for rows, columns in ((32, 48), (64, 40), (40, 60)):
        data = DataConfig(
            modality="xray",
            mask="none",
            working_size=(rows, columns),
            tile=(1, rows, columns),
            depth_bucket=1,
            slices=1,
        )
        found = xrays.prepare(eight[None] / np.float32(255), data).volume
        image = Image.fromarray(eight).resize((columns, rows), Image.Resampling.BILINEAR)
        assert found.shape == (1, rows, columns)
        assert np.abs(255 * found[0] - np.asarray(image, float)).max() <= 1


def test_a_store_holds_x_rays_of_every_format(files: pathlib.Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    sitk.WriteImage(sitk.GetImageFromArray(np.roll(LEVELS, 3)), str(files / "a.dcm"))
    inverted = (files / "a.dcm").read_bytes().replace(b"MONOCHROME2", b"MONOCHROME1")
    (files / "b.dcm").write_bytes(inverted)
    head = ",".join((*datasets.COLUMNS, *datasets.OPTIONAL))
    (files / "cases.csv").write_text(
        f"{head}\n"
        "deep,p1,train,covid-19,deep.png,lesion.png,,xray,10 30 26 46; 0 0 40 60\n"
        "photo,p2,train,cap,photo.jpg,,,,\n"
        "bright,p3,test,non-pneumonia,a.dcm,,lesion.png,xray,\n"
        "dark,p4,test,cap,b.dcm,,,xray,\n"
    )
    cases = datasets.read_cases(files / "cases.csv")
    datasets.write_cases(cases, files / "again.csv")
    assert datasets.read_cases(files / "again.csv") == cases
    assert preparation.prepare(cases, files / "out", DATA, workers=1) == []
    store = Store(files / "out" / "store", DATA)
    assert store.contents == "X-rays"
    deep, photo, bright, dark = store.cases()
    assert deep.shape == (1, 32, 48)
    assert deep.boxes == ((10, 30, 26, 46), (0, 0, 40, 60))
    assert photo.boxes == ()
    # 16 bits, of which an 8-bit image would have kept 256 levels.
    assert len(np.unique(store.read("deep", "volume"))) > 256
    lesion = store.read("deep", "lesion")[0]
    assert lesion[8:16, 24:36].all()
    assert lesion.sum() == 8 * 12
    assert bright.lung_voxels == 8 * 12
    assert [case.lesions_known for case in (deep, photo, bright)] == [True, False, True]
    volumes = [store.read(case.name, "volume") for case in (bright, dark)]
    np.testing.assert_allclose(volumes[0], 1 - volumes[1], atol=2e-5)  # a level is 1.5e-5 wide


# Each with what is said, beside the case's name.
BAD = {
    "colour.png,,,xray,": "is a colour image, an X-ray in grey expected",
    "small.png,,,xray,": "an image of 8×60 pixels, at least 16 a side expected",
    "scan.nii.gz,,,,": "a CT scan by its name, the file of an X-ray expected",
    "series,,,,": "a folder, the file of an X-ray expected",
    "deep.png,wide.png,,xray,": "lesion mask has 40×61 pixels, its X-ray 40×60",
    "deep.png,grey.png,,xray,": "levels beside 0, one expected",
    "deep.png,,grey.png,xray,": "lung mask has",
    "deep.png,,,ct,": "its modality is ct, this store's xray: prepare it with --modality=ct",
    "deep.png,,,xray,0 0 41 20": "box 0 0 41 20 reaches out of",
    "deep.png,,,xray,-1 0 20 20": "box -1 0 20 20 reaches out of",
    "deep.png,,,mri,": "modality 'mri' is unknown, expected one of ct, xray",
    "deep.png,,,xray,0 0 20": "box '0 0 20': top, left, bottom and right in pixels are expected",
    "deep.png,,,xray,20 0 20 10": "box '20 0 20 10': top, left, bottom and right",
}


def test_what_is_wrong_is_a_line_each_and_the_others_are_written(files: pathlib.Path) -> None:
    head = ",".join((*datasets.COLUMNS, *datasets.OPTIONAL))
    for i, cells in enumerate(BAD):
        name = cells.split(",", maxsplit=1)[0]
        if name == "deep.png":  # each scan once
            save(files / f"deep-{i}.png", LEVELS)
    rows = [
        f"bad-{i},p{i},train,covid-19,{cells.replace('deep.png', f'deep-{i}.png')}"
        for i, cells in enumerate(BAD)
    ]
    rows.append("good,p,train,cap,flat.png,,,xray,")
    (files / "cases.csv").write_text("\n".join([head, *rows]) + "\n")
    failures: list[str] = []
    cases = datasets.read_cases(files / "cases.csv", failures=failures)
    failures += preparation.prepare(cases, files / "out", DATA, workers=1)
    assert [case.name for case in Store(files / "out" / "store").cases()] == ["good"]
    assert len(failures) == len(BAD)
    for i, said in enumerate(BAD.values()):
        (line,) = (line for line in failures if f"bad-{i}:" in line)
        assert said in line
        assert "\n" not in line


def test_an_x_ray_in_a_store_of_ct_is_refused(files: pathlib.Path) -> None:
    data = DataConfig(working_size=(32, 48), tile=(8, 32, 48), depth_bucket=8)
    cases = [
        datasets.Case("a", "a", "train", 0, files / "deep.png"),
        datasets.Case("b", "b", "train", 0, files / "flat.png", modality="xray"),
        datasets.Case("c", "c", "train", 0, files / "scan.nii.gz", boxes=((0, 0, 9, 9),)),
    ]
    lines = preparation.prepare(cases, files / "out", data, workers=1)
    assert "a picture by its name, a CT scan expected" in lines[0]
    assert "its modality is xray, this store's ct: prepare it with --modality=xray" in lines[1]
    assert "has boxes, which are of X-rays" in lines[2]


def test_lesions_of_the_class_without_any_are_refused_and_empty_masks_are_noted(
    files: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(files / "none.png", np.zeros((40, 60), np.uint8))
    free = datasets.Case("a", "a", "train", 2, files / "deep.png", files / "lesion.png")
    empty = datasets.Case("b", "b", "train", 0, files / "flat.png", files / "none.png")
    (line,) = preparation.prepare([free, empty], files / "out", DATA, workers=1)
    assert "labelled non-pneumonia, but" in line
    assert f"note: b: its lesion mask {files / 'none.png'} is empty" in capsys.readouterr().err


def test_a_slice_of_ct_is_no_x_ray(files: pathlib.Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.GetImageFromArray(LEVELS)
    image.SetMetaData("0008|0060", "CT")
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(files / "slice.dcm"))
    writer.Execute(image)
    with pytest.raises(InputError, match=r"slice\.dcm: a slice of CT by its DICOM header"):
        xrays.load_xray(files / "slice.dcm")


def test_a_run_and_a_store_are_of_one_modality(files: pathlib.Path) -> None:
    cases = [datasets.Case("a", "a", "train", 0, files / "deep.png")]
    preparation.prepare(cases, files / "out", DATA, workers=1)
    data = DataConfig(mask="none", working_size=(32, 48), tile=(1, 32, 48), depth_bucket=1)
    with pytest.raises(InputError, match="made with modality=xray, this run says --modality=ct"):
        Store(files / "out" / "store", data)
