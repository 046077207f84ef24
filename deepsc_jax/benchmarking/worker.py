"""One job in a process of its own: build, warm up, then run whenever the parent says so.

The parent (`measure.Worker`) sends a pickled `Job` and then one request at a time on stdin; each is
answered by a pickled dictionary on what was stdout. Between requests the process waits in a
blocking read, so it takes no core from the others.

Memory. Host memory is what the process holds at most during its timed runs, beyond what it held
after its imports, also those that a library makes at its first use, and without the pages of
libraries: glibc is asked to give back what compiling and warming up have freed, the kernel's
high-water mark is reset (/proc/self/clear_refs), and read after the last run. Where there is no
such file, it is the high-water mark of the process's whole life.
"""

import importlib
import itertools
import math
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

from deepsc_jax.benchmarking import energy, environment
from deepsc_jax.benchmarking.jobs import COMPILED, OURS, InapplicableError, Job
from deepsc_jax.runtime import compiler, memory
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject

Out = TypeVar("Out")
TURN_SECONDS = 0.2  # a turn repeats a shorter work, so that no clock is too coarse
LONG_SECONDS = 10.0  # in a longer one the slow start after waiting is lost


def main() -> None:
    """Serve the parent until it closes the pipe."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is not a reply

    def reply(**message: object) -> None:
        pickle.dump(message, replies)
        replies.flush()

    job: Job = pickle.load(sys.stdin.buffer)
    side = "works" if job.side in OURS else "peers"
    module = importlib.import_module(f"deepsc_jax.benchmarking.{side}")
    try:
        module.import_late(job)
        before = memory.held("VmRSS")
        timed = Timed(module, job)
    except InapplicableError as error:
        return reply(left_out=str(error))
    except InputError as error:
        return reply(error=str(error))
    except Exception as error:
        if job.variant not in COMPILED:
            raise
        traceback.print_exc()
        # torch.compile names its backend in the first line, and what it raised in the second.
        return reply(left_out=" ".join(str(error).split("\n")[:2]).strip())
    reply(**timed.ready)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return None
        reply(**(timed.end(before) if request == "end" else timed.turn(again=request == "again")))


class Timed:
    """A built work that has been warmed up.

    Attributes:
      ready: what the parent is told of it.
    """

    def __init__(self, module: ModuleType, job: Job):
        self._module = module
        self._built = module.build(job)
        self._run = self._built.run
        first, out = _seconds(self._run)
        summary = self._built.summary(out)
        del out
        warm, _ = _seconds(self._run)
        self._calls = max(1, math.ceil(TURN_SECONDS / max(warm, 1e-6)))
        compiler.give_back_memory()
        memory.reset_peak()
        self._module.reset_peak_device_bytes()
        self._idle = memory.held("VmRSS")
        self._run()  # touches again what was given back
        self._meter = energy.Meter()
        self.ready = {
            "long": warm > LONG_SECONDS,
            "compile_s": max(first - warm, 0.0),
            "summary": summary,
            "environment": module.environment(job.config),
        }

    def turn(self, *, again: bool) -> JsonObject:
        """Seconds, and joules where they are told, of one step; `calls`, those of each call.

        `again` after an untimed run: the first step after some seconds of waiting for the others
        took half as long again, since a system may take back memory that idles.
        """
        if again:
            self._run()
        steps = self._calls * max(len(self._built.depths), 1)
        before = self._meter.joules()
        marks = [time.perf_counter()]
        for _ in range(self._calls):
            self._run()
            marks.append(time.perf_counter())
        seconds = marks[-1] - marks[0]
        each = [(b - a) * self._calls / steps for a, b in itertools.pairwise(marks)]
        after = self._meter.joules()
        joules = None if before is None or after is None else (after - before) / steps
        self._module.give_back_device()  # a peer may need it
        return {"seconds": seconds / steps, "joules": joules, "calls": each}

    def end(self, before: int) -> JsonObject:
        """What is known after the last turn; what takes memory itself comes last."""
        peak, device = memory.held("VmHWM"), self._module.peak_device_bytes()
        source, rates = self._module.peak_rates()
        return {
            "peak_bytes": peak - before + self._built.more_bytes(),
            "idle_bytes": self._idle - before,
            "device_bytes": device,
            "rates_from": source,
            "rates": rates,
            "flops": self._built.flops(),
            "depths": self._built.depths,
            "settings": environment.settings(),
        }


def _seconds(run: Callable[[], Out]) -> tuple[float, Out]:
    begun = time.perf_counter()
    out = run()
    return time.perf_counter() - begun, out


if __name__ == "__main__":
    main()
