"""What the loop measures of its steps."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax
import numpy as np

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training.step import Scalars

# What a line of the log says of time and memory: no two runs have the same.
TIMED = (
    *("seconds_per_step", "scans_per_second", "loader_share", "voxels_per_second"),
    *("tflops_per_device", "mfu", "goodput", "peak_memory_mib"),
)


class StepClock:
    """The time of steps alone."""

    def __init__(self, step: int):
        self._begun, self._step, self._waited = time.monotonic(), step, 0.0

    def restart(self) -> None:
        """Count from now."""
        self._begun, self._waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A time in which the loop waits for a batch."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A time that does not count."""
        paused = time.monotonic()
        yield
        self._begun += time.monotonic() - paused

    def rates(self, step: int, batch: int) -> dict[str, float]:
        """Seconds of a step, scans a second, the share of waiting, since the last time."""
        passed = time.monotonic() - self._begun
        seconds, share = passed / (step - self._step), self._waited / passed
        self._begun, self._step, self._waited = time.monotonic(), step, 0.0
        return {
            "seconds_per_step": seconds,
            "scans_per_second": batch / seconds,
            "loader_share": share,
        }


def take_means(since: list[Scalars]) -> dict[str, float]:
    """The mean of every scalar of the steps since the last time; the list begins anew."""
    fetched = jax.device_get(since)
    since.clear()
    return {name: float(np.mean([scalars[name] for scalars in fetched])) for name in fetched[0]}


def require_finite(values: dict[str, float], stage: str, step: int) -> None:
    """Refuse to go on from a loss or a gradient that is not finite.

    Raises:
      InputError: naming the stage and the step.
    """
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise InputError(
                f"{stage}: {name} is {values[name]} by step {step}, a finite number expected: the "
                "last checkpoint is from before; lower the learning rate or look at the data"
            )
