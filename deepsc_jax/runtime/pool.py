"""One job for many items, in processes that end when this one does."""

import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import TypeVar

from deepsc_jax.runtime.errors import AbortError, InputError
from deepsc_jax.runtime.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    job: Callable[[Item], Result], items: Sequence[Item], workers: int, title: str
) -> list[Result | InputError]:
    """The results of `job` for each item, in order; where it failed, an InputError.

    Args:
      job: a picklable function; it need not be where `workers` is 1, and runs in this process.
      items: what it is called with.
      workers: processes.
      title: of the progress bar.

    Raises:
      InputError: a worker was killed.
      AbortError: as `job` does.
    """
    with Progress(title, len(items)) as progress:
        if workers == 1:
            results = []
            for item in items:
                results.append(_outcome(functools.partial(job, item)))
                progress.advance()
            return results
        # Its other end is held by this process alone: however that ends, the workers see it closed.
        watched, held = multiprocessing.Pipe(duplex=False)
        # Spawned, not forked: tensorstore's threads do not survive a fork.
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, max(len(items), 1)),
            multiprocessing.get_context("spawn"),
            initializer=_end_with,
            initargs=(watched,),
        )
        try:
            futures = [pool.submit(job, item) for item in items]
            for future in concurrent.futures.as_completed(futures):
                if isinstance(error := future.exception(), AbortError):
                    raise error
                progress.advance()
            return [_outcome(future.result) for future in futures]
        except concurrent.futures.BrokenExecutor as error:
            raise InputError(
                f"--workers={workers}: a worker was killed, probably for want of memory: use fewer"
            ) from error
        finally:
            # Done, or not worth waiting for: what is half done is done again by the next run.
            held.close()
            pool.shutdown(cancel_futures=True)
            watched.close()


def _outcome(call: Callable[[], Result]) -> Result | InputError:
    try:
        return call()
    except AbortError:
        raise
    except InputError as error:
        return error
    except concurrent.futures.BrokenExecutor:
        raise
    except MemoryError:
        return InputError("too large for this machine's memory: try with fewer --workers")
    except OSError as error:
        return InputError(str(error))
    except Exception as error:  # a defect of ours: hours of other cases must not be lost to it
        traceback.print_exception(error)
        return InputError(f"{type(error).__name__}: {error}: please report this")


def _end_with(watched: connection.Connection) -> None:
    """Have this worker end as soon as the other end of `watched` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it

    def watch() -> None:
        connection.wait([watched])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
