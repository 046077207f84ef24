"""SIGTERM, by which schedulers say that the machine is about to be taken away."""

import collections
import signal
from types import FrameType
from typing import Any

import jax
from jax.sharding import Mesh

from deepsc_jax.runtime import device_mesh

# Steps between the question whether some process got the signal and the look at the answer. The
# answer is there by then, so that no step waits for it.
_STEPS_AHEAD = 2


class Preemption:
    """Whether any process of the job has received SIGTERM, as all of them find at the same step.

    A context, in the main thread, inside of which SIGTERM does not end the process. It needs no
    service of the cluster's: the processes ask each other on the devices, along with the steps.
    """

    def __init__(self, mesh: Mesh):
        self._received = False
        self._any_process = device_mesh.make_any_process(mesh)
        self._asked: collections.deque[jax.Array] = collections.deque()
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        # After jax.distributed has set its own handler, which this takes the place of.
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """Whether to save and end; to be called after every step, by all processes."""
        self._asked.append(self._any_process(self._received))
        return len(self._asked) > _STEPS_AHEAD and bool(self._asked.popleft())
