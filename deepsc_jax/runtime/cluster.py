"""The processes of a job: how they become one, which of them writes, and how they end together.

A job may be many processes, on one machine or many, each with its own devices; `job` makes them
one. What they compute together is in `parallel`. No other file names jax.distributed.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from deepsc_jax.runtime.errors import InputError

# A process that has sent no sign of life for so long is dead, and the job ends.
HEARTBEAT_SECONDS = 30
# Where launchers tell a process how many there are, whether JAX knows the launcher or not.
_PROCESS_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
# What XLA and JAX say when another process is gone.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "heartbeat", "oordination", "arrier")


def launched() -> int:
    """How many processes SLURM or MPI started this one among."""
    return max(int(os.environ.get(name) or 1) for name in _PROCESS_COUNTS)


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> int:
    """Join the other processes of the job; call before all else of JAX, in every process.

    Without arguments JAX finds them by itself under SLURM, Open MPI, Kubernetes (extra `k8s`) and
    on Cloud TPU; where it finds none, this process is alone.

    Args:
      coordinator: host:port at which process 0 listens for the others.
      processes: their number.
      process: which one this is, from 0.

    Returns:
      The number of processes.

    Raises:
      InputError: the others do not come within 5 minutes, or several processes were started that
        would each train alone.
    """
    try:
        if coordinator is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        else:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except ValueError as error:
        if coordinator is not None or "coordinator_address" not in str(error):
            raise
        if launched() > 1:
            raise InputError(
                f"{launched()} processes were started by a launcher that JAX does not know: give "
                "each --coordinator=HOST:PORT, --num_processes and --process_id"
            ) from error
        return 1
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--coordinator={coordinator or 'found by JAX'}: the processes of the job did not find "
            f"each other ({str(error).splitlines()[0]}): see that all are started and reach it"
        ) from error
    return jax.process_count()


@contextlib.contextmanager
def job(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[int]:
    """`initialize`, and an end of the whole job where one of its processes fails.

    Of several processes on CPUs each has one device, or JAX_NUM_CPU_DEVICES. A process that fails
    says why in a line and goes at once: were it to wait for the others, as JAX does at exit, they
    would wait for it in the next collective.

    Raises:
      InputError: as `initialize`; where there is one process only, whatever its program raises.
    """
    count = initialize(coordinator, processes, process)
    if count == 1:
        yield count
        return
    who = f"process {jax.process_index()} of {count}"
    try:
        yield count
        jax.distributed.shutdown()
    except BaseException as error:
        if isinstance(error, InputError):
            print(f"error: {who}: {error}", file=sys.stderr)
        elif (reason := _lost_process(error)) is not None:
            print(
                f"error: {who}: another process is gone ({reason}): its own output says why; start "
                "the job again, it goes on from its last checkpoint",
                file=sys.stderr,
            )
        else:
            traceback.print_exc()
            print(f"error: {who}: {error!r}: the job ends", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _lost_process(error: BaseException | None) -> str | None:
    """What XLA or JAX says of a lost process, if that is behind `error`."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and any(s in str(error) for s in _LOST):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def is_writer() -> bool:
    """Whether this is the process that writes files and prints: the first."""
    return jax.process_index() == 0


def by_process(values: np.ndarray) -> np.ndarray:
    """What every process gives, of one shape, stacked along a new first axis."""
    return np.asarray(multihost_utils.process_allgather(values))


def wait_for_all(reason: str) -> None:
    """Return when every process has come here; `reason` is the same in all of them."""
    multihost_utils.sync_global_devices(reason)


def define_flags() -> None:
    """Define the flags by which the processes of one job find each other."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "host:port at which process 0 listens for the others. Not needed under SLURM, Open MPI, "
        "Kubernetes and on Cloud TPU, where JAX finds out, nor for one process.",
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the job.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)

    @flags.multi_flags_validator(
        ["coordinator", "num_processes", "process_id"],
        "--coordinator=HOST:PORT, --num_processes and --process_id, below it, belong together",
    )
    def _(values: dict[str, Any]) -> bool:
        address, count, index = values.values()
        if address is None:
            return count is None and index is None
        port = address.rpartition(":")[2]
        return port.isdecimal() and None not in (count, index) and index < count
