"""One program at a time in a folder."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.exit_codes import BAD_INPUT
from deepsc_jax.runtime.signals import end

NAME = ".deepsc_jax.lock"  # no file of a user's has that name
STALE_SECONDS = 300.0  # a lease that nobody has refreshed for so long is nobody's
REFRESH_SECONDS = 60.0
_SETTLE_SECONDS = 1.0  # in which one of two that take a lease at once overwrites the other's
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def locked(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Keep `folder` to this process, in whichever way it ends: a killed holder locks nobody out.

    The lock is POSIX's on the open file `folder/NAME`, which the kernel, or the file server, gives
    back with the process. The host, the process and the time in it are text for a message. Where
    the file system has no locks, a line says so, and the file holds a lease: it is refreshed every
    minute, and nobody's after five. A POSIX lock is lost when the process closes *any* descriptor
    of the file: nothing else opens it.

    Args:
      folder: made where it is missing.
      what: the work that holds it, for the message: `training`.

    Raises:
      InputError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise InputError(_held(folder, _read(descriptor), what)) from None
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{path}: this file system has no locks ({error.strerror}): a lease of "
                f"{STALE_SECONDS / 60:g} minutes is kept instead",
                file=sys.stderr,
            )
            with _leased(path, what):
                yield
            return
        _write(descriptor, _facts(what))
        yield
        os.ftruncate(descriptor, 0)  # an empty file is nobody's, on every file system
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _leased(path: pathlib.Path, what: str) -> Iterator[None]:
    """Hold `path` by a time stamp in it, which a thread refreshes.

    Of two that find it free at once, the one whose token is read a moment later has it.
    """
    mine = _facts(what) | {"token": secrets.token_hex(8)}
    lease = _lease(path)
    if lease and lease.get("token") and _now(path) - lease["at"] < STALE_SECONDS:
        raise InputError(_held(path.parent, lease, what))
    _replace(path, mine)
    time.sleep(_SETTLE_SECONDS)
    if (lease := _lease(path)).get("token") != mine["token"]:
        raise InputError(_held(path.parent, lease, what))
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):
                if (holder := _lease(path)).get("token") != mine["token"]:
                    # This process was stopped for so long that it has lost the folder.
                    end(BAD_INPUT, f"error: {_held(path.parent, holder, what)}")
                os.utime(path)

    thread = threading.Thread(target=refresh, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _lease(path).get("token") == mine["token"]:
            with path.open("w"):
                pass


def _lease(path: pathlib.Path) -> dict:
    """What the file says, and `at`, when it was last refreshed."""
    with path.open("rb") as file:
        return _parse(file.read(4096)) | {"at": os.fstat(file.fileno()).st_mtime}


def _now(path: pathlib.Path) -> float:
    """The time by the clock that stamps the files beside `path`: the file server's."""
    probe = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    with probe.open("x") as file:
        file.write("now")
        file.flush()
        now = os.fstat(file.fileno()).st_mtime
    probe.unlink()
    return now


def _replace(path: pathlib.Path, facts: dict) -> None:
    partial = path.with_name(f"{path.name}-{facts['token']}")
    partial.write_text(json.dumps(facts))
    partial.replace(path)


def _facts(what: str) -> dict:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"what": what, "host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _write(descriptor: int, facts: dict) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(facts).encode(), 0)


def _read(descriptor: int) -> dict:
    return _parse(os.pread(descriptor, 4096, 0))


def _parse(content: bytes) -> dict:
    try:
        facts = json.loads(content)
    except ValueError:
        facts = {}
    return facts if isinstance(facts, dict) else {}


def _held(folder: pathlib.Path, holder: dict, what: str) -> str:
    who = "another process"
    if {"what", "host", "pid", "since"} <= holder.keys():
        who = "{what}, process {pid} on {host} since {since},".format(**holder)
    return (
        f"{folder}: {who} holds this folder, and {what} needs it to itself: wait until it has "
        "ended, end it, or name another folder"
    )
