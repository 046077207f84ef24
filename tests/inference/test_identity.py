"""Nobody's result passes for another's, and what a user changed or added stays."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import time
from typing import Any

import pytest
from chests import NETWORK, compute, write_chest

from deepsc_jax.inference import identity
from deepsc_jax.inference.network import Network
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.results import Outcome, attempt
from deepsc_jax.runtime.errors import InputError


@pytest.fixture
def chests(tmp_path: pathlib.Path) -> pathlib.Path:
    """`A/ct.nii` and `B/ct.nii`: other scans of equal size and time."""
    for seed, name in enumerate("AB"):
        write_chest(tmp_path / name / "ct.nii", seed=seed)
        os.utime(tmp_path / name / "ct.nii", ns=(10**18, 10**18))
    return tmp_path


def predict(
    folder: pathlib.Path,
    scan: str = "A/ct.nii",
    network: Network = NETWORK,
    *,
    overwrite: bool = False,
) -> Outcome:
    """Predict a scan with its lung mask into out/ct."""
    path = folder / scan
    request = Request("ct", path, path.parent / "lungs" / "lungs.nii.gz")
    return attempt(request, folder / "out", network, compute, overwrite=overwrite)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def other_network() -> Network:
    return dataclasses.replace(NETWORK, threshold=0.25, digest="another")


def refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.result is None
    assert outcome.error is not None
    assert len(outcome.error.splitlines()) == 1
    for part in parts:
        assert part in outcome.error


def test_a_result_says_what_it_is_of_and_what_was_written(chests: pathlib.Path) -> None:
    outcome = predict(chests)
    assert outcome.error is None
    folder = chests / "out" / "ct"
    result = json.loads((folder / "result.json").read_text())
    assert result == outcome.result
    scan, mask = chests / "A" / "ct.nii", chests / "A" / "lungs" / "lungs.nii.gz"
    assert result["scan"] == str(scan.resolve())
    assert result["sha256"] == hashlib.sha256(scan.read_bytes()).hexdigest()
    assert result["lung_mask"] == str(mask.resolve())
    assert result["lung_mask_sha256"] == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert result["notes"] == ["a stand-in"]
    for name, decimals in (("lung_ml", 2), ("lesion_ml", 2), ("lesion_share_of_lung", 4)):
        assert result[name] == round(result[name], decimals) > 0
    assert sum(result["probabilities"].values()) == pytest.approx(1, abs=2e-4)
    assert all(len(str(share)) <= 6 for share in result["probabilities"].values())
    assert set(result["files"]) == {p.name for p in folder.iterdir()} - {"result.json"}
    for name, facts in result["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_scan_of_that_name_size_and_time_is_refused(
    chests: pathlib.Path, overwrite: bool
) -> None:
    assert predict(chests, "A/ct.nii").error is None
    before = contents(chests / "out" / "ct")
    outcome = predict(chests, "B/ct.nii", overwrite=overwrite)
    refused(outcome, str(chests / "A" / "ct.nii"), str(chests / "B" / "ct.nii"), "another --out")
    os.utime(chests / "B" / "ct.nii")
    refused(predict(chests, "B/ct.nii", other_network(), overwrite=overwrite), "another --out")
    assert contents(chests / "out" / "ct") == before
    assert predict(chests, "A/ct.nii").skipped


def test_another_content_at_the_same_path_is_seen_though_size_and_time_are_equal(
    chests: pathlib.Path,
) -> None:
    scan = chests / "A" / "ct.nii"
    assert predict(chests).error is None
    with scan.open("r+b") as file:  # neither another file nor another size, and the time put back
        file.write((chests / "B" / "ct.nii").read_bytes())
    os.utime(scan, ns=(10**18, 10**18))
    refused(predict(chests), f"{scan}: its content has changed", "--overwrite")
    made = predict(chests, overwrite=True)
    assert made.result is not None
    assert made.result["sha256"] == hashlib.sha256(scan.read_bytes()).hexdigest()
    assert predict(chests).skipped


def test_a_scan_that_was_moved_or_linked_is_the_same(chests: pathlib.Path) -> None:
    assert predict(chests).error is None
    (chests / "link").symlink_to("A")
    again = predict(chests, "link/ct.nii")
    assert (again.skipped, again.notes) == (True, ())
    (chests / "A").rename(chests / "moved")
    again = predict(chests, "moved/ct.nii")
    assert again.skipped
    assert again.notes == (
        f"{chests}/moved/ct.nii: has the content of {chests}/A/ct.nii, whose result is there",
    )


def test_another_lung_mask_makes_another_result(chests: pathlib.Path) -> None:
    assert predict(chests).error is None
    mask = chests / "A" / "lungs" / "lungs.nii.gz"
    shutil.copy(mask, chests / "copy.nii.gz")
    same = Request("ct", chests / "A" / "ct.nii", chests / "copy.nii.gz")
    assert attempt(same, chests / "out", NETWORK, compute, overwrite=False).skipped
    os.utime(mask)
    assert predict(chests).skipped
    mask.write_bytes(gzip.compress(gzip.decompress(mask.read_bytes()), compresslevel=1))
    again = predict(chests)
    assert (again.skipped, again.error) == (False, None)


def test_what_a_user_put_into_a_result_survives_another_network(chests: pathlib.Path) -> None:
    assert predict(chests).error is None
    folder = chests / "out" / "ct"
    (folder / "corrected_mask.nii.gz").write_bytes(b"hours of work")
    (folder / "review").mkdir()
    (folder / "review" / "notes.txt").write_text("seen")
    for overwrite in (False, True):
        again = predict(chests, network=other_network(), overwrite=overwrite)
        assert (again.skipped, again.error) == (False, None)
        assert (folder / "corrected_mask.nii.gz").read_bytes() == b"hours of work"
        assert (folder / "review" / "notes.txt").read_text() == "seen"
    assert [p.name for p in (chests / "out").iterdir()] == ["ct"]


@pytest.mark.parametrize("name", ["lesion_mask.nii.gz", "picture.png", "result.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_a_result_that_a_user_changed_is_not_replaced(
    chests: pathlib.Path, name: str, overwrite: bool
) -> None:
    assert predict(chests).error is None
    file = chests / "out" / "ct" / name
    if name == "result.json":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"reviewed": "yes"}))
    else:
        changed = bytearray(file.read_bytes())
        changed[-1] ^= 1  # of the same size
        file.write_bytes(changed)
    before = contents(chests / "out" / "ct")
    network = NETWORK if overwrite else other_network()
    refused(predict(chests, network=network, overwrite=overwrite), f"{file}: has changed since")
    assert contents(chests / "out" / "ct") == before
    assert [p.name for p in (chests / "out").iterdir()] == ["ct"]


def test_a_change_while_it_is_predicted_is_seen_too(chests: pathlib.Path) -> None:
    assert predict(chests).error is None
    file = chests / "out" / "ct" / "lesion_mask.nii.gz"

    def edits_meanwhile(volume: Any) -> Any:
        file.write_bytes(b"corrected")
        return compute(volume)

    mask = chests / "A" / "lungs" / "lungs.nii.gz"
    request = Request("ct", chests / "A" / "ct.nii", mask)
    outcome = attempt(request, chests / "out", other_network(), edits_meanwhile, overwrite=True)
    refused(outcome, f"{file}: has changed since")
    assert file.read_bytes() == b"corrected"


def test_a_corrected_mask_does_not_make_a_finished_result_unfinished(chests: pathlib.Path) -> None:
    assert predict(chests).error is None
    file = chests / "out" / "ct" / "lesion_mask.nii.gz"
    file.write_bytes(b"corrected")
    again = predict(chests)
    assert again.skipped
    assert again.notes == (f"{file}: has changed since it was written; it stays as it is",)
    assert file.read_bytes() == b"corrected"


def test_a_missing_file_is_made_again(chests: pathlib.Path) -> None:
    assert predict(chests).error is None
    before = contents(chests / "out" / "ct")
    (chests / "out" / "ct" / "picture.png").unlink()
    assert not predict(chests).skipped
    assert contents(chests / "out" / "ct").keys() == before.keys()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"scan": "a", "made_from": {}, "files": {"lesion_mask.nii.gz": 3}}',
        b'{"scan": "a", "sha256": 1, "made_from": {}, "files": {"x": null}}',
        b'{"scan": 1, "sha256": "a", "made_from": {}, "files": {}}',
        b'{"scan": "a", "sha256": "a", "states": 1, "made_from": 1, "files": {}}',
    ],
)
def test_a_foreign_or_damaged_result_is_left_alone(chests: pathlib.Path, document: bytes) -> None:
    folder = chests / "out" / "ct"
    folder.mkdir(parents=True)
    (folder / "result.json").write_bytes(document)
    refused(predict(chests, overwrite=True), "give another --out")
    assert contents(folder) == {"result.json": document}


def test_a_link_or_a_file_in_the_place_of_a_result_is_left_alone(chests: pathlib.Path) -> None:
    assert predict(chests).error is None
    (chests / "out" / "ct").rename(chests / "elsewhere")
    (chests / "out" / "ct").symlink_to(chests / "elsewhere")
    refused(predict(chests, network=other_network()), "holds no earlier result")
    assert (chests / "out" / "ct").is_symlink()
    (chests / "out" / "ct").unlink()
    (chests / "out" / "ct").write_text("mine")
    refused(predict(chests), "holds no earlier result")
    assert (chests / "out" / "ct").read_text() == "mine"


def test_a_scan_is_not_read_again_unless_it_may_have_changed(
    chests: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[pathlib.Path] = []
    sha256 = identity.sha256
    monkeypatch.setattr(identity, "sha256", lambda path: read.append(path) or sha256(path))
    scan = chests / "A" / "ct.nii"
    mask = chests / "A" / "lungs" / "lungs.nii.gz"
    fresh = identity.identify(scan, mask)
    assert read == [mask, scan]
    assert fresh.facts()["states"] == {}  # just written: the next change may have the same time
    monkeypatch.setattr(identity, "AT_REST_NS", 0)
    time.sleep(0.05)
    first = identity.identify(scan, mask, fresh.facts()).facts()
    assert len(read) == 4
    assert len(first["states"]) == 2
    assert identity.identify(scan, mask, first).facts() == first
    assert len(read) == 4
    for change in (
        lambda: os.utime(scan),
        lambda: scan.chmod(0o600),  # its ctime alone
        lambda: shutil.copy2(shutil.move(scan, chests / "kept"), scan),  # its inode
    ):
        change()
        assert identity.identify(scan, mask, first).scan.sha256 == first["sha256"]
        assert read.pop() == scan
        first = identity.identify(scan, mask, first).facts()
        assert read.pop() == scan


def test_a_scan_that_changes_while_it_is_read_is_refused(chests: pathlib.Path) -> None:
    sources = identity.identify(chests / "A" / "ct.nii")
    sources.require_unchanged()
    with (chests / "A" / "ct.nii").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="changed while it was read"):
        sources.require_unchanged()


def test_a_folder_is_known_by_all_its_files(tmp_path: pathlib.Path) -> None:
    series = tmp_path / "series"
    series.mkdir()
    for name in ("IM2", "IM10", "im1"):
        (series / name).write_bytes(b"\0" * 128 + b"DICM" + name.encode())
    (series / ".DS_Store").write_bytes(b"of a file browser")
    (series / "sub").mkdir()
    command = "LC_ALL=C sha256sum $(LC_ALL=C ls -p | grep -v /) | sha256sum"
    said = subprocess.run(["bash", "-c", command], cwd=series, capture_output=True, check=True)
    first = identity.identify(series).scan.sha256
    assert first == said.stdout.split()[0].decode()
    (series / ".DS_Store").write_bytes(b"changed")
    assert identity.identify(series).scan.sha256 == first
    (series / "IM2").rename(series / "IM3")
    renamed = identity.identify(series).scan.sha256
    (series / "IM3").write_bytes(b"\0" * 128 + b"DICM" + b"IM4")
    assert len({first, renamed, identity.identify(series).scan.sha256}) == 3


@pytest.mark.parametrize(
    ("files", "data"),
    [
        ({"a.hdr": b"header", "a.img": b"1"}, "a.img"),
        ({"a.IMG": b"voxels", "a.HDR": b"1"}, "a.HDR"),
        ({"a.mhd": b"NDims = 3\nElementDataFile = vox els.raw\n", "vox els.raw": b"1"}, None),
        ({"a.mhd": b"ElementDataFile = LIST\r\n1.raw\r\n2.raw\r\n", "1.raw": b"1"}, "1.raw"),
        ({"a.mhd": b"ElementDataFile = %d.raw 1 2 1\n", "1.raw": b"1", "2.raw": b""}, "1.raw"),
        ({"a.nhdr": b"NRRD0004\ndata file: ./a.raw.gz\n", "a.raw.gz": b"1"}, "a.raw.gz"),
    ],
)
def test_a_header_is_known_with_its_voxels(
    tmp_path: pathlib.Path, files: dict[str, bytes], data: str | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    scan, data = tmp_path / next(iter(files)), data or list(files)[-1]
    first = identity.identify(scan).scan.sha256
    (tmp_path / data).write_bytes(b"2")
    assert identity.identify(scan).scan.sha256 != first


def test_what_is_no_file_is_refused_unopened(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "x.nii")
    (tmp_path / "link.nii").symlink_to("x.nii")
    (tmp_path / "gone.nii").symlink_to("nothing")
    (tmp_path / "series").mkdir()
    (tmp_path / "header.mhd").write_bytes(b"ElementDataFile = x.nii\n")
    os.mkfifo(tmp_path / "series" / "IM0001")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "x.nii": "is a FIFO, expected a file",
        "link.nii": "is a FIFO, expected a file",
        "header.mhd": "x.nii: is a FIFO",
        "series": "IM0001: is a FIFO",
        "gone.nii": "a link to nothing",
        "absent.nii": "no such file",
        "empty": "an empty folder",
        "x.nii/y": "cannot be looked at",
        "n" * 300: "cannot be looked at",
    }.items():
        with pytest.raises(InputError, match=message):
            identity.identify(tmp_path / name)
    with pytest.raises(InputError, match="is a device"):
        identity.identify(pathlib.Path("/dev/zero"))
