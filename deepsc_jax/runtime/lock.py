"""One program at a time in a folder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.exit_codes import BAD_INPUT
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.signals import end

NAME = ".deepsc_jax.lock"  # no file of a user's has that name
STALE_SECONDS = 300.0  # a lease that nobody has refreshed for so long is nobody's
REFRESH_SECONDS = 60.0
_SETTLE_SECONDS = 1.0  # in which one of two that take a lease at once overwrites the other's
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """A lock that is held: what `locked` gives.

    Attributes:
      path: its file.
      what: the work that holds it.
      content: what it says, as bytes.
    """

    def __init__(self, path: pathlib.Path, what: str, descriptor: int):
        self.path, self.what, self.content = path, what, b""
        self._descriptor = descriptor

    def take(self) -> None:
        """Hold the folder.

        Raises:
          InputError: another process does.
          OSError: the file system has no locks, among other reasons.
        """
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                holder = _read(self._descriptor)
                raise InputError(_held(self.path.parent, holder, self.what)) from None
            raise
        self.content = json.dumps(_facts(self.what)).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, self.content, 0)

    def require(self) -> None:
        """Hold the folder still: the file may have been removed, and made again by another.

        Where it is gone and nobody has made it again, this does.

        Raises:
          InputError: another process has, or had, the folder.
          OSError: the folder is gone.
        """
        if self._is_there():
            return
        if os.path.lexists(self.path):
            other = _open(self.path)
            holder = _read(other)
            os.close(other)
            raise InputError(_held(self.path.parent, holder, self.what))
        self.close()
        self._descriptor = _open(self.path)
        self.take()

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._descriptor))
        except OSError:  # ESTALE too, of what another host removed
            return False

    def give_back(self) -> None:
        """Let others have the folder; an empty file is nobody's, on every file system."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # a full or a lost disk: the lock ends with the file
                os.ftruncate(self._descriptor, 0)
            self.close()

    def close(self) -> None:
        """Let go of the file, whatever it says."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


class _Lease(Lock):
    """Of a file system without locks: the thread that refreshes it looks whose it is."""

    def __init__(self, path: pathlib.Path, what: str, content: bytes):
        super().__init__(path, what, -1)
        self.content = content

    def require(self) -> None:
        """Nothing: see `_leased`."""


@contextlib.contextmanager
def locked(folder: pathlib.Path, what: str) -> Iterator[Lock]:
    """Keep `folder` to this process, in whichever way it ends: a killed holder locks nobody out.

    The lock is POSIX's on the open file `folder/NAME`, which the kernel, or the file server, gives
    back with the process. The host, the process and the time in it are text for a message. Where
    the file system has no locks, a line says so, and the file holds a lease: it is refreshed every
    minute, and nobody's after five. A POSIX lock is lost when the process closes *any* descriptor
    of the file: nothing else in it opens it. Between hosts it holds as far as the file server keeps
    locks: NFS 4 does, NFS 3 with its lock daemon, and not where it is mounted `nolock`.

    Args:
      folder: made where it is missing.
      what: the work that holds it, for the message: `training`.

    Raises:
      InputError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    held = Lock(path, what, _open(path))
    try:
        try:
            held.take()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{shown(path)}: this file system has no locks ({error.strerror}): a lease of "
                f"{STALE_SECONDS / 60:g} minutes is kept instead",
                file=sys.stderr,
            )
            with _leased(path, what) as content:
                yield _Lease(path, what, content)
            return
        yield held
        held.give_back()
    finally:
        held.close()


def _open(path: pathlib.Path) -> int:
    """The lock's file, open; a link, a pipe or a folder of that name is somebody else's."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    foreign = f"{path}: expected the file of a lock, and it is something else: move it away"
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO) and os.path.lexists(path):
            raise InputError(foreign) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(foreign)
    return descriptor


def is_seen(folder: pathlib.Path, digest: bytes, seconds: float = 60.0) -> bool:
    """Whether the lock's file in `folder` is the one whose content has that SHA-256.

    For processes that do not hold it, on other hosts: a file server shows them a new file after a
    while only.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if hashlib.sha256((folder / NAME).read_bytes()).digest() == digest:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


@contextlib.contextmanager
def _leased(path: pathlib.Path, what: str) -> Iterator[bytes]:
    """Hold `path` by a time stamp in it, which a thread refreshes; gives what it says.

    Of two that find it free at once, the one whose token is read a moment later has it.
    """
    mine = _facts(what) | {"token": secrets.token_hex(8)}
    lease = _lease(path)
    if lease and lease.get("token") and _now(path) - lease["at"] < STALE_SECONDS:
        raise InputError(_held(path.parent, lease, what))
    content = json.dumps(mine).encode()
    _replace(path, mine["token"], content)
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
        yield content
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


def _replace(path: pathlib.Path, token: str, content: bytes) -> None:
    partial = path.with_name(f"{path.name}-{token}")
    partial.write_bytes(content)
    partial.replace(path)


def _facts(what: str) -> dict:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"what": what, "host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _read(descriptor: int) -> dict:
    return _parse(os.pread(descriptor, 4096, 0))


def _parse(content: bytes) -> dict:
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
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
