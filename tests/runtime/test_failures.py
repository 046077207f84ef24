"""Errors that are nobody's bug, each as an exit code and a line."""

import errno
import os
import pathlib
import sys
import threading

import jax
import pytest

from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.errors import FileSystemError, InputError
from deepsc_jax.runtime.failures import be_quiet, below, explain


def raised(error: BaseException, *, by: BaseException | None = None) -> BaseException:
    """`error`, raised while `by` was handled."""
    try:
        if by is None:
            raise error
        try:
            raise by
        except BaseException:
            raise error  # noqa: B904 — as libraries do
    except BaseException as found:
        return found


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/state")
# As tensorstore, XLA and Orbax put it.
WRITTEN = ValueError(
    'RESOURCE_EXHAUSTED: Failed writing: "/run/d/0": Failed to write 559 bytes to file 16: '
    "No space left on device [os_error_code='28']"
)
DEVICE = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.\nBuffers: ..."
)
LOST = jax.errors.JaxRuntimeError(
    "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4431"
)
EXPLAINED = [
    (InputError("a: b"), exit_codes.BAD_INPUT, "a: b"),
    (FileSystemError("a: full"), exit_codes.FILE_SYSTEM, "a: full"),
    (FULL, exit_codes.FILE_SYSTEM, "/run/state: No space left on device: make room, then"),
    (WRITTEN, exit_codes.FILE_SYSTEM, "/run/d/0: No space left on device: make room, then"),
    (raised(RuntimeError("save"), by=FULL), exit_codes.FILE_SYSTEM, "/run/state: No space"),
    (ExceptionGroup("saves", [KeyError(1), FULL]), exit_codes.FILE_SYSTEM, "/run/state: No space"),
    (DEVICE, exit_codes.OUT_OF_MEMORY, "out of memory (RESOURCE_EXHAUSTED: Out of memory while"),
    (MemoryError(), exit_codes.OUT_OF_MEMORY, "out of memory (MemoryError): give a smaller batch"),
    (
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        exit_codes.OUT_OF_MEMORY,
        "out of memory ([Errno 12] Cannot allocate memory)",
    ),
    (LOST, exit_codes.LOST_PROCESS, "another process is gone (UNKNOWN: Gloo all-reduce failed"),
]


@pytest.mark.parametrize(("error", "code", "line"), EXPLAINED)
def test_an_error_is_a_code_and_a_line(error: BaseException, code: int, line: str) -> None:
    found = explain(error)
    assert found is not None
    assert found[0] == code
    assert found[1].startswith(line)
    assert "\n" not in found[1]


def test_a_write_without_a_name_is_below_a_folder() -> None:
    with pytest.raises(OSError, match="No space") as found, below(pathlib.Path("/run")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert explain(found.value) == (
        exit_codes.FILE_SYSTEM,
        "below /run: No space left on device: make room, then give the same command again",
    )


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("shapes"), OSError("no number")])
def test_an_error_of_ours_is_none_of_them(error: BaseException) -> None:
    assert explain(error) is None


def test_bad_input_is_what_was_raised_not_what_was_being_handled() -> None:
    bad = InputError("a: b")
    assert explain(raised(KeyError("x"), by=bad)) is None  # a bug, in the handling of it
    error = raised(RuntimeError("worker"), by=bad)
    error.__cause__ = bad  # as `raise ... from` has it
    assert explain(error) == (exit_codes.BAD_INPUT, "a: b")
    assert explain(ExceptionGroup("reads", [bad])) == (exit_codes.BAD_INPUT, "a: b")


def test_what_was_deliberately_hidden_stays_hidden() -> None:
    error = raised(KeyError("x"), by=FULL)
    error.__suppress_context__ = True
    assert explain(error) is None


def test_what_is_told_to_a_closed_loop_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    be_quiet()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("a bug of ours")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "RuntimeError: a bug of ours\n"
