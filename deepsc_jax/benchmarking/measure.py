"""Timing several things side by side: one process each, their runs interleaved."""

import contextlib
import dataclasses
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import jax

from deepsc_jax.benchmarking.jobs import COMPILED, OURS, Job
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject

PAUSE_SECONDS = 0.3  # OpenMP's and Eigen's threads spin for some while after their work


class TakesTurns(Protocol):
    """What `interleave` asks of a worker."""

    def turn(self) -> JsonObject:
        """Run once; returns `seconds` and `joules`."""
        ...


class Worker:
    """A process that has built and warmed up one job.

    Attributes:
      ready: what it said then: long, compile_s, summary, environment; or left_out.
      again: whether an untimed run comes before each timed one.

    Raises:
      InputError: the job cannot be built, or the process ended.
    """

    def __init__(self, job: Job):
        self.job = job
        self.again = True
        self._log = job.folder / f"{job.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deepsc_jax.benchmarking.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(job),
            )
        try:
            self.ready = self._ask(job)
            if "error" in self.ready:
                raise InputError(self.ready["error"])
        except BaseException:
            self.close()
            raise

    def turn(self) -> JsonObject:
        """One timed turn: `seconds`, `joules`."""
        return self._ask("again" if self.again else "turn")

    def end(self) -> JsonObject:
        """Memory and rates, after the last turn."""
        return self._ask("end")

    def close(self) -> None:
        """End the process: it leaves when its pipe is closed, and is killed if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # what a process that died never read
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, message: Job | str) -> JsonObject:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, OSError) as error:
            code = self._process.wait()
            lines = self._log.read_text(errors="replace").strip().splitlines()
            said = lines[-1] if lines else "nothing on stderr"
            raise InputError(
                f"--work={self.job.work}: the process of {self.job.name} ended with {code} "
                f"({said}): mend that, or lower the batch or the tile"
            ) from error


def _environment(job: Job) -> dict[str, str]:
    """Of a worker: ours and peers share a GPU, so none takes all its memory at once.

    Our inference lacks the allocator's settings that this program, but not `predict`, has.
    """
    predicts = job.work == "inference" and job.side in OURS
    lacks = entry.ALLOCATOR if predicts else {}
    kept = {name: value for name, value in os.environ.items() if lacks.get(name) != value}
    chosen = jax.config.values["jax_platforms"]  # by `entry.run`, where there is no GPU
    platforms = {"JAX_PLATFORMS": chosen} if chosen else {}
    places = {"TORCHINDUCTOR_CACHE_DIR": str(job.folder / "inductor")}
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | kept | platforms | places


@contextlib.contextmanager
def workers(jobs: Sequence[Job], tell: Callable[[str], None]) -> Iterator[list[Worker]]:
    """A worker for every job, built one after another, ended at the end."""
    with contextlib.ExitStack() as stack:
        built = []
        for job in jobs:
            begun = time.monotonic()
            built.append(_warm_worker(job))
            stack.callback(built[-1].close)
            state = "left out" if "left_out" in built[-1].ready else "ready"
            tell(f"  {job.name}: {state} after {time.monotonic() - begun:.0f} s")
        yield built


def _warm_worker(job: Job) -> Worker:
    """A worker for `job`; of a compiled one, one that finds its programs on disk.

    As every start of a program but the first: what compiling leaves in a process's memory is not
    counted, ours or `torch.compile`'s; that of the form `direct` is, which cannot be kept on disk.
    """
    worker = Worker(job)
    if "left_out" in worker.ready or (job.side not in OURS and job.variant not in COMPILED):
        return worker
    worker.close()
    warm = Worker(job)
    warm.ready["compile_s"] = worker.ready["compile_s"]
    return warm


def interleave(
    takers: Sequence[TakesTurns], repeats: int, pause: float = PAUSE_SECONDS
) -> list[list[JsonObject]]:
    """`repeats` turns of each, taken in rounds, so that what slows the machine slows all alike."""
    turns: list[list[JsonObject]] = [[] for _ in takers]
    for _ in range(repeats):
        for taker, taken in zip(takers, turns, strict=True):
            time.sleep(pause)
            taken.append(taker.turn())
    return turns


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step in the turns of one worker, in order, and in each call of all turns."""

    turns: tuple[float, ...]
    median: float
    low: float
    high: float
    calls: tuple[float, ...] = ()

    @classmethod
    def of(cls, seconds: Sequence[float], calls: Sequence[float] = ()) -> "Times":
        """With their median, least and greatest."""
        calls = tuple(calls) or tuple(seconds)
        return cls(tuple(seconds), statistics.median(seconds), min(seconds), max(seconds), calls)

    def percentile(self, percent: int) -> float:
        """Of the calls: the least that so many percent of them do not exceed."""
        ordered = sorted(self.calls)
        return ordered[max(-(-len(ordered) * percent // 100), 1) - 1]


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that is known of one job."""

    job: Job
    times: Times
    joules: float | None
    compile_s: float
    summary: Mapping[str, float]
    environment: JsonObject
    end: JsonObject

    @property
    def peak_mib(self) -> float:
        """Peak memory: of the device where it tells, else of the host."""
        device = self.end["device_bytes"]
        return (self.end["peak_bytes"] if device is None else device) / 2**20


@dataclasses.dataclass(frozen=True)
class Table:
    """What a comparison found.

    Attributes:
      measured: ours first.
      left_out: by name, the reason of each that was left out.
      screened: of each that was timed once, its name and seconds, compiling apart.
    """

    measured: list[Measured]
    left_out: dict[str, str]
    screened: list[JsonObject] = dataclasses.field(default_factory=list)


def measure(
    jobs: Sequence[Job],
    repeats: int,
    tell: Callable[[str], None] = lambda _: None,
    screen: int = 0,
) -> Table:
    """Time the jobs side by side; the first of them is ours, which leaves weights for the others.

    `tell` is told how far it is. With `screen`, each is timed once, alone, and so many of the
    fastest of each side take part in the rounds.

    Raises:
      InputError: a job cannot be built or dies, or of a side no variant's first result is ours.
    """
    screened: list[JsonObject] = []
    left_out: dict[str, str] = {}
    compiling: dict[str, float] = {}
    if screen:
        screened, left_out = _screened(jobs, tell)
        for job in jobs:
            if not any(row["peer"].split()[0] == job.side for row in screened):
                raise InputError(left_out[job.name])
        compiling = {row["peer"]: row["compile_s"] for row in screened}
        jobs = [jobs[0], *_fastest(jobs[1:], screened, screen)]
    with workers(jobs, tell) as built:
        left_out |= {w.job.name: w.ready["left_out"] for w in built if "left_out" in w.ready}
        built = [worker for worker in built if "left_out" not in worker.ready]
        left_out |= _disagreeing(built)
        built = [worker for worker in built if worker.job.name not in left_out]
        longs = [worker.ready.pop("long") for worker in built]
        for worker in built:  # alike, and none where one takes long
            worker.again = not any(longs)
        turns = interleave(built, repeats)
        measured = []
        for worker, taken in zip(built, turns, strict=True):
            joules = [turn["joules"] for turn in taken]
            worker.ready["compile_s"] = compiling.get(worker.job.name, worker.ready["compile_s"])
            measured.append(
                Measured(
                    worker.job,
                    Times.of(
                        [turn["seconds"] for turn in taken],
                        [seconds for turn in taken for seconds in turn.get("calls", ())],
                    ),
                    None if None in joules else statistics.median(joules),
                    end=worker.end(),
                    **worker.ready,
                )
            )
    return Table(measured, left_out, screened)


def _screened(
    jobs: Sequence[Job], tell: Callable[[str], None]
) -> tuple[list[JsonObject], dict[str, str]]:
    """A row of each job that was timed once, one process after another; why others were not."""
    rows: list[JsonObject] = []
    left_out: dict[str, str] = {}
    ours: JsonObject = {}
    for job in jobs:
        with contextlib.closing(Worker(job)) as worker:
            ours = ours or worker.ready
            reason = worker.ready.get("left_out") or disagreement(job, ours, worker.ready)
            if reason:
                left_out[job.name] = reason
                continue
            seconds = worker.turn()["seconds"]
        row = {"work": job.title, "peer": job.name, "seconds": seconds}
        rows.append(row | {"compile_s": worker.ready["compile_s"]})
        tell(f"  {job.name}: {seconds:.4g} s, timed once")
    return rows, left_out


def _fastest(jobs: Sequence[Job], rows: Sequence[JsonObject], most: int) -> list[Job]:
    """Those of each side that took the least time."""
    seconds = {row["peer"]: row["seconds"] for row in rows}
    chosen = []
    for side in dict.fromkeys(job.side for job in jobs):
        timed = [job for job in jobs if job.side == side and job.name in seconds]
        chosen += sorted(timed, key=lambda job: seconds[job.name])[:most]
    return chosen


def _disagreeing(built: Sequence[Worker]) -> dict[str, str]:
    """Why peers do not count, by name.

    Raises:
      InputError: no variant of a side computes what ours does.
    """
    ours, *others = built
    reasons = {w.job.name: disagreement(w.job, ours.ready, w.ready) for w in others}
    for side in dict.fromkeys(worker.job.side for worker in others):
        of_side = [reasons[worker.job.name] for worker in others if worker.job.side == side]
        if of_side and all(of_side):
            raise InputError(of_side[0])
    return {name: reason for name, reason in reasons.items() if reason}


def disagreement(peer: Job, ours: JsonObject, theirs: JsonObject) -> str:
    """Why the times of two works say nothing: their first results differ; empty if they do not.

    By more than 1e-3, or with bfloat16 5e-2, of the greater.

    Args:
      peer: the peer's job.
      ours: what our worker said when it was ready.
      theirs: what the peer's said.
    """
    bound = 1e-3 if ours["environment"]["compute_dtype"] == "float32" else 5e-2
    for name in ours["summary"].keys() & theirs["summary"].keys():
        own, other = ours["summary"][name], theirs["summary"][name]
        if not abs(own - other) <= bound * max(abs(own), abs(other)):
            return (
                f"--work={peer.work}: {name} is {own:.6g} and {other:.6g} by {peer.name}, "
                f"equal to {bound:g} expected: they do not compute the same, so their times say "
                "nothing (make parity looks closer)"
            )
    return ""
