"""A trace of some steps of a stage, which xprof opens."""

import contextlib
import pathlib
from collections.abc import Callable

import jax

from deepsc_jax.runtime.types import PyTree


class Trace:
    """Traces the steps from `steps[0]` to `steps[1]`, both included, into `folder`.

    A run that goes on from within them traces those that are left.
    """

    def __init__(
        self, folder: pathlib.Path, steps: tuple[int, int] | None, say: Callable[[str], None]
    ):
        self._folder, self._steps, self._say = folder, steps, say
        self._running = False

    def begin(self, step: int) -> contextlib.AbstractContextManager:
        """Called before a step; what it returns is to be open while the step is called."""
        if self._steps is None:
            return contextlib.nullcontext()
        first, last = self._steps
        if first <= step <= last and not self._running:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        if not self._running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, state: PyTree) -> None:
        """Called after a step, with what it made."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()
            self._say(f"steps to {step} are traced: xprof --logdir={self._folder}")

    def close(self) -> None:
        """End a trace that is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
