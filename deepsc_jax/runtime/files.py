"""Files and folders that appear whole or not at all, and never in place of a user's own.

What is written lies beside its place under a random name that nobody else has (`O_EXCL`), is
brought to the disk, and is renamed. A rename replaces what has the name, so a link that was planted
there is replaced, and never followed.
"""

import contextlib
import errno
import filecmp
import glob
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator

from deepsc_jax.runtime.errors import FileSystemError, InputError
from deepsc_jax.runtime.types import JsonValue

# Before the name of what is written and replaced. Hidden: what a killed process leaves is no scan.
PARTIAL, _REPLACED = ".partial", ".replaced"
FAILING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)
"""What the system says where a disk is full or fails, or a file server went away."""

_LONGEST = 200  # bytes of a name that still leave room for what is put before it, of 255


@contextlib.contextmanager
def aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new, empty file beside `path` to write to; renamed to it at the end, removed on failure.

    What has the name is replaced: see `own` for files that may be a user's.
    """
    partial = _beside(PARTIAL, path)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield partial
        # What is in a folder that is written aside goes to the disk with it.
        alone = not any(part.startswith(f"{PARTIAL}-") for part in path.parent.parts)
        if alone:
            _to_disk(partial)
        _rename(partial, path)
        if alone:
            _to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(
    path: pathlib.Path, ours: Callable[[pathlib.Path], Collection[str]] | None = None
) -> Iterator[pathlib.Path]:
    """A new folder to fill, beside `path`; it takes the place of what is at `path` at the end.

    Of several processes that do so at once, each fills its own. The first to end removes what the
    others have beside `path`: it is what killed ones left there, or else will not be needed.

    Args:
      path: of the folder.
      ours: called with `path` at the end, where something is there: the names of the files in it
        that may go; all else is carried over. It may raise to keep everything as it is. None: only
        an empty folder is replaced.

    Raises:
      FileExistsError: something is at `path` that `ours` does not name and the new folder has too,
        or it is no folder.
    """
    partial, replaced = _beside(PARTIAL, path), _beside(_REPLACED, path)
    partial.mkdir(parents=True)
    names: Collection[str] = ()
    try:
        yield partial
        new = {file.name for file in partial.iterdir()}
        for file in partial.rglob("*"):
            _to_disk(file)
        while True:
            if ours is not None and os.path.lexists(path):
                names = ours(path)
                _carry(path, partial, names, new)
            _to_disk(partial)
            try:
                _rename(partial, path)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or ours is None:
                    raise
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                _rename(path, replaced)
        _to_disk(path.parent)
    except BaseException:
        put_back(path)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for left in _left(_REPLACED, path):
        if path.is_dir():  # or else another process is between its renames, and needs it
            _discard(left, path, names)
    for left in _left(PARTIAL, path):
        shutil.rmtree(left, ignore_errors=True)


def put_back(path: pathlib.Path) -> None:
    """Rename the folder that had the place of `path` back, where a replacement was killed midway.

    Between the two renames of `folder_aside` nothing is at `path`, and the earlier folder, with
    what a user may have put there, beside it.
    """
    if os.path.lexists(path):
        return
    for left in _left(_REPLACED, path):
        with contextlib.suppress(OSError):  # another process was faster
            _rename(left, path)
            return


@contextlib.contextmanager
def own(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """As `aside`, for a file that is replaced only while it is as this function left it.

    Its sum is kept beside it, in PATH.sha256, as `sha256sum` writes it.

    Raises:
      InputError: what is at `path` was written or changed by somebody else.
    """
    with aside(path) as partial:
        yield partial
        earlier = require_own(path)
        now = sha256(partial)
        # Both: whenever a process is killed, what is at `path` is known for its own.
        _write_sums(path, [now] if earlier is None else [now, earlier])
    if earlier is not None:
        _write_sums(path, [now])


def require_own(path: pathlib.Path) -> str | None:
    """The SHA-256 of the file at `path`, which `own` wrote; None where there is none.

    Raises:
      InputError: it was written or changed by somebody else.
    """
    foreign = "was not written here or has been changed since, and is not overwritten: move it "
    if not _are_sums(_sums_of(path), path):
        raise InputError(f"{_sums_of(path)}: {foreign}elsewhere")
    if not os.path.lexists(path):
        return None
    if path.is_file() and not path.is_symlink():
        digest = sha256(path)
        with contextlib.suppress(OSError):
            if digest.encode() in _sums_of(path).read_bytes().split():
                return digest
    raise InputError(f"{path}: {foreign}elsewhere, or name another folder")


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(flag: str, text: str) -> pathlib.Path:
    """The path that an option `--flag` names; a `~` at its start, which no shell saw, is expanded.

    Raises:
      InputError: it is empty, or an address such as gs://bucket/folder.
    """
    if not text:
        raise InputError(f"--{flag}: is empty, expected a path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise InputError(
            f"--{flag}={text}: is an address, expected a path on this machine: mount the bucket, "
            "or copy to and from a local folder"
        )
    return pathlib.Path(os.path.expanduser(text))


def require_writable(flag: str, folder: pathlib.Path) -> None:
    """Make `folder`, of an option `--flag`, where it is missing, and write to it.

    Raises:
      InputError: nothing can be written there; FileSystemError: since the disk is full or fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk takes empty files
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = "there is a file" if isinstance(error, FileExistsError) else error.strerror
        kind = FileSystemError if error.errno in FAILING else InputError
        raise kind(
            f"--{flag}: {folder} cannot be written to ({reason}): name another folder"
        ) from error


def write_json(document: JsonValue, path: pathlib.Path) -> None:
    """Write strict JSON; None stands for what is not a number.

    Raises:
      ValueError: the document holds NaN or an infinity.
    """
    with aside(path) as partial:
        partial.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")


def write_own_json(document: JsonValue, path: pathlib.Path) -> None:
    """As `write_json`, where what is there is replaced only while it is as this left it (`own`).

    Raises:
      InputError: what is at `path` was written or changed by somebody else.
    """
    with own(path) as partial:
        write_json(document, partial)


def _name_beside(path: pathlib.Path) -> str:
    """The name of `path`, or what stands for one too long to have anything before it."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST:
        return path.name
    return hashlib.sha256(name).hexdigest()[:32] + "".join(path.suffixes[-2:])[-16:]


def _beside(kind: str, path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{kind}-{secrets.token_hex(4)}-{_name_beside(path)}")


def _left(kind: str, path: pathlib.Path) -> list[pathlib.Path]:
    """What processes that were killed, or are at it, have beside `path`."""
    pattern = f"{kind}-{'[0-9a-f]' * 8}-{glob.escape(_name_beside(path))}"
    return [left for left in path.parent.glob(pattern) if left.is_dir() and not left.is_symlink()]


def _rename(source: pathlib.Path, target: pathlib.Path) -> None:
    """Rename, also where the file system says it failed because it was told twice.

    A request to an NFS server that is sent again after a lost answer finds the source gone.
    """
    before = os.lstat(source)
    try:
        os.replace(source, target)
    except FileNotFoundError:
        try:
            after = os.lstat(target)
        except OSError:
            after = None
        if after is None or (after.st_dev, after.st_ino) != (before.st_dev, before.st_ino):
            raise


def _to_disk(path: pathlib.Path) -> None:
    """Have a file's content, or a folder's names, outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some have it for files alone
            raise
    finally:
        os.close(handle)


def _carry(
    earlier: pathlib.Path, partial: pathlib.Path, ours: Collection[str], new: Collection[str]
) -> None:
    """Link (or copy) into `partial` all that is in `earlier` but not `ours`."""
    if earlier.is_symlink() or not earlier.is_dir():
        raise FileExistsError(errno.EEXIST, "exists and is no folder", str(earlier))
    for entry in earlier.iterdir():
        target = partial / entry.name
        if entry.name in ours:
            continue
        if entry.name in new:
            raise FileExistsError(errno.EEXIST, "exists and was not written here", str(entry))
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(target, ignore_errors=True)  # of an earlier round
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            target.unlink(missing_ok=True)
            _link(entry, target)


def _link(source: str | pathlib.Path, target: str | pathlib.Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _discard(replaced: pathlib.Path, path: pathlib.Path, ours: Collection[str]) -> None:
    """Remove from a replaced folder what is `ours` or also in `path`, and it if that is all."""
    for here, folders, files in os.walk(replaced, topdown=False):
        folder = pathlib.Path(here)
        for name in files:
            file = folder / name
            place = path / file.relative_to(replaced)
            with contextlib.suppress(OSError):
                if (folder == replaced and name in ours) or _same(file, place):
                    file.unlink()
        for name in folders:
            link = folder / name
            with contextlib.suppress(OSError):
                if link.is_symlink() and _same(link, path / link.relative_to(replaced)):
                    link.unlink()
        with contextlib.suppress(OSError):  # something is left in it, and stays
            folder.rmdir()


def _same(file: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether both are one file, or links to one place, or files of one content."""
    if file.is_symlink() or other.is_symlink():
        return os.readlink(file) == os.readlink(other)
    return os.path.samefile(file, other) or filecmp.cmp(file, other, shallow=False)


def _sums_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.sha256")


def _are_sums(sums: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether `sums` is absent or holds sums of the file of that name, and nothing else."""
    if not os.path.lexists(sums):
        return True
    line = rb"[0-9a-f]{64}  " + re.escape(os.fsencode(path.name)) + rb"\n"
    try:
        regular = stat.S_ISREG(os.lstat(sums).st_mode)
        return regular and re.fullmatch(b"(%b)+" % line, sums.read_bytes()) is not None
    except OSError:
        return False


def _write_sums(path: pathlib.Path, sums: Collection[str]) -> None:
    with aside(_sums_of(path)) as partial:
        name = os.fsencode(path.name)
        partial.write_bytes(b"".join(b"%b  %b\n" % (each.encode(), name) for each in sums))
