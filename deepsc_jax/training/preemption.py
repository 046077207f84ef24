"""What one process of a job was told by a signal, as all of them find at the same step."""

import collections

import jax
from jax.sharding import Mesh

from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.signals import signals

# Calls between the question whether some process got the signal and the look at the answer. The
# answer is there by then, so that no step waits for it.
_CALLS_AHEAD = 2


class Preemption:
    """Whether any process of the job has received SIGTERM or SIGINT (`runtime.signals`).

    It needs no service of the cluster's: the processes ask each other on the devices, along with
    the steps, and all must ask equally often.
    """

    def __init__(self, mesh: Mesh):
        self._any_process = device_mesh.make_any_process(mesh)
        self._asked: collections.deque[jax.Array] = collections.deque()

    def agreed(self) -> bool:
        """Whether to save and end; to be called after every step, by all processes."""
        self._asked.append(self._any_process(signals.received is not None))
        return len(self._asked) > _CALLS_AHEAD and bool(self._asked.popleft())

    def agreed_now(self) -> bool:
        """The same, waited for: where there are no further steps."""
        self._asked.clear()
        return bool(self._any_process(signals.received is not None))
