"""What XLA compiled, kept on disk: entries are whole or absent, checked, and few enough.

JAX's own cache writes in place and never replaces an entry, so that one cut by a kill or a full
disk costs a warning and a compilation at every start; its bound needs a further package, and fails
for good once an entry's second file, with the time of its last use, is missing. `install` puts this
one in its place. Names of entries and what is in them stay JAX's, but for a sum at the end.
"""

import contextlib
import hashlib
import os
import pathlib
import secrets
import sys
import time

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

MOST_BYTES = 10 * 2**30
_SUFFIX = "-cache"
_MARK = b"sha256:"
_PARTIAL = "partial"
_ABANDONED_SECONDS = 3600  # after which nobody writes a file any more


class CompilationCache(CacheInterface):
    """Compiled programs in a folder, a file each; where they are too many, the longest unused go.

    A process that cannot write there, or no more, says so in one line and reads on.

    Args:
      folder: made where it is missing.
      most_bytes: all entries together; None for no bound.
    """

    def __init__(self, folder: pathlib.Path, most_bytes: int | None = MOST_BYTES):
        self._path = self.path = folder
        self._most_bytes = most_bytes
        self._writable = self._readable = True
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is read here is run
        except OSError as error:
            self._give_up(error)

    def get(self, key: str) -> bytes | None:
        """What was kept under `key`; None where there is nothing, or what there is is damaged."""
        path = self._entry(key)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if self._readable:
                print(f"{path}: cannot be read ({error.strerror}): compiled anew", file=sys.stderr)
            self._readable = False  # once for all of them
            return None
        value = _checked(content)
        if value is None:
            print(f"{path}: a damaged compiled program: removed, compiled anew", file=sys.stderr)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # when it was last used
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keep `value` under `key`: written aside, then renamed."""
        size = len(value) + len(_MARK) + hashlib.sha256().digest_size
        if not self._writable or (self._most_bytes is not None and size > self._most_bytes):
            return
        partial = self.path / f"{_PARTIAL}-{secrets.token_hex(8)}"
        try:
            with partial.open("xb") as file:
                file.write(value)
                file.write(_MARK + hashlib.sha256(value).digest())
            partial.replace(self._entry(key))
            self._evict()
        except OSError as error:
            self._give_up(error)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _entry(self, key: str) -> pathlib.Path:
        return self.path / f"{key}{_SUFFIX}"

    def _give_up(self, error: OSError) -> None:
        self._writable = False
        print(
            f"{self.path}: compiled programs cannot be kept here ({error.strerror}): the next "
            "start compiles again; JAX_COMPILATION_CACHE_DIR names another folder",
            file=sys.stderr,
        )

    def _evict(self) -> None:
        """Remove what killed processes left, and what was used least recently beyond the bound."""
        for partial in self.path.glob(f"{_PARTIAL}-*"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                    partial.unlink()
        if self._most_bytes is None:
            return
        programs = []
        for path in self.path.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                about = path.stat()
                programs.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in programs)
        for _, size, path in sorted(programs):
            if total <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _checked(content: bytes) -> bytes | None:
    """An entry without its sum; None where it is damaged. One that JAX wrote itself has none."""
    end = len(content) - hashlib.sha256().digest_size
    value = content[: end - len(_MARK)]
    if end >= len(_MARK) and content[end - len(_MARK) : end] == _MARK:
        return value if hashlib.sha256(value).digest() == content[end:] else None
    try:
        compilation_cache.decompress_executable(content)
    except Exception:  # of zlib, or of one of two packages for zstd
        return None
    return content


_jax_opens = compilation_cache.get_file_cache


def install(own: str | None) -> None:
    """Let JAX use `CompilationCache` wherever its cache is a folder.

    Args:
      own: the folder that is ours alone, where `MOST_BYTES` is the bound unless
        JAX_COMPILATION_CACHE_MAX_SIZE is set. Elsewhere there is none but that.
    """

    def opened(path: str) -> tuple[CacheInterface, str] | None:
        if "://" in path or jax.config.values["jax_compilation_cache_check_contents"]:
            return _jax_opens(path)
        most = jax.config.values["jax_compilation_cache_max_size"]
        bound = (MOST_BYTES if path == own else None) if most < 0 else most
        return CompilationCache(pathlib.Path(path), bound), path

    compilation_cache.get_file_cache = opened
