"""Errors that are nobody's bug, each as an exit code and a line."""

import contextlib
import errno
import logging
import os
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from types import TracebackType

import absl.logging

from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.errors import FileSystemError, InputError
from deepsc_jax.runtime.names import shown

# What XLA and JAX say when another process is gone.
_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|heartbeat|[Cc]oordination|[Bb]arrier")
_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|bad_alloc|Cannot allocate memory")
# Libraries in C++ say what the system said in words of their own: tensorstore's.
_SYSTEM = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)")
_FOLDER = "deepsc_folder"  # an attribute of an error
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "name one that you may use",
    errno.EPERM: "name one that you may use",
    errno.ESTALE: "see to the file server",
    errno.EIO: "see to the disk or the file server",
}
_LATE = "Event loop is closed"  # asyncio's word to what would still be told to a loop


def explain(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line that an error is worth; None for one of ours."""
    chain = list(_chain(error))
    folder = next((getattr(one, _FOLDER) for one in chain if hasattr(one, _FOLDER)), None)
    # A bug in the handling of bad input is a bug: what it was raised from by `from` counts alone.
    for one in _chain(error, implicit=False):
        if isinstance(one, InputError):
            failed = isinstance(one, FileSystemError)
            return exit_codes.FILE_SYSTEM if failed else exit_codes.BAD_INPUT, str(one)
    for one in chain:  # before memory: XLA's code for it also stands for a full disk
        system = _of_system(one, folder)
        if system is not None:
            return exit_codes.FILE_SYSTEM, system
    for one in chain:
        if isinstance(one, MemoryError) or _MEMORY.search(f"{type(one).__name__}: {one}"):
            return exit_codes.OUT_OF_MEMORY, (
                f"out of memory ({_first_line(one)}): give a smaller batch, a smaller --tile, "
                "--remat=all or --accumulation, or spread the work over more devices"
            )
    for one in chain:
        if type(one).__name__ == "JaxRuntimeError" and _LOST.search(str(one)):
            return exit_codes.LOST_PROCESS, (
                f"another process is gone ({_first_line(one)}): its own output says why; start the "
                "job again, it goes on from its last checkpoint"
            )
    return None


def report(error: BaseException, who: str = "") -> int:
    """Print what an error is worth on stderr, and return its exit code.

    A traceback only of what is a bug of ours.

    Args:
      error: that nobody handled.
      who: the process of the job, where there are several: `process 1 of 2: `.
    """
    explained = explain(error)
    if explained is None:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        code = exit_codes.UNCAUGHT
        line = f"{error!r}: an error of this program's: please report it with the lines above"
    else:
        code, line = explained
    with contextlib.suppress(OSError):  # standard error may be gone, and the code is what is left
        print(f"error: {who}{shown(line)}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def below(folder: pathlib.Path) -> Iterator[None]:
    """Inside of it an error that names no file, as of a write, is said to be below `folder`."""
    try:
        yield
    except Exception as error:
        setattr(error, _FOLDER, folder)
        raise


def be_quiet() -> None:
    """Let libraries raise what goes wrong and not print it as well.

    Orbax logs its internals, and every error of a save several times with its traceback, from
    threads that then raise it; what reaches the main thread is reported there.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    report_thread = threading.excepthook

    def quiet(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is None or explain(failed.exc_value) is None:
            report_thread(failed)

    threading.excepthook = quiet
    report_uncaught = sys.excepthook

    def uncaught(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        # TensorStore prints it from a thread of its own where a save ends after Orbax gave it up.
        if not (isinstance(error, RuntimeError) and str(error) == _LATE):
            report_uncaught(kind, error, trace)

    sys.excepthook = uncaught


def _chain(error: BaseException | None, *, implicit: bool = True) -> Iterator[BaseException]:
    """An error, those in a group, what it was raised from, and, if `implicit`, while what."""
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or any(one is other for other in seen):
            continue
        seen.append(one)
        yield one
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        waiting.append(one.__cause__)
        if implicit and not one.__suppress_context__:
            waiting.append(one.__context__)


def _of_system(error: BaseException, folder: pathlib.Path | None) -> str | None:
    """What the system said of which file, or below which folder, if `error` is about that."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return None
    if isinstance(error, OSError) and error.errno is not None:
        number, name = error.errno, error.filename
    else:
        said = _SYSTEM.search(str(error))
        if said is None:
            return None
        number = int(said[1] or said[2])
        quoted = re.search(r'"(/[^"]+)"|\'(/[^\']+)\'', str(error))
        name = quoted and (quoted[1] or quoted[2])
    if not isinstance(name, str | bytes):
        name = folder and f"below {folder}"
    where = f"{os.fsdecode(name)}: " if name else ""
    remedy = _REMEDIES.get(number, "see to that file or folder")
    return f"{where}{os.strerror(number)}: {remedy}, then give the same command again"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]
