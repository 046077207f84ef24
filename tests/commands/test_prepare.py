"""The program that makes a store: from phantoms, from a case list, and from bad cases."""

import dataclasses
import gzip
import hashlib
import shutil

import nibabel as nib
import numpy as np
import pytest
from preparing import DATA, SIZE, run

from deepsc_jax.config import CLASSES
from deepsc_jax.data import datasets, lungs, preparation, scans, store
from deepsc_jax.phantoms.lesions import make_phantom
from deepsc_jax.phantoms.writing import given_lungs


def test_phantoms_survive_the_way_through_files(phantoms):
    cases = datasets.read_cases(phantoms / "cases.csv")
    assert [(case.split, case.label) for case in cases] == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("test", 0),
    ]
    for case, (seed, index) in zip(cases, [(15, 0), (15, 1), (15, 2), (17, 0)], strict=True):
        made = make_phantom(seed, index, SIZE)
        scan = scans.load_scan(case.scan)
        np.testing.assert_array_equal(scan.values, made.hu)
        np.testing.assert_allclose(scan.spacing_mm, made.spacing_mm, rtol=1e-6)
        assert case.lesion_mask is not None
        assert case.lung_mask is not None
        np.testing.assert_array_equal(scans.load_mask(case.lesion_mask, scan), made.lesion_mask)
        lungs, _ = given_lungs(made, seed, index)
        np.testing.assert_array_equal(scans.load_mask(case.lung_mask, scan, "lung mask"), lungs)
    assert {given_lungs(make_phantom(15, i, SIZE), 15, i)[1] for i in range(4)} == {True, False}


def test_the_store_holds_the_masked_and_normalised_phantom(phantoms):
    opened = store.Store(phantoms / "store", DATA)
    made = make_phantom(15, 0, SIZE)
    lungs, _ = given_lungs(made, 15, 0)
    low, high = (f(np.nonzero(lungs), axis=1) for f in (np.min, np.max))
    box = tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
    expected = np.clip((made.hu + 1400.0) / 1600, 0, 1) * lungs
    record = next(c for c in opened.cases() if c.name == "phantom-train-0000")
    volume, lesion = (opened.read(record.name, name) for name in ("volume", "lesion"))
    inside = volume[:, : high[1] - low[1] + 1, : high[2] - low[2] + 1]
    np.testing.assert_allclose(inside, expected[box], rtol=0, atol=1e-5)  # a level is 1.5e-5 wide
    np.testing.assert_array_equal(inside > 0, lungs[box])
    assert record.lung_voxels == (volume > 0).sum() == lungs.sum()
    assert lesion.sum() == (made.lesion_mask & lungs).sum()
    assert not (phantoms / "store.partial").exists()


def test_the_program_makes_the_same_store_with_two_processes(phantoms, tmp_path):
    done = run(
        "--phantoms=3,0,1", "--phantom_size=48", "--seed=5", "--workers=2", f"--out={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    assert "4 of 4 cases" in done.stdout
    ours, theirs = store.Store(tmp_path / "store"), store.Store(phantoms / "store")
    for left, right in zip(ours.cases(), theirs.cases(), strict=True):
        assert left.name == right.name
        assert left.scan == tmp_path / "scans" / right.scan.name
        np.testing.assert_array_equal(
            ours.read(left.name, "volume"), theirs.read(right.name, "volume")
        )


@pytest.fixture
def case_list(phantoms, tmp_path):
    """A case list of one good case, and what is wrong with the others."""
    good, other, *_ = datasets.read_cases(phantoms / "cases.csv")
    image = scans.load_scan(other.scan)
    four = image.values.T[..., None].repeat(2, axis=-1)
    nib.Nifti1Image(four, image.affine).to_filename(tmp_path / "four.nii.gz")
    short = np.zeros(image.values[:-1].T.shape, np.uint8)
    nib.Nifti1Image(short, image.affine).to_filename(tmp_path / "short.nii.gz")
    (tmp_path / "cut.nii.gz").write_bytes(other.scan.read_bytes()[:2000])
    lines = [
        f"good,p0,train,covid-19,{good.scan},{good.lesion_mask},{good.lung_mask}",
        f"gone,p1,train,cap,{tmp_path}/gone.nii.gz,,",
        f"four,p2,train,cap,four.nii.gz,,{other.lung_mask}",
        f"cut,p3,train,cap,cut.nii.gz,,{other.lung_mask}",
        f"mask,p4,train,cap,{other.scan},short.nii.gz,{other.lung_mask}",
        f"label,p5,train,influenza,{other.scan},,{other.lung_mask}",
    ]
    path = tmp_path / "cases.csv"
    path.write_text("\n".join((",".join(datasets.COLUMNS), *lines)) + "\n")
    return path


def test_bad_cases_are_named_and_left_out_and_the_others_written(case_list, tmp_path):
    out = tmp_path / "out"
    done = run(f"--cases={case_list}", f"--out={out}")
    assert done.returncode == 1
    assert "1 of 6 cases" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "line 7: label: label 'influenza' is unknown" in errors[0]
    assert [line.split(":")[1].strip() for line in errors[1:]] == ["gone", "four", "cut", "mask"]
    assert "Traceback" not in done.stderr
    opened = store.Store(out / "store")
    assert [case.name for case in opened.cases()] == ["good"]
    assert [folder.name for folder in (out / "store/cases").iterdir()] == ["good"]
    assert sorted(path.name for path in out.iterdir()) == ["store"]

    again = run(f"--cases={case_list}", f"--out={out}", "--exclude=gone,four,cut,mask,label")
    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    again = run(
        f"--cases={case_list}", f"--out={out}", "--exclude=gone,four,cut,mask,label", "--overwrite"
    )
    assert again.returncode == 0, again.stderr


def test_no_store_is_left_where_no_case_could_be_prepared(case_list, tmp_path):
    _, *bad = datasets.read_cases(case_list, ["label"], check_files=False)
    assert len(preparation.prepare(bad, tmp_path / "out", DATA, workers=1)) == 4
    assert list((tmp_path / "out").iterdir()) == []


def test_lungs_are_found_where_no_mask_is_given(phantoms, tmp_path, monkeypatch):
    found = []

    def find(scan, intensity):
        found.append((scan.name, intensity))
        return (scan.values < -300) & (scan.values > -950)  # aerated, and no room air

    monkeypatch.setattr(lungs, "find_lungs", find)
    case = datasets.read_cases(phantoms / "cases.csv")[2]
    bare = datasets.Case("bare", "p", "test", 1, case.scan)
    assert preparation.prepare([bare], tmp_path, DATA, workers=1) == []
    (record,) = store.Store(tmp_path / "store").cases()
    assert found
    assert (record.lung_mask, record.lesions_known) == (None, False)


def test_lesions_outside_of_the_lungs_are_mentioned(phantoms, tmp_path, capsys):
    case = datasets.read_cases(phantoms / "cases.csv")[0]
    scan = scans.load_scan(case.scan)
    corner = np.zeros(scan.values.shape, np.uint8)
    corner[:4, :4, :4] = 1
    scans.save_like(corner, scan, tmp_path / "lung.nii.gz", np.uint8)
    odd = datasets.Case(
        "odd", "p", "test", 0, case.scan, case.lesion_mask, tmp_path / "lung.nii.gz"
    )
    preparation.prepare([odd], tmp_path / "out", DATA, workers=1)
    assert "odd: 100% of its lesion voxels lie outside" in capsys.readouterr().err


def test_an_empty_lesion_mask_of_pneumonia_is_mentioned(phantoms, tmp_path, capsys):
    case = datasets.read_cases(phantoms / "cases.csv")[0]
    scan = scans.load_scan(case.scan)
    empty = tmp_path / "empty.nii.gz"
    scans.save_like(np.zeros(scan.values.shape, np.uint8), scan, empty, np.uint8)
    odd = datasets.Case("odd", "p", "test", 0, case.scan, empty, case.lung_mask)
    assert preparation.prepare([odd], tmp_path / "out", DATA, workers=1) == []
    assert f"note: odd: its lesion mask {empty} is empty: check it" in capsys.readouterr().err


def test_phantom_files_are_the_same_bytes_as_ever(phantoms):
    """Of what they hold: how it is compressed is zlib's."""
    found = hashlib.sha256()
    for path in sorted((phantoms / "scans").iterdir()):
        found.update(gzip.decompress(path.read_bytes()))
    assert found.hexdigest() == "7769851a849f52b629bfbe8329c74ef7fb7f86fa9ade4c7b05581478e3760bbb"


def test_copies_of_a_scan_are_named_and_left_out(source_case, tmp_path):
    same = dataclasses.replace(source_case, name="same")
    shutil.copy(source_case.scan, tmp_path / "copy.nii.gz")
    copy = dataclasses.replace(source_case, name="copy", scan=tmp_path / "copy.nii.gz")
    image = nib.load(source_case.scan)
    nib.save(image, tmp_path / "unpacked.nii")
    unpacked = dataclasses.replace(source_case, name="unpacked", scan=tmp_path / "unpacked.nii")
    failures = preparation.prepare([source_case, same, copy, unpacked], tmp_path, DATA, workers=1)
    assert [line.split(" is the same as that of case ")[0] for line in failures] == [
        f"same: its scan {source_case.scan}",
        f"copy: its scan {copy.scan}",
        f"unpacked: its scan {unpacked.scan}",
    ]
    assert all("case own" in line and "--exclude=" in line for line in failures)
    assert [case.name for case in store.Store(tmp_path / "store").cases()] == ["own"]


def test_lesions_of_a_lesion_free_class_are_refused(source_case, tmp_path):
    odd = dataclasses.replace(source_case, label=CLASSES.index("non-pneumonia"))
    (line,) = preparation.prepare([odd], tmp_path, DATA, workers=1)
    assert odd.lesion_mask is not None
    voxels = np.count_nonzero(nib.Nifti1Image.from_filename(odd.lesion_mask).dataobj)
    assert line.startswith(
        f"own: labelled non-pneumonia, but {odd.lesion_mask} has {voxels} lesion"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 1, "--phantoms, --cases and --verify: give one of them"),
        (("--phantoms=3,1",), 1, "TRAIN,VALIDATION,TEST"),
        (("--cases=absent.csv",), 1, "absent.csv: no such case list"),
        (("--phantoms=3,1,1", "--working_size=0,5"), 2, "working_size"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, arguments, code, words):
    done = run(*arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode == code
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "out").exists()
