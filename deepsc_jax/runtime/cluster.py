"""The processes of a job: how they become one, which of them writes, and how they end together.

A job may be many processes, on one machine or many, each with its own devices; `job` makes them
one. What they compute together is in `device_mesh`. No other file names jax.distributed.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepsc_jax.runtime import failures
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import Untyped

T = TypeVar("T")
# A process that has sent no sign of life for so long is dead, and the job ends.
HEARTBEAT_SECONDS = 30
WAIT_SECONDS = 15.0  # for the other processes without a word
# Where launchers tell a process how many there are, whether JAX knows the launcher or not.
_PROCESS_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_SLURM_PORTS = 61440  # the first of the 4096 ports of which JAX takes one by the job's number


def launched() -> int:
    """How many processes SLURM or MPI started this one among."""
    return max(_number(name) or 1 for name in _PROCESS_COUNTS)


def _number(name: str) -> int | None:
    """The whole number in a variable of the environment; None where it is not set.

    Raises:
      InputError: it is something else.
    """
    text = os.environ.get(name)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise InputError(
            f"{name}={text}: expected a whole number, as a launcher sets it: unset it, or start "
            "the processes anew"
        )
    return int(text)


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
      InputError: the others do not come within 5 minutes, the port is taken, or several processes
        were started that would each train alone.
    """
    # Its handler would take SIGTERM from `signals`.
    jax.config.update("jax_enable_preemption_service", False)
    step = _slurm_step()
    if coordinator is None and step == 1:
        return 1
    joined: dict[str, Untyped] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if coordinator is not None:
        joined |= {"coordinator_address": coordinator, "cluster_detection_method": "deactivate"}
        joined |= {"num_processes": processes, "process_id": process}
    elif step is not None:
        joined |= {"num_processes": step}
    if process == 0 and coordinator is not None:
        _require_free(f"--coordinator={coordinator}", int(coordinator.rpartition(":")[2]))
    elif coordinator is None and _slurm():
        _require_slurm()
    try:
        with _said_when_it_waits(coordinator or "the place that JAX found"):
            jax.distributed.initialize(**joined)
    except (ValueError, LookupError) as error:
        if coordinator is not None or "coordinator_address" not in str(error):
            raise InputError(
                f"JAX takes no job from what its launcher says ({error}): check the launcher's "
                "variables, or give each process --coordinator=HOST:PORT, --num_processes and "
                "--process_id"
            ) from error
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
def _said_when_it_waits(place: str) -> Iterator[None]:
    """A line after a while: the others may be 5 minutes in coming, and never come."""
    joined = threading.Event()

    def say() -> None:
        if not joined.wait(WAIT_SECONDS):
            print(
                f"waiting for the other processes of the job at {place}, 5 minutes at most",
                file=sys.stderr,
                flush=True,
            )

    threading.Thread(target=say, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def _require_slurm() -> None:
    """Refuse what SLURM's variables cannot mean, and a port of process 0 that is taken."""
    job, count, index = (_number(f"SLURM_{name}") for name in ("JOB_ID", "NTASKS", "PROCID"))
    _number("SLURM_LOCALID")
    if job is None or count is None or index is None or index >= count:
        raise InputError(
            f"SLURM_PROCID={index}, SLURM_NTASKS={count}, SLURM_JOB_ID={job}: expected a process "
            "below the number of tasks, of a job: start with srun, or unset these for a process "
            "of its own"
        )
    # As JAX draws it from the job's number.
    port = _number("JAX_COORDINATOR_PORT") or _SLURM_PORTS + job % 4096
    if index == 0:
        _require_free(f"SLURM job {job}", port)


def _slurm() -> bool:
    """Whether JAX will find the processes through SLURM."""
    known = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"}
    return known <= os.environ.keys() and "OMPI_MCA_orte_hnp_uri" not in os.environ


def _slurm_step() -> int | None:
    """How many tasks SLURM's step has, where it says fewer than the job is allotted or as many.

    JAX counts the job's, and would wait 5 minutes for those that an interactive step of one task
    never starts.
    """
    said, allotted = (os.environ.get(f"SLURM_{n}") for n in ("STEP_NUM_TASKS", "NTASKS"))
    if not (said and said.isdecimal()) or launched() > int(said):  # mpirun started more in it
        return None
    if allotted and int(said) < int(allotted):
        print(
            f"SLURM has allotted {allotted} tasks and started {said} here: training with {said}; "
            "srun without --ntasks starts all",
            file=sys.stderr,
        )
    return int(said)


def _require_free(whose: str, port: int) -> None:
    """Refuse a port at which something else listens, or none can: of two, both would answer."""
    if not 0 < port < 2**16:
        raise InputError(f"{whose}: port {port} found, expected one from 1 to 65535")
    for family, host in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(
                    f"{whose}: port {port} cannot be listened at ({error.strerror}): another job "
                    "may have it; give a port of its own with --coordinator=HOST:PORT (launch/"
                    "local.sh: PORT=...; SLURM: JAX_COORDINATOR_PORT=...)"
                ) from error


def require_devices() -> None:
    """Find the devices of the platform that JAX_PLATFORMS names, or JAX chooses.

    Raises:
      InputError: there are none.
    """
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        """What JAX logs of a plugin, with a traceback, is the reason."""
        if record.exc_info and record.exc_info[1]:
            said.append(str(record.exc_info[1]))
        return record.exc_info is None

    log = logging.getLogger("jax._src.xla_bridge")
    log.addFilter(keep)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = jax.config.values["jax_platforms"] or "chosen by JAX"
        reason = [*said, str(error), "its plugin or its driver is missing"]
        refusal = next(text for text in reason if text).splitlines()[0]
        raise InputError(
            f"JAX_PLATFORMS={asked}: no such device was found ({refusal}): install the extra for "
            "it (cuda12, cuda13, tpu) where there is one, or unset JAX_PLATFORMS"
        ) from error
    finally:
        log.removeFilter(keep)


@contextlib.contextmanager
def job(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Iterator[int]:
    """`initialize`, and an end of the whole job where one of its processes fails.

    Of several processes on CPUs each has one device, or JAX_NUM_CPU_DEVICES. A process that fails
    says why in a line and goes at once, with its code of `exit_codes`: were it to wait for the
    others, as JAX does at exit, they would wait for it in the next collective.

    Raises:
      InputError: as `initialize`; where there is one process only, whatever its program raises.
    """
    count = initialize(coordinator, processes, process)
    require_devices()
    if count == 1:
        yield count
        return
    who = f"process {jax.process_index()} of {count}"
    try:
        yield count
        jax.distributed.shutdown()
    except BaseException as error:
        code = failures.report(error, f"{who}: ")
        sys.stdout.flush()
        os._exit(code)


def is_writer() -> bool:
    """Whether this is the process that writes files and prints: the first."""
    return jax.process_index() == 0


def by_process(values: np.ndarray) -> np.ndarray:
    """What every process gives, of one shape and type, stacked along a new first axis.

    As bytes: JAX would make float32 of float64.
    """
    values = np.ascontiguousarray(values)
    mine = values.reshape(-1).view(np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(mine))
    everyones = np.ascontiguousarray(everyones).reshape(jax.process_count(), mine.size)
    return everyones.view(values.dtype).reshape(len(everyones), *values.shape)


def wait_for_all(reason: str) -> None:
    """Return when every process has come here; `reason` is the same in all of them."""
    multihost_utils.sync_global_devices(reason)


def together(check: Callable[[], T]) -> T:
    """What `check` gives in this process; where it refuses in one of the job's, all refuse.

    Else the others would wait for the one that ended, find it gone, and be started again for what
    starting again does not mend.

    Raises:
      InputError: what `check` raised here, or that it did so in another process.
    """
    outcome: T | InputError
    try:
        outcome = check()
    except InputError as error:
        outcome = error
    refused = by_process(np.asarray(isinstance(outcome, InputError))).reshape(-1)
    if isinstance(outcome, InputError):
        raise outcome
    if refused.any():
        raise InputError(f"process {int(refused.argmax())} cannot go on: its own line says why")
    return outcome


def numerics() -> dict[str, str]:
    """What JAX is told by the environment of how numbers are computed, by name."""
    names = (
        "enable_x64",
        "default_matmul_precision",
        "default_prng_impl",
        "threefry_partitionable",
        "numpy_dtype_promotion",
    )
    return {f"JAX_{name.upper()}": str(jax.config.values[f"jax_{name}"]) for name in names}


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def require_same(digests: Mapping[str, str]) -> None:
    """Refuse to train on what differs among the processes of the job; in every process alike.

    Args:
      digests: by the name of a flag, a file or a package, the SHA-256 in hexadecimal of its value;
        the same names in the same order in every process of one version.

    Raises:
      InputError: names what differs, and in which processes it is not what process 0 has.
    """
    names = "\n".join(digests)
    mine = [digest(names), *digests.values()]
    # The number of rows first: arrays of two lengths cannot be gathered.
    counts = by_process(np.asarray(len(mine))).reshape(-1)
    rows = min(counts)
    sums = [np.frombuffer(bytes.fromhex(row), np.uint8) for row in mine[:rows]]
    gathered = by_process(np.stack(sums)).reshape(len(counts), rows, -1)
    other = (gathered != gathered[0]).any(-1)
    if (counts != counts[0]).any() or other[:, 0].any():
        raise InputError(
            "the processes of the job are of different versions of this program: start all of them "
            "from the same installation"
        )
    if other.any():
        differing = [
            f"{name} (process {', '.join(map(str, np.flatnonzero(other[:, i])))})"
            for i, name in enumerate(digests, start=1)
            if other[:, i].any()
        ]
        raise InputError(
            f"the processes of the job differ from process 0 in {'; '.join(differing)}: give all "
            "of them the same"
        )
