"""What the steps of a stage are measured by, at the places where the loop says what it does."""

import contextlib
from collections.abc import Iterator

import jax

from deepsc_jax.runtime import compiler
from deepsc_jax.systems.system import Batch, Stage
from deepsc_jax.training import utilisation
from deepsc_jax.training.meters import StepClock
from deepsc_jax.training.profiling import Trace
from deepsc_jax.training.stage import Run
from deepsc_jax.training.state import State
from deepsc_jax.training.utilisation import Throughput
from deepsc_jax.training.watch import Watch


class Gauges:
    """The clock, the ledger, the throughput, the trace and the watchdog of a stage.

    Args:
      run: whose ledger and watchdog they are.
      stage: of it.
      step: from which it goes on.
    """

    def __init__(self, run: Run, stage: Stage, step: int):
        self._clock, self._ledger, self._watchdog = StepClock(step), run.ledger, run.watchdog
        self._throughput = Throughput(
            run.system, stage, run.mesh.devices.size, counts=run.log.writer
        )
        self._trace = Trace(run.workdir / "profile" / stage.name, run.profile, run.log.say)
        self._watch_every = run.system.config.train.watch_every
        self._batch, self._rates = stage.batch, dict[str, float]()

    def stepping(self) -> contextlib.AbstractContextManager:
        """All of the loop's time that nothing below names."""
        return self._ledger.during(utilisation.STEPPING)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A time of waiting for a batch."""
        with self._clock.waiting(), self._ledger.during(utilisation.WAITING):
            yield

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A time of saving: no step's, and a hang of it is one."""
        with self._clock.paused(), self._ledger.during(utilisation.SAVING):
            yield
            self._ledger.keep()

    @contextlib.contextmanager
    def apart(self, kind: str) -> Iterator[None]:
        """A time of `kind`, however long: no step's."""
        with self._watchdog.paused(), self._clock.paused(), self._ledger.during(kind):
            yield

    @contextlib.contextmanager
    def step(self, number: int, batch: Batch, *, compiles: bool) -> Iterator[None]:
        """The call of a step; one that compiles its program first is no step's time."""
        apart = self.apart(utilisation.COMPILING) if compiles else contextlib.nullcontext()
        with apart:
            if compiles:
                self._throughput.learn(batch)
            with self._trace.begin(number):
                yield
            if compiles:
                compiler.give_back_memory()

    def watched(
        self, watch: Watch | None, state: State, batch: Batch, number: int
    ) -> dict[str, float]:
        """What is watched of the step to come, if that is one of those that are; no step's time."""
        if watch is None or number % self._watch_every:
            return {}
        jax.block_until_ready(state.params)
        with self.apart(utilisation.WATCHING):
            return watch(state, batch)

    def took(self, number: int, batch: Batch, state: State) -> None:
        """A step was called: what it was given and what it makes."""
        self._throughput.add(batch)
        self._trace.end(number, state)

    def restart(self) -> None:
        """Count the time of steps from now."""
        self._clock.restart()

    def rates(self, step: int) -> dict[str, float]:
        """Of the steps since the last time, as `meters.TIMED` names them."""
        rates = self._clock.rates(step, self._batch)
        rates |= self._throughput.rates(rates["seconds_per_step"])
        self._rates = rates | {"goodput": self._ledger.shares()[utilisation.STEPPING]}
        return self._rates

    def last_line(self) -> str | None:
        """How well the stage ran; None where it took no step."""
        return utilisation.last_line(self._rates, self._ledger) if self._rates else None

    def close(self) -> None:
        """End a trace that is still running."""
        self._trace.close()
