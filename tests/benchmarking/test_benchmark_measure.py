"""How the benchmark's workers are started, take turns and must agree."""

import dataclasses
import pathlib
import types
from typing import Any

import pytest
from measured import job

from deepsc_jax.benchmarking import measure, worker
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.measure import Times, interleave, require_agreement
from deepsc_jax.benchmarking.works import Built
from deepsc_jax.runtime.errors import InputError


def test_median_least_and_greatest_of_uneven_turns():
    assert Times.of([5.0, 1.0, 2.0]) == Times((5.0, 1.0, 2.0), 2.0, 1.0, 5.0)
    assert Times.of([4.0, 1.0, 2.0, 8.0]).median == 3.0


def test_turns_are_taken_in_rounds():
    order: list[str] = []

    class Fake:
        def __init__(self, name: str):
            self.name = name

        def turn(self) -> dict[str, Any]:
            order.append(self.name)
            return {"seconds": len(order), "joules": None}

    turns = interleave([Fake("ours"), Fake("eager"), Fake("compiled")], 3, pause=0)
    assert order == ["ours", "eager", "compiled"] * 3
    assert [turn["seconds"] for turn in turns[1]] == [2, 5, 8]


def test_a_turn_follows_an_untimed_run_where_one_is_asked_for(monkeypatch):
    done: list[str] = []
    built = Built(run=lambda: done.append("run"), summary=lambda _: {})
    module: Any = types.SimpleNamespace(
        build=lambda _: built,
        import_late=lambda _: None,
        environment=lambda _: {},
        reset_peak_device_bytes=lambda: done.append("reset"),
        give_back_device=lambda: done.append("given back"),
    )
    monkeypatch.setattr(worker, "TURN_SECONDS", 0.0)
    timed = worker.Timed(module, job())
    assert done == ["run", "run", "reset", "run"]  # compiled and warm; what counts begins
    assert not timed.ready["long"]
    done.clear()
    timed.turn(again=False)
    timed.turn(again=True)
    assert done == ["run", "given back", "run", "run", "given back"]


@pytest.mark.parametrize(("seconds", "again"), [((1.0, 9.0), True), ((1.0, 11.0), False)])
def test_untimed_runs_come_for_all_or_for_none(monkeypatch, seconds, again):
    started: list[Any] = []

    class Started:
        def __init__(self, job: Job):
            self.job = job
            started.append(self)
            long = seconds[job.side == "torch"] > worker.LONG_SECONDS
            told = {"summary": {}, "environment": {"compute_dtype": "float32"}}
            self.ready: dict[str, Any] = {"long": long, "compile_s": 0.0, **told}

        def turn(self) -> dict[str, Any]:
            return {"seconds": 1.0, "joules": None}

        def end(self) -> dict[str, Any]:
            return {}

        def close(self) -> None:
            pass

    monkeypatch.setattr(measure, "Worker", Started)
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0)
    measure.measure([job(), job(side="torch", variant="eager")], 1)
    assert [one.again for one in started[1:]] == [again, again]  # the first is ours, compiling


def test_what_was_compiled_is_started_again_and_keeps_the_seconds_of_compiling(monkeypatch):
    started: list[Any] = []

    class Started:
        def __init__(self, job: Job):
            started.append(self)
            self.job, self.closed = job, False
            self.ready: dict[str, Any] = {"compile_s": 10.0 / len(started)}
            if job.side == "monai":
                self.ready = {"left_out": "no compiler"}

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(measure, "Worker", Started)
    told: list[str] = []
    peers = [job(side="torch", variant=variant) for variant in ("eager", "compiled")]
    peers.append(job(side="monai", variant="compiled"))
    with measure.workers([job(), *peers], told.append) as built:
        assert [worker.closed for worker in started] == [True, False, False, True, False, False]
        assert built == [started[1], started[2], started[4], started[5]]
        assert [worker.ready.get("compile_s") for worker in built] == [10, 10 / 3, 10 / 4, None]
    assert all(worker.closed for worker in started)
    states = [line.rsplit(" after ", 1)[0] for line in told]
    ready = [f"  {name}: ready" for name in ("ours", "torch eager", "torch compiled")]
    assert states == [*ready, "  monai compiled: left out"]


def test_a_peer_with_another_result_is_refused():
    def ready(loss: float, dtype: str = "float32") -> dict[str, Any]:
        return {"summary": {"loss": loss}, "environment": {"compute_dtype": dtype}}

    peer = job(side="torch", variant="eager")
    require_agreement(peer, ready(1), ready(1.0009))
    with pytest.raises(InputError, match=r"loss is 1 and 1\.002 by torch eager"):
        require_agreement(peer, ready(1), ready(1.002))
    with pytest.raises(InputError, match="nan"):
        require_agreement(peer, ready(1), ready(float("nan")))
    require_agreement(peer, ready(1, "bfloat16"), ready(1.04))


def test_a_process_that_dies_is_named_with_its_last_word(tmp_path: pathlib.Path):
    broken = dataclasses.replace(
        job("forward", stage="joint", side="torch", variant="eager"), folder=tmp_path
    )
    assert not broken.weights.exists()
    with pytest.raises(
        InputError, match=r"process of torch eager ended with 1 \(FileNotFound.*pickle"
    ):
        measure.Worker(broken)
