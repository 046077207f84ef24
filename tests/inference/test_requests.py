"""Which scans are predicted, how results are named, and how they are shared out."""

import os
import pathlib

import pytest

from deepsc_jax.inference import requests
from deepsc_jax.runtime.errors import InputError

DICOM = b"\0" * 128 + b"DICM"


def put(path: pathlib.Path, content: bytes = b"") -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_every_scan_below_a_folder_is_found_and_named_by_its_place(tmp_path: pathlib.Path) -> None:
    folder, out = tmp_path / "scans", tmp_path / "scans" / "predictions"
    expected = {
        "b/scan": put(folder / "b" / "scan.nii.gz"),
        "a/scan": put(folder / "a" / "scan.nii"),
        "a/series": put(folder / "a" / "series" / "slice1.DCM").parent,
        "a/unnamed": put(folder / "a" / "unnamed" / "IM0001", DICOM).parent,
        "scan.with.dots": put(folder / "scan.with.dots.nii.gz"),
    }
    put(folder / "a" / "DICOMDIR", DICOM)
    put(folder / "a" / "notes.txt", b"no DICM here")
    put(folder / "a" / "._scan.nii")
    put(folder / ".trash" / "old.nii")
    put(out / "a" / "scan" / "lesion_mask.nii.gz")
    (folder / "b" / "round").symlink_to(folder)
    linked = tmp_path / "elsewhere"
    put(linked / "scan.nii.gz")
    (folder / "linked").symlink_to(linked)
    expected["linked/scan"] = folder / "linked" / "scan.nii.gz"
    found = requests.below(folder, out).requests
    assert {request.name: request.path for request in found} == expected
    assert [request.name for request in found] == sorted(expected)


def test_a_folder_of_slices_is_named_after_itself(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "series" / "1.dcm")
    (found,) = requests.below(tmp_path / "series", tmp_path / "out").requests
    assert (found.name, found.path) == ("series", tmp_path / "series")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/scan.nii", "a/scan.nii.gz"], "would both be a/scan"),
        (["a/scan.nii.gz", "a/scan/1.dcm"], "would both be a/scan"),
        (["a/1.dcm", "a/b/2.dcm"], "would lie in a: "),
        (["readme.txt"], r"no file of \.nii, .*1 file that are no scans by their names left out"),
    ],
)
def test_results_that_would_collide_and_empty_folders_are_refused(
    tmp_path: pathlib.Path, files: list[str], message: str
) -> None:
    for name in files:
        put(tmp_path / "scans" / name)
    with pytest.raises(InputError, match=message) as raised:
        requests.below(tmp_path / "scans", tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_the_folder_of_scans_takes_no_results(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "a.nii")
    with pytest.raises(InputError, match="is the folder of the scans"):
        requests.below(tmp_path, tmp_path / "x" / "..")


def test_a_list_names_results_as_it_names_scans(tmp_path: pathlib.Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "scans.txt").write_text("b/scan.nii.gz\n\n  ./a/series/  \n/far/away.nii\n../up.nii\n")
    found = requests.listed(lists / "scans.txt").requests
    above = (tmp_path / "up").relative_to("/").as_posix()
    assert [request.name for request in found] == ["b/scan", "a/series", "far/away", above]
    assert found[0].path == lists / "b" / "scan.nii.gz"
    assert found[2].path == pathlib.Path("/far/away.nii")
    assert os.path.samefile(found[3].path.parent, tmp_path)
    (lists / "scans.txt").write_text("\n")
    with pytest.raises(InputError, match="an empty list"):
        requests.listed(lists / "scans.txt")
    with pytest.raises(InputError, match="expected a folder of scans, or a text file"):
        requests.listed(tmp_path / "absent")


def test_shares_are_disjoint_and_cover_all() -> None:
    wanted = [requests.Request(str(i), pathlib.Path(str(i))) for i in range(11)]
    shares = [requests.share(wanted, f"{i}/4") for i in range(4)]
    assert sorted((r for s in shares for r in s), key=wanted.index) == wanted
    assert [len(s) for s in shares] == [3, 3, 3, 2]
    for wrong in ("4/4", "0/0", "-1/4", "1", "a/b", "1/4/2"):
        with pytest.raises(InputError, match=f"--share={wrong}: expected I/N"):
            requests.share(wanted, wrong)


def test_scans_given_one_by_one() -> None:
    paths = [pathlib.Path("a/scan.nii.gz"), pathlib.Path("b/other.nii")]
    masks = [pathlib.Path("a/lung.nii.gz"), pathlib.Path("b/lung.nii.gz")]
    found = requests.of_paths(paths, masks)
    assert [(r.name, r.lung_mask) for r in found] == [("scan", masks[0]), ("other", masks[1])]
    with pytest.raises(InputError, match="1 given for 2 scans"):
        requests.of_paths(paths, masks[:1])
    with pytest.raises(InputError, match="would both be scan"):
        requests.of_paths([paths[0], pathlib.Path("b/scan.nii")], [])
