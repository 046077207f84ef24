"""SIGTERM, SIGHUP and SIGINT: what a program that trains does on them, from first line to last.

Imports nothing but the standard library: it is entered before JAX is imported. A thread listens:
the main thread's handlers Python would not run before a compilation of minutes ends.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from deepsc_jax.runtime.exit_codes import INTERRUPTED, PREEMPTED

# SIGHUP: the terminal, or the connection to it, is gone.
CODES = {
    signal.SIGTERM: PREEMPTED,
    signal.SIGHUP: PREEMPTED,
    signal.SIGINT: INTERRUPTED,
}


class Signals:
    """What this process was sent, and what it does about it.

    While there is nothing to save, SIGTERM and SIGHUP end the process at once with `PREEMPTED` and
    SIGINT with `INTERRUPTED`, after a line. Inside of `heeded()` the first is noted, for the
    program to save and end when it can, and a second SIGINT ends the process at once; a second of
    the others changes nothing, since schedulers send them repeatedly.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.what = "start-up"
        self._heeded = False
        self._listening = False
        self._lock = threading.Lock()

    @property
    def told(self) -> str:
        """Who said that the job is to save and end."""
        if self.received is None:
            return "another process of the job was told to stop"
        return self.received.name

    @property
    def code(self) -> int:
        """With which code a process ends that has saved its work, on whichever it was sent."""
        return CODES[self.received or signal.SIGTERM]

    def listen(self) -> None:
        """Hear these signals; in the main thread, and again after a library took them over.

        What the process was started to ignore stays ignored: a shell's background jobs share the
        terminal, and its Ctrl-C is the shell's to pass on.
        """
        if not self._listening:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(
                target=self._serve, args=(reader,), name="signals", daemon=True
            ).start()
            os.register_at_fork(before=hold, after_in_parent=_let_go, after_in_child=_forget)
            self._listening = True
        for number in CODES:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _heard)
        _let_go()

    @contextlib.contextmanager
    def heeded(self, what: str) -> Iterator[None]:
        """Inside of it there is something to save, which the program does on `received`."""
        with self._lock:
            before = self.what, self._heeded
            self.what, self._heeded = what, True
        try:
            yield
        finally:
            with self._lock:
                self.what, self._heeded = before

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Inside of it there is nothing to save; a line says that the signal came during `what`."""
        before, self.what = self.what, what
        try:
            yield
        finally:
            self.what = before

    def _serve(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                # Else the program has a handler of its own.
                if number in CODES and signal.getsignal(number) is _heard:
                    self._received(signal.Signals(number))

    def _received(self, number: signal.Signals) -> None:
        with self._lock:  # so that what begins to be heeded now is not ended
            again = self.received is not None
            if number == signal.SIGINT or not again:
                self.received = number
            if not self._heeded:
                end(CODES[number], f"{number.name} during {self.what}: nothing to save; {_AGAIN}")
            elif again and number == signal.SIGINT:
                end(INTERRUPTED, f"SIGINT again during {self.what}: ended at once; {_AGAIN}")


_AGAIN = "the same command goes on from the last checkpoint, if there is one"
signals = Signals()


def _heard(_number: int, _frame: FrameType | None) -> None:
    """The thread acts, which the C handler of any signal with a Python handler wakes."""


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)


def _forget() -> None:
    """In a forked child: else what it is sent, from its first moment on, its parent would hear."""
    signal.set_wakeup_fd(-1)
    for number in CODES:
        if signal.getsignal(number) is _heard:
            python = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, python)
    _let_go()


def hold() -> None:
    """Keep these signals pending until `listen`, over an `exec` too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, CODES)


def end(code: int, line: str) -> None:
    """End this process at once, from any thread, after a line on stderr."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)
