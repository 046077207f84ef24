"""A thread that ends a process which hangs while its heartbeat goes on."""

import contextlib
import faulthandler
import pathlib
import threading
import time
from collections.abc import Iterator

from deepsc_jax.runtime.exit_codes import WATCHDOG
from deepsc_jax.runtime.signals import end


class Watchdog:
    """Ends the process with `WATCHDOG` where `seconds` pass between two calls of `beat`.

    A context. It watches from the first `beat` on, so that compiling the first step is no matter of
    its, and not inside of `paused()`. The stacks of all threads are left in
    `folder/hung-<process>.txt`.

    Args:
      seconds: 0 switches it off.
      folder: where the stacks go.
      process: which process of the job this is.
    """

    def __init__(self, seconds: float, folder: pathlib.Path, process: int = 0):
        self._seconds = seconds
        self._path = folder / f"hung-{process}.txt"
        self._beaten: float | None = None
        self._step = 0
        self._changed = threading.Condition()
        self._ended = False

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def beat(self, step: int) -> None:
        """A step has ended."""
        with self._changed:
            self._step, self._beaten = step, time.monotonic()
            self._changed.notify()

    def rest(self) -> None:
        """There are no steps until the next `beat`."""
        self._beaten = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside of it time does not count: something else than a step is done."""
        before, self._beaten = self._beaten, None
        try:
            yield
        finally:
            if before is not None:
                self.beat(self._step)

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._ended:
                    return
                beaten = self._beaten
                left = None if beaten is None else beaten + self._seconds - time.monotonic()
                if left is None or left > 0:
                    self._changed.wait(left)
                    continue
            self._bite()

    def _bite(self) -> None:
        where = f"stacks are in {self._path}"
        try:
            with self._path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            where = f"stacks could not be written to {self._path} ({error.strerror})"
        end(
            WATCHDOG,
            f"error: no step ended in {self._seconds:g} s after step {self._step} "
            f"(--step_timeout): the process hangs; {where}; the same command goes on from the last "
            "checkpoint",
        )
