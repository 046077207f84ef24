"""Which scans are predicted, how results are named, and how they are shared out."""

import importlib.util
import json
import os
import pathlib
import re

import pytest

from deepsc_jax.inference import requests
from deepsc_jax.inference.privacy import pseudonym
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
    for name, series in (
        ("a/series", put(folder / "a" / "series" / "slice1.DCM").parent),
        ("a/unnamed", put(folder / "a" / "unnamed" / "IM0001", DICOM).parent),
    ):
        expected[pseudonym(series, name)] = series
    found = requests.below(folder, out).requests
    assert {request.name: request.path for request in found} == expected
    assert [request.name for request in found] == sorted(expected)


def test_every_format_is_found_in_any_case_and_the_rest_is_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "scans"
    expected = [
        "a.NII.GZ",
        "b.Nii",
        "c.nrrd",
        "d.mha",
        "e.MHD",
        "f.img",
        "g.IMG",
        "h.nhdr",
        "i.nii",
    ]
    for name in expected:
        put(folder / name)
    put(folder / "e.MHD", b"ElementDataFile = e.zraw\n")
    for partner in ("e.zraw", "f.hdr", "g.HDR"):
        put(folder / partner)
    left_out = {
        "not scans by name": ["alone.hdr", "half.img", "notes.txt", "x/a.csv"],
        "hidden": [".hidden", ".trash", "x/._i.nii"],
        "not regular files": ["gone.nii", "pipe.nii"],
    }
    for name in [*left_out["not scans by name"], ".hidden", "x/._i.nii"]:
        put(folder / name)
    put(folder / ".trash" / "old.nii")
    os.mkfifo(folder / "pipe.nii")
    (folder / "gone.nii").symlink_to("nothing")
    found = requests.below(folder, tmp_path / "out")
    assert [request.path.name for request in found.requests] == expected
    assert [request.name for request in found.requests] == list("abcdefghi")
    assert found.left_out == 9
    for kind, names in left_out.items():
        (note,) = [note for note in found.notes if kind in note]
        assert note.startswith(f"{folder}: {len(names)} left out, {kind}: ")
        assert ("…" in note) == (len(names) > 3)
        for name in names[:3]:
            assert name in note
    assert len(found.notes) == 3


def test_half_a_pair_may_be_a_slice(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "series" / "1.img", DICOM)
    put(tmp_path / "series" / "2.img", DICOM)
    found = requests.below(tmp_path, tmp_path / "out")
    assert [r.path for r in found.requests] == [tmp_path / "series"]
    assert found.notes == ()


def test_earlier_results_are_no_scans(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "scans"
    put(folder / "scan.nii")
    facts = {"scan": "scan.nii", "made_from": {}, "files": {}}
    put(folder / "old" / "scan" / "result.json", json.dumps(facts).encode())
    put(folder / "old" / "scan" / "lesion_mask.nii.gz")
    put(folder / "other" / "result.json", b'{"of": "another program"}')
    put(folder / "other" / "scan.nii")
    found = requests.below(folder, tmp_path / "out")
    assert [request.name for request in found.requests] == ["other/scan", "scan"]
    assert f"{folder}: 1 left out, earlier results: old/scan" in found.notes


def test_without_simpleitk_its_formats_are_counted_and_the_command_shown(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.nii", "b.nrrd", "c.mha", "d.MHD", "e/1.dcm"):
        put(tmp_path / "scans" / name)
    (tmp_path / "list.txt").write_text("scans/a.nii\nscans/e\n")
    assert requests.below(tmp_path / "scans", tmp_path).notes == ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = requests.below(tmp_path / "scans", tmp_path)
    assert len(found.requests) == 5
    (note,) = found.notes
    assert note.startswith("4 of 5 scans cannot be read without SimpleITK")
    assert "(b.nrrd, c.mha, d.MHD, …): pip install 'deepsc_jax[dicom]'" in note
    (note,) = requests.listed(tmp_path / "list.txt").notes
    assert note.startswith("1 of 2 scans cannot be read")


def test_a_folder_of_slices_is_named_by_a_hash_of_its_name_and_content(
    tmp_path: pathlib.Path,
) -> None:
    names = []
    for folder, content in (("SMITH", b"1"), ("SMITH", b"2"), ("JONES", b"2")):
        put(tmp_path / folder / "1.dcm", content)
        (found,) = requests.below(tmp_path / folder, tmp_path / "out").requests
        assert found.path == tmp_path / folder
        assert re.fullmatch("dicom-[0-9a-f]{16}", found.name)
        names.append(found.name)
        (by_name,) = requests.of_paths([tmp_path / folder], [])
        assert by_name.name == found.name
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/scan.nii", "a/scan.nii.gz"], "would both be a/scan"),
        (["a.nii", "a/b.nii"], "would lie in a: "),
        (["readme.txt"], r"no file of \.nii, .*1 left out, not scans by name: readme.txt"),
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_is_read_however_it_was_saved(
    tmp_path: pathlib.Path, encoding: str, end: str
) -> None:
    lines = [
        "# scans of 2021",
        "",
        "  größe.nii.gz\t",
        "病人/scan.nii",
        "",
        "#off.nii",
        "a\u2028b.nii",
    ]
    (tmp_path / "list.txt").write_bytes(end.join(lines).encode(encoding))
    found = requests.listed(tmp_path / "list.txt").requests
    assert [request.name for request in found] == ["größe", "病人/scan", "a\u2028b"]
    assert found[0].path == tmp_path / "größe.nii.gz"


def test_a_list_of_names_that_are_no_utf8(tmp_path: pathlib.Path) -> None:
    scan = put(tmp_path / os.fsdecode("größe.nii".encode("latin-1")))
    (tmp_path / "list.txt").write_bytes("größe.nii\n".encode("latin-1"))
    (found,) = requests.listed(tmp_path / "list.txt").requests
    assert found.path.samefile(scan)


def test_in_a_list_what_is_there_decides_how_a_name_is_spelled(tmp_path: pathlib.Path) -> None:
    names = ["#1.nii", " b.nii", "c .nii", "d.nii ", "e,e.nii"]
    for name in names:
        put(tmp_path / name)
    lines = ["# a remark", "#1.nii", " b.nii", "c .nii", "d.nii ", '"e,e.nii"', "f.nii ", "#2.nii"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = requests.listed(tmp_path / "list.txt").requests
    assert [request.path.name for request in found] == [*names, "f.nii"]


def test_a_folder_that_is_linked_twice_is_counted(tmp_path: pathlib.Path) -> None:
    put(tmp_path / "scans" / "a" / "ct.nii")
    (tmp_path / "scans" / "b").symlink_to("a")
    found = requests.below(tmp_path / "scans", tmp_path / "out")
    assert [request.name for request in found.requests] == ["a/ct"]
    assert found.left_out == 1
    assert found.notes[0].endswith("1 left out, links to what is here anyway: b")


def test_a_home_folder_in_a_list(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "list.txt").write_text("~/scan.nii\n")
    (found,) = requests.listed(tmp_path / "list.txt").requests
    assert found.path == tmp_path / "home" / "scan.nii"


def test_what_is_no_list_is_refused(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    put(tmp_path / "scan.nii.gz", b"\x1f\x8b\0\0")
    put(tmp_path / "comments", b"# nothing\n")
    with (tmp_path / "vast").open("wb") as file:
        file.truncate(1 << 40)
    for name, message in {
        "fifo": "no regular file",
        "scan.nii.gz": "not a text file.*give a scan as --scan",
        "vast": "not a text file",
        "comments": "an empty list",
        "n" * 300: "cannot be read",
    }.items():
        with pytest.raises(InputError, match=message):
            requests.listed(tmp_path / name)


def test_a_name_that_is_all_suffix_is_a_name() -> None:
    (found,) = requests.of_paths([pathlib.Path("folder/.nii.gz")], [])
    assert found.name == ".nii.gz"


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
