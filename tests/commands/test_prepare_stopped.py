"""`prepare` that is stopped, killed, started twice or runs into a defect: it goes on."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import nibabel as nib
import numpy as np
import pytest
from preparing import DATA, FLAGS, run

from deepsc_jax.data import datasets, preparation, scans, store
from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.errors import InputError


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

    def defect(path, *arguments):
        if "train-0001" in str(path):
            raise ZeroDivisionError("of ours")
        return sound(path, *arguments)

    monkeypatch.setattr(scans, "load_mask", defect)
    cases = datasets.read_cases(phantoms / "cases.csv")[:2]
    (failure,) = preparation.prepare(cases, tmp_path, DATA, workers=1)
    assert failure.startswith("phantom-train-0001: ZeroDivisionError")


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
