"""The program that makes a store: from phantoms, from a case list, and from bad cases."""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import nibabel as nib
import numpy as np
import pytest

from deepsc_jax.config import CLASSES, DataConfig
from deepsc_jax.data import datasets, lungs, preparation, records, scans, store
from deepsc_jax.evaluation import scoring
from deepsc_jax.phantoms.lesions import make_phantom
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.errors import InputError

SIZE = 48
# The store keeps the phantoms as they come, so that files and store can be compared.
DATA = DataConfig(working_size=(SIZE, SIZE), tile=(8, 24, 24), depth_bucket=8)
FLAGS = ("--working_size=48,48", "--tile=8,24,24", "--depth_bucket=8", "--workers=1")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> pathlib.Path:
    """A folder with phantoms, their case list and their store."""
    out = tmp_path_factory.mktemp("phantoms")
    cases = write_phantoms([3, 0, 1], out, seed=5, size=SIZE, workers=1)
    assert preparation.prepare(cases, out, DATA, workers=1) == []
    return out


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "deepsc_jax.prepare", *FLAGS, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


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
        np.testing.assert_array_equal(
            scans.load_mask(case.lung_mask, scan, "lung mask"), made.lung_mask
        )


def test_the_store_holds_the_masked_and_normalised_phantom(phantoms):
    opened = store.Store(phantoms / "store", DATA)
    made = make_phantom(15, 0, SIZE)
    expected = np.clip((made.hu + 1400.0) / 1600, 0, 1) * made.lung_mask
    volume = opened.read("phantom-train-0000", "volume")
    np.testing.assert_allclose(volume, expected, rtol=0, atol=1e-5)  # a level is 1.5e-5 wide
    assert not volume[~made.lung_mask].any()
    np.testing.assert_array_equal(opened.read("phantom-train-0000", "lesion"), made.lesion_mask)
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


def test_a_stopped_run_goes_on_where_it_was(phantoms, tmp_path, monkeypatch):
    cases = datasets.read_cases(phantoms / "cases.csv")[:3]
    loaded, sound = [], scans.load_scan

    def stop_at_the_second(path, *options):
        loaded.append(path)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return sound(path, *options)

    monkeypatch.setattr(scans, "load_scan", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(cases, tmp_path, DATA, workers=1)
    assert not (tmp_path / "store").exists()
    assert preparation.prepare(cases[:2], tmp_path, DATA, workers=1) == []
    assert loaded == [cases[0].scan, cases[1].scan, cases[1].scan]
    fresh = tmp_path / "fresh"
    preparation.prepare(cases[:2], fresh, DATA, workers=1)
    here, there = store.Store(tmp_path / "store"), store.Store(fresh / "store")
    assert here.cases() == there.cases()
    for case in cases[:2]:
        np.testing.assert_array_equal(
            here.read(case.name, "volume"), there.read(case.name, "volume")
        )


def test_what_was_done_is_done_again_if_it_was_made_from_something_else(phantoms, tmp_path):
    case, other = datasets.read_cases(phantoms / "cases.csv")[:2]
    narrow = dataclasses.replace(DATA, hu_window=(-1000.0, 200.0))
    partial = tmp_path / "store.partial"
    partial.mkdir()
    preparation.prepare_case(case, partial, narrow)
    preparation.prepare_case(other, partial, DATA)
    preparation.prepare([case], tmp_path, DATA, workers=1)
    volume = store.Store(tmp_path / "store").read(case.name, "volume")
    np.testing.assert_array_equal(volume, store.Store(phantoms / "store").read(case.name, "volume"))
    assert [folder.name for folder in (tmp_path / "store/cases").iterdir()] == [case.name]


def kill(when: Callable[[], bool], *arguments: str) -> int:
    """Start the program, kill it as soon as `when` holds, and wait until its workers are gone."""
    command = [sys.executable, "-m", "deepsc_jax.prepare", *FLAGS, *arguments]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: when() or program.poll() is not None)
    finally:
        program.kill()
    code = program.wait()

    def all_gone() -> bool:
        try:
            os.killpg(program.pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_for(all_gone)
    return code


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_leaves_no_process_and_goes_on(phantoms, tmp_path):
    arguments = (f"--cases={phantoms / 'cases.csv'}", f"--out={tmp_path}", "--workers=2")
    records = tmp_path / "store.partial/records"
    code = kill(lambda: any(records.glob("phantom-*.json")), *arguments)
    assert code == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in records.glob("phantom-*.json")}
    assert (
        preparation.prepare(
            datasets.read_cases(phantoms / "cases.csv"), tmp_path / "fresh", DATA, workers=1
        )
        == []
    )
    for path, written in done.items():
        assert path.stat().st_mtime_ns == written
    finished = run(*arguments)
    assert finished.returncode == 0, finished.stderr
    assert store.Store(tmp_path / "store").digest == store.Store(tmp_path / "fresh/store").digest
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"index.json", "cases"}
    assert {path.name for path in tmp_path.iterdir()} == {"store", "fresh"}


def test_two_at_once_do_not_mix(phantoms, tmp_path):
    script = (
        "import pathlib, sys; from deepsc_jax.data import preparation\n"
        "with preparation._alone(pathlib.Path(sys.argv[1])): print('held', flush=True); input()"
    )
    cases = datasets.read_cases(phantoms / "cases.csv")[:1]
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"preparation.*{other.pid}"):
            preparation.prepare(cases, tmp_path, DATA, workers=1)
        assert not (tmp_path / "store.partial").exists()
        other.kill()
    assert preparation.prepare(cases, tmp_path, DATA, workers=1) == []
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.slow
@pytest.mark.scale
def test_runs_killed_at_random_leave_no_process_and_lose_nothing(phantoms, tmp_path):
    arguments = (f"--cases={phantoms / 'cases.csv'}", f"--out={tmp_path}", "--workers=2")
    begun = time.monotonic()
    assert kill(lambda: False, *arguments) == 0
    seconds, digest = time.monotonic() - begun, store.Store(tmp_path / "store").digest
    rng = np.random.default_rng(0)
    for _ in range(20):
        begun, until = time.monotonic(), rng.uniform(0, seconds)
        kill(lambda end=begun + until: time.monotonic() > end, "--overwrite", *arguments)
        # Between two renames there is the one before beside it, and no new one yet.
        if (tmp_path / "store").exists():
            opened = store.Store(tmp_path / "store")
            assert opened.damage() == []
            assert opened.digest == digest
        else:
            assert (tmp_path / "store.replaced/index.json").exists()
    assert kill(lambda: False, "--overwrite", *arguments) == 0
    opened = store.Store(tmp_path / "store")
    assert (opened.damage(), opened.digest) == ([], digest)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_defect_in_one_case_spares_the_others(phantoms, tmp_path, monkeypatch):
    sound = scans.load_mask

    def defect(path, scan, kind):
        if "train-0001" in str(path):
            raise ZeroDivisionError("of ours")
        return sound(path, scan, kind)

    monkeypatch.setattr(scans, "load_mask", defect)
    cases = datasets.read_cases(phantoms / "cases.csv")[:2]
    (failure,) = preparation.prepare(cases, tmp_path, DATA, workers=1)
    assert failure.startswith("phantom-train-0001: ZeroDivisionError")


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


def test_a_whole_store_is_said_to_be_whole_and_damage_is_named(phantoms, tmp_path):
    shutil.copytree(phantoms / "store", tmp_path / "store")
    done = run("--verify", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "4 cases, 31 of 31 files whole" in done.stdout  # of the lesion-free one no lesion voxels

    flipped = tmp_path / "store/cases/phantom-test-0000/volume/c/0/0/0"
    content = bytearray(flipped.read_bytes())
    content[1000] ^= 4
    flipped.write_bytes(content)
    gone = tmp_path / "store/cases/phantom-train-0001/lung/c/0/0/0"
    gone.unlink()
    done = run("--verify", f"--out={tmp_path.as_uri()}")
    assert done.returncode == 1
    assert "29 of 31 files whole" in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, path, what in zip(errors, (gone, flipped), ("missing", "not as it was"), strict=True):
        assert f"{path.relative_to(tmp_path)}: {what}" in line
    (tmp_path / "store/index.json").write_bytes(b"{}")
    done = run("--verify", f"--out={tmp_path}")
    assert done.returncode == 1
    assert "index.json: version None found" in done.stderr


@pytest.fixture
def source_case(phantoms, tmp_path) -> datasets.Case:
    """A case with files of its own, in `tmp_path`/scans."""
    case = datasets.read_cases(phantoms / "cases.csv")[0]
    (tmp_path / "scans").mkdir()
    copies = (shutil.copy(path, tmp_path / "scans") for path in case.files())
    return datasets.Case("own", "p", "train", 0, *map(pathlib.Path, copies))


@pytest.mark.parametrize("kind", records.SOURCES)
def test_a_source_that_changed_or_went_missing_is_named(source_case, tmp_path, kind):
    assert preparation.prepare([source_case], tmp_path, DATA, workers=1) == []
    (record,) = store.Store(tmp_path / "store").cases()
    assert set(record.sums) == set(records.SOURCES)
    opened = store.Store(tmp_path / "store")
    assert scoring.source_case(opened, record, "hu").lesion.any()
    path = getattr(source_case, kind)
    content, before = path.read_bytes(), path.stat()
    # The same image in other bytes; what cannot be read; another image that cannot fit.
    for changed in (content + bytes(8), content[:-1], gzip.compress(b"another")):
        path.write_bytes(changed)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        words = f"own: its {kind.replace('_', ' ')} {path} has changed since it was prepared"
        with pytest.raises(InputError, match=words):
            scoring.source_case(opened, record, "hu")
    path.unlink()
    with pytest.raises(InputError, match=f"{path} is gone since it was prepared"):
        scoring.source_case(opened, record, "hu")
    path.write_bytes(content)
    assert scoring.source_case(opened, record, "hu").lesion.any()


def test_what_was_done_is_done_again_if_a_source_changed_unseen(source_case, tmp_path):
    """With size and time as they were, as after a copy that keeps them."""
    partial = tmp_path / "store.partial"
    preparation.prepare_case(source_case, partial, DATA)
    first = partial / "cases/own/lesion/c/0/0/0"
    written, lesion = first.stat().st_mtime_ns, first.read_bytes()
    preparation.prepare_case(source_case, partial, DATA)
    assert first.stat().st_mtime_ns == written

    path = source_case.lesion_mask
    assert path is not None
    before, image = path.stat(), nib.Nifti1Image.from_filename(path)
    nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine, image.header).to_filename(path)
    size = path.stat().st_size
    if size < before.st_size:  # gzip allows for zeros behind its data
        path.write_bytes(path.read_bytes() + bytes(before.st_size - size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    preparation.prepare_case(source_case, partial, DATA)
    assert first.read_bytes() != lesion


@pytest.mark.parametrize(
    "foreign",
    [
        "store.partial/notes.txt",
        "store.partial/cases/mine/scan.nii.gz",
        "store.partial/cases/phantom-train-0000/volume/mask.nii",
        "store.replaced/notes.txt",
        "store/notes.txt",
        "store/cases/phantom-train-0000/lesion/corrected.nii.gz",
    ],
)
def test_what_prepare_did_not_write_is_not_removed(phantoms, tmp_path, foreign):
    cases = datasets.read_cases(phantoms / "cases.csv")[:1]
    if foreign.startswith("store/"):
        preparation.prepare(cases, tmp_path, DATA, workers=1)
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=f"{path}: not written by prepare"):
        preparation.prepare(cases, tmp_path, DATA, workers=1, overwrite=True)
    assert path.read_text() == "mine"
    assert (tmp_path / "store").exists() == foreign.startswith("store/")


def test_a_folder_named_store_that_is_none_is_not_replaced(phantoms, tmp_path):
    cases = datasets.read_cases(phantoms / "cases.csv")[:1]
    (tmp_path / "store/cases").mkdir(parents=True)
    (tmp_path / "store/index.json").write_text("{}")
    with pytest.raises(InputError, match="store: exists and is not a store that prepare wrote"):
        preparation.prepare(cases, tmp_path, DATA, workers=1, overwrite=True)
    (tmp_path / "store/index.json").unlink()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"store\.partial: not a folder of prepare's own"):
        preparation.prepare(cases, tmp_path, DATA, workers=1)


def test_a_case_list_in_the_folder_stays_as_it_is(phantoms, tmp_path):
    cases = datasets.read_cases(phantoms / "cases.csv")
    datasets.write_cases(cases, tmp_path / "cases.csv")
    datasets.write_cases(cases[:1], tmp_path / "subset.csv")
    before = (tmp_path / "cases.csv").read_bytes()
    done = run(f"--cases={tmp_path / 'subset.csv'}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cases.csv").read_bytes() == before
    done = run("--phantoms=1,0,0", "--phantom_size=48", f"--out={tmp_path}", "--overwrite")
    assert done.returncode == 1
    assert f"{tmp_path / 'cases.csv'}: was not written here" in done.stderr
    assert (tmp_path / "cases.csv").read_bytes() == before


def test_phantoms_that_are_there_are_left_and_other_files_of_their_names_refused(tmp_path):
    write_phantoms([1, 0, 0], tmp_path, seed=5, size=SIZE, workers=1)
    files = sorted((tmp_path / "scans").iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    write_phantoms([1, 0, 0], tmp_path, seed=5, size=SIZE, workers=1)
    assert [path.stat().st_mtime_ns for path in files] == times
    corrected = tmp_path / "scans/phantom-train-0000-lesion.nii.gz"
    corrected.write_bytes(gzip.compress(b"mine"))
    content = corrected.read_bytes()
    with pytest.raises(InputError, match=f"{corrected}: exists and is another file"):
        write_phantoms([1, 0, 0], tmp_path, seed=5, size=SIZE, workers=1)
    assert corrected.read_bytes() == content


def test_phantom_files_are_the_same_bytes_as_ever(phantoms):
    """Of what they hold: how it is compressed is zlib's."""
    found = hashlib.sha256()
    for path in sorted((phantoms / "scans").iterdir()):
        found.update(gzip.decompress(path.read_bytes()))
    assert found.hexdigest() == "031444054425ebc67b0d9d40b3307a83ea69962ccb66f460b5617a013732b681"


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


def test_private_stores_name_no_patient_and_are_their_owners_alone(phantoms, tmp_path):
    rows = [
        f"{case.name},Jane DOE,train,covid-19,{case.scan},{case.lesion_mask},{case.lung_mask}"
        for case in datasets.read_cases(phantoms / "cases.csv")[:1]
    ]
    (tmp_path / "cases.csv").write_text("\n".join((",".join(datasets.COLUMNS), *rows)))
    hashed = []
    for name in ("one", "two"):
        out = tmp_path / name
        done = run(f"--cases={tmp_path / 'cases.csv'}", f"--out={out}", "--private")
        assert done.returncode == 0, done.stderr
        files = [path for path in out.rglob("*") if path.is_file()]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
        assert not any(b"Jane" in path.read_bytes() for path in files)
        assert {path.name for path in (out / "store").iterdir()} == {"index.json", "cases"}
        hashed.append(store.Store(out / "store").cases()[0].patient)
    assert hashed[0] != hashed[1]  # each store has a salt of its own


def test_scans_of_one_patient_have_one_hash_and_it_outlasts_a_stop(phantoms, tmp_path):
    cases = [
        dataclasses.replace(case, patient=patient)
        for case, patient in zip(
            datasets.read_cases(phantoms / "cases.csv"), ("P1", "p1", "p2", "p2"), strict=True
        )
    ]
    salt = tmp_path / "salt"
    one, again, other, _ = (c.patient for c in preparation._pseudonymised(cases, salt))
    assert one == again != other
    assert next(c.patient for c in preparation._pseudonymised(cases, salt)) == one


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("gs://bucket/folder", "--out=gs://bucket/folder: is an address"),
        ("{tmp}/file", "there is a file"),
        ("{tmp}/file/below", "cannot be written to"),
        ("/proc/store", "cannot be written to"),
        ("{tmp}/" + "x" * 300, "cannot be written to"),
    ],
)
def test_places_that_take_no_store_are_refused_before_the_work(phantoms, tmp_path, out, words):
    (tmp_path / "file").write_text("mine")
    done = run(f"--cases={phantoms / 'cases.csv'}", f"--out={out.format(tmp=tmp_path)}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --out")
    assert words in line
    assert done.stdout == ""


def test_a_tilde_is_the_home_folder(phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.write_cases(datasets.read_cases(phantoms / "cases.csv")[:1], tmp_path / "one.csv")
    done = run("--cases=~/one.csv", "--out=~/made")
    assert done.returncode == 0, done.stderr
    assert len(store.Store(tmp_path / "made/store").cases()) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_ends_it_in_one_line_and_keeps_what_is_done(
    phantoms, tmp_path, workers
):
    """A limit on the size of files stands for the disk: writing fails in the same call."""
    cases = f"--cases={phantoms / 'cases.csv'}"
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "runpy.run_module('deepsc_jax.prepare', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *FLAGS, cases, f"--workers={workers}", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == exit_codes.FILE_SYSTEM
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --out: {tmp_path} cannot be written to (File too large)")
    done = run(cases, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr


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
