"""Many scans through one network: files are read and written beside it, so that it need not wait.

Each worker process takes one scan at a time from its file to its result (`results.attempt`), and
asks this process for the one thing it cannot do: to compute the network. What the network sees and
says is in memory that both see; a scan at its full resolution never leaves its worker, and there
are no more scans in memory than workers. Here a thread attends to each worker, and the device
computes one scan at a time. Processes, since finding lungs and drawing pictures would keep other
threads of a process from running for about half of the time.
"""

import contextlib
import dataclasses
import functools
import mmap
import os
import pathlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from multiprocessing import get_context, reduction
from multiprocessing.connection import Connection
from typing import Protocol, TypedDict

import numpy as np

from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference.failures import told
from deepsc_jax.inference.network import Network
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.results import Compute, Outcome, attempt
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.names import shown


class Predicts(Protocol):
    """What is asked of a trained network here: see `inference.Predictor`."""

    @property
    def network(self) -> Network:
        """What results say of it."""
        ...

    def __call__(self, volume: np.ndarray, /) -> Prediction:
        """Predict one preprocessed scan."""
        ...


class _Options(TypedDict):
    """With what every scan is attempted."""

    out: pathlib.Path
    network: Network
    overwrite: bool
    allow: Collection[str]


class BatchInference:
    """Predicts scans into folders below `out`, several at a time.

    Attributes:
      busy_seconds: how long the network took, from volume to result, compiling included.
      first_seconds: of these, on the first scan of each shape, for which it compiles.
      voxels: of the scans after the first of their shape.

    Args:
      predictor: the network.
      out: the folder of results.
      workers: processes that read and write (Linux only); 0 for none, one scan after the other.
      overwrite: whether to predict scans again whose result is there.
      allow: doubts about scans (`source.KINDS`) that become notes of their results.
    """

    def __init__(
        self,
        predictor: Predicts,
        out: pathlib.Path,
        *,
        workers: int,
        overwrite: bool,
        allow: Collection[str] = (),
    ):
        self.busy_seconds = self.first_seconds = 0.0
        self.voxels = 0
        self._shapes: set[tuple[int, ...]] = set()
        self._predictor, self._count = predictor, workers
        self._options = _Options(
            out=out, network=predictor.network, overwrite=overwrite, allow=allow
        )
        self._device = threading.Lock()
        self._stopped = threading.Event()
        self._news: queue.SimpleQueue[Outcome | BaseException | _End | _Stop] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        self._changing = threading.Lock()  # the set of workers

    def stop(self) -> None:
        """Begin no other scan, and drop those that are still being read; for signal handlers too.

        What the device has begun with is finished.
        """
        self._stopped.set()
        self._news.put(_Stop())

    def outcomes(self, requests: Sequence[Request]) -> Generator[Outcome]:
        """What becomes of each request, as it is known; of those that `stop` leaves, nothing.

        Raises:
          InputError: a worker process cannot be started.
        """
        if self._count == 0:
            for request in requests:
                if self._stopped.is_set():
                    return
                yield attempt(request, compute=self._compute, **self._options)
            return
        todo: queue.SimpleQueue[Request] = queue.SimpleQueue()
        for request in requests:
            todo.put(request)
        threads = [
            threading.Thread(target=self._attend, args=(todo,), daemon=True)
            for _ in range(self._count)
        ]
        for thread in threads:
            thread.start()
        ended = 0
        try:
            while ended < len(threads):
                news = self._news.get()
                if isinstance(news, Outcome):
                    yield news
                elif isinstance(news, _End):
                    ended += 1
                elif isinstance(news, _Stop):
                    self._kill(lambda worker: not worker.computed)
                elif not self._stopped.is_set():
                    raise news
        finally:
            self._stopped.set()
            self._kill(lambda _: True)
            for thread in threads:
                thread.join()

    def _compute(self, volume: np.ndarray, worker: "_Worker | None" = None) -> Prediction:
        with self._device:
            if worker is not None:
                if self._stopped.is_set():
                    raise _DroppedError
                worker.computed = True
            begun = time.monotonic()
            try:
                return self._predictor(volume)
            finally:
                seconds = time.monotonic() - begun
                self.busy_seconds += seconds
                if volume.shape in self._shapes:
                    self.voxels += volume.size
                else:
                    self._shapes.add(volume.shape)
                    self.first_seconds += seconds

    def _attend(self, todo: "queue.SimpleQueue[Request]") -> None:
        """What a thread does: start a worker, and see requests through it while there are any."""
        worker = None
        try:
            while not self._stopped.is_set():
                try:
                    request = todo.get_nowait()
                except queue.Empty:
                    break
                worker = worker or self._start()
                if worker is None:
                    break
                try:
                    outcome = worker.see_through(
                        request, functools.partial(self._compute, worker=worker)
                    )
                except (EOFError, ConnectionError):
                    self._forget(worker)
                    worker = None
                    if self._stopped.is_set():
                        break
                    killed = (
                        f"{request.label}: the process that worked on it was killed, probably for "
                        "want of memory: try with fewer --workers"
                    )
                    outcome = Outcome(request, error=shown(killed))
                except (OSError, MemoryError) as error:  # no memory to share, or no open file left
                    worker.kill()
                    self._forget(worker)
                    worker = None
                    outcome = Outcome(request, error=told(error, request, self._options["out"]))
                except _DroppedError:
                    break
                self._news.put(outcome)
        except BaseException as error:  # for the main thread to raise
            self._news.put(error)
        finally:
            if worker is not None:
                self._forget(worker)
            self._news.put(_End())

    def _start(self) -> "_Worker | None":
        """A new worker, unless no more are wanted."""
        with self._changing:
            if self._stopped.is_set():
                return None
            worker = _Worker(self._options)
            self._workers.add(worker)
        worker.wait_until_ready()
        return worker

    def _forget(self, worker: "_Worker") -> None:
        with self._changing:
            self._workers.discard(worker)
        worker.close()

    def _kill(self, which: Callable[["_Worker"], bool]) -> None:
        with self._changing:
            for worker in filter(which, self._workers):
                worker.kill()


class _End:
    """A thread has ended."""


class _Stop:
    """Workers that the device has not computed for are to be ended."""


class _DroppedError(Exception):
    """A scan is given up, since the program is to stop."""


class _Worker:
    """A process that reads scans and writes results, as this process sees it.

    Attributes:
      computed: whether the device has begun with, or done, the scan it is at.
    """

    def __init__(self, options: _Options):
        # Spawned, not forked: XLA's threads do not survive a fork.
        context = get_context("spawn")
        self.computed = False
        self._out = options["out"]
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, options))
        try:
            self._process.start()
        except OSError as error:
            raise InputError(
                f"--workers: a process cannot be started ({error.strerror}): try with fewer"
            ) from error
        finally:
            theirs.close()

    def wait_until_ready(self) -> None:
        """Return when it has come up.

        Raises:
          InputError: it has not.
        """
        try:
            self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise InputError(
                f"--workers: a process ended with code {self._process.exitcode} before it began: "
                "try with fewer, or --workers=0"
            ) from error

    def see_through(self, request: Request, compute: Compute) -> Outcome:
        """Have it predict a scan, and compute the network for it.

        Raises:
          EOFError, ConnectionError: the process is gone.
          _DroppedError: as `compute` does.
        """
        self.computed = False
        self._connection.send(request)
        message = self._connection.recv()
        if isinstance(message, Outcome):
            return message
        memory = reduction.recv_handle(self._connection)
        arrays = _mapped(memory, message)
        os.close(memory)
        try:
            prediction = compute(arrays[0])
            volumes = {**prediction.volumes, **prediction.evidence}
            # There may be fewer than the network can give, and never more.
            for array, volume in zip(arrays[: len(volumes)], volumes.values(), strict=True):
                array[...] = volume
        except _DroppedError:
            raise
        except Exception as error:
            self._connection.send(told(error, request, self._out))
            return self._connection.recv()
        without = dataclasses.replace(
            prediction,
            volumes=dict.fromkeys(prediction.volumes),
            evidence=dict.fromkeys(prediction.evidence),
        )
        self._connection.send(without)
        return self._connection.recv()

    def close(self) -> None:
        """Let it end."""
        self._connection.close()
        self._process.join()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()


def _mapped(memory: int, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array in a memory file; it stays there while the array does."""
    return np.ndarray(shape, np.float32, mmap.mmap(memory, 0))


def _work(connection: Connection, options: _Options) -> None:
    """What a worker process does."""
    for number in (signal.SIGINT, signal.SIGTERM):  # are for the process that started it
        signal.signal(number, signal.SIG_IGN)

    def compute(volume: np.ndarray) -> Prediction:
        """Ask for it: the volume, and room for what is made of it, the first in its place."""
        shape = (max(len(options["network"].volumes), 1), *volume.shape)
        memory = os.memfd_create("scan")
        os.ftruncate(memory, int(np.prod(shape)) * 4)
        arrays = _mapped(memory, shape)
        arrays[0] = volume
        try:
            connection.send(shape)
            reduction.send_handle(connection, memory, os.getppid())
            os.close(memory)
            answer = connection.recv()
        except (EOFError, ConnectionError):
            raise SystemExit from None
        if isinstance(answer, str):
            raise InputError(answer)
        volumes = iter(arrays)
        return dataclasses.replace(
            answer,
            volumes={name: next(volumes) for name in answer.volumes},
            evidence={name: next(volumes) for name in answer.evidence},
        )

    with contextlib.suppress(EOFError, ConnectionError):
        connection.send("ready")
        while True:
            request = connection.recv()
            connection.send(attempt(request, compute=compute, **options))
