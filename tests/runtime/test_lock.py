"""One program at a time in a folder; a killed one locks nobody out."""

import errno
import hashlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from deepsc_jax.runtime import lock
from deepsc_jax.runtime.errors import InputError

HOLDER = """
import pathlib, sys, time
from deepsc_jax.runtime import lock
with lock.locked(pathlib.Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: pathlib.Path) -> subprocess.Popen:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_second_is_told_who_holds_the_folder_and_since_when(tmp_path: pathlib.Path) -> None:
    holder = hold(tmp_path / "run")
    try:
        with pytest.raises(InputError) as refused, lock.locked(tmp_path / "run", "training"):
            pass
    finally:
        holder.kill()
        holder.wait()
    who = rf"training, process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-"
    assert re.search(who, str(refused.value))
    assert "\n" not in str(refused.value)


def test_a_holder_killed_with_kill_9_locks_nobody_out(tmp_path: pathlib.Path) -> None:
    for _ in range(5):
        holder = hold(tmp_path)
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
        with lock.locked(tmp_path, "training"):
            pass


def test_what_the_file_says_of_a_dead_process_locks_nobody_out(tmp_path: pathlib.Path) -> None:
    for content in (b"", b"{", b"\xff\xfe[]", b"[]", b'{"token": "x", "what": "training"}'):
        (tmp_path / lock.NAME).write_bytes(content)
        with lock.locked(tmp_path, "training"):
            pass


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, and leases of a moment."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_SETTLE_SECONDS", 0.01)


def test_without_locks_a_lease_is_kept_and_said(
    tmp_path: pathlib.Path, no_locks: None, capsys: pytest.CaptureFixture
) -> None:
    with (
        lock.locked(tmp_path, "training"),
        pytest.raises(InputError, match=f"training, process {os.getpid()} on "),
        lock.locked(tmp_path, "training"),
    ):
        pass
    assert capsys.readouterr().err.count("this file system has no locks") == 2
    with lock.locked(tmp_path, "training"):  # given back
        pass
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_a_lease_is_refreshed_and_stale_after_five_minutes(
    tmp_path: pathlib.Path, no_locks: None
) -> None:
    path = tmp_path / lock.NAME
    with lock.locked(tmp_path, "training"):
        long_ago = time.time() - 1000
        os.utime(path, (long_ago, long_ago))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == long_ago:
            assert time.monotonic() < deadline, "the lease is not refreshed"
            time.sleep(0.01)
        facts = path.read_text()
    for age, held in ((299 - 30, True), (301, False)):
        path.write_text(facts)  # as a killed holder leaves it
        os.utime(path, (time.time() - age, time.time() - age))
        if held:
            with pytest.raises(InputError), lock.locked(tmp_path, "training"):
                pass
        else:
            with lock.locked(tmp_path, "training"):
                pass


def test_a_link_a_pipe_or_a_folder_of_the_locks_name_is_somebody_elses(
    tmp_path: pathlib.Path,
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")

    def link(path: pathlib.Path) -> None:
        path.symlink_to(mine)

    for name, make in (("link", link), ("pipe", os.mkfifo), ("folder", pathlib.Path.mkdir)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / lock.NAME)
        with (
            pytest.raises(InputError, match="it is something else: move it away"),
            lock.locked(tmp_path / name, "training"),
        ):
            pass
    assert mine.read_text() == "precious"


def test_a_lock_whose_file_is_removed_is_taken_anew(tmp_path: pathlib.Path) -> None:
    with lock.locked(tmp_path, "training") as held:
        held.require()
        (tmp_path / lock.NAME).unlink()
        held.require()
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        other = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
        assert f"training, process {os.getpid()} on " in other.stderr
    with lock.locked(tmp_path, "training"):
        pass


def test_who_lost_the_folder_to_another_is_told(tmp_path: pathlib.Path) -> None:
    with lock.locked(tmp_path, "training") as held:
        (tmp_path / lock.NAME).unlink()
        other = hold(tmp_path)
        try:
            with pytest.raises(InputError, match=f"training, process {other.pid} on "):
                held.require()
        finally:
            other.kill()
            other.wait()


def test_a_stopped_holder_holds(tmp_path: pathlib.Path) -> None:
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(InputError), lock.locked(tmp_path, "training"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_other_processes_see_whether_a_folder_is_the_one(tmp_path: pathlib.Path) -> None:
    with lock.locked(tmp_path, "training") as held:
        digest = hashlib.sha256(held.content).digest()
        assert lock.is_seen(tmp_path, digest, 0)
        assert not lock.is_seen(tmp_path / "elsewhere", digest, 0)
