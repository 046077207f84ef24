"""How the benchmark's workers are started, take turns and must agree."""

import dataclasses
import pathlib
import types
from typing import Any, ClassVar

import pytest
from measured import job

from deepsc_jax.benchmarking import measure, worker
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.measure import Times, disagreement, interleave
from deepsc_jax.benchmarking.works import Built
from deepsc_jax.runtime.errors import InputError


def test_median_least_and_greatest_of_uneven_turns():
    turns = (5.0, 1.0, 2.0)
    assert Times.of(turns) == Times(turns, 2.0, 1.0, 5.0, calls=turns)
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


def test_a_peer_with_another_result_does_not_agree():
    def ready(loss: float, dtype: str = "float32") -> dict[str, Any]:
        return {"summary": {"loss": loss}, "environment": {"compute_dtype": dtype}}

    peer = job(side="torch", variant="eager")
    assert not disagreement(peer, ready(1), ready(1.0009))
    assert "loss is 1 and 1.002 by torch eager" in disagreement(peer, ready(1), ready(1.002))
    assert "nan" in disagreement(peer, ready(1), ready(float("nan")))
    assert not disagreement(peer, ready(1, "bfloat16"), ready(1.04))


class Scripted:
    """A worker whose loss and seconds are those of its variant; started in this order."""

    losses: ClassVar = {"": 1.0, "eager": 1.0, "layers": 2.0, "compiled": 1.0, "one_by_one": 1.0}
    seconds: ClassVar = {"": 4.0, "eager": 3.0, "layers": 0.1, "compiled": 1.0, "one_by_one": 2.0}
    started: ClassVar[list[str]] = []

    def __init__(self, job: Job):
        self.job, self.again = job, True
        told = {"environment": {"compute_dtype": "float32"}, "long": False, "compile_s": 5.0}
        self.ready = {**told, "summary": {"loss": self.losses[job.variant]}}
        self.started.append(job.variant)

    def turn(self) -> dict[str, Any]:
        return {"seconds": self.seconds[self.job.variant], "joules": None}

    def end(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(Scripted, "started", [])
    monkeypatch.setattr(measure, "Worker", Scripted)
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0)
    return Scripted


def of_torch(*variants: str) -> list[Job]:
    return [job(side="torch", variant=variant) for variant in variants]


def test_a_variant_that_computes_something_else_is_left_out_and_named(scripted: type[Scripted]):
    table = measure.measure([job(), *of_torch("eager", "layers")], 1)
    assert [one.job.variant for one in table.measured] == ["", "eager"]
    assert "loss is 1 and 2 by torch layers" in table.left_out["torch layers"]
    with pytest.raises(InputError, match="by torch layers"):
        measure.measure([job(), *of_torch("layers")], 1)


def test_the_fastest_of_what_was_timed_once_take_turns(scripted: type[Scripted]):
    peers = of_torch("eager", "layers", "one_by_one", "compiled")
    table = measure.measure([job(), *peers], 1, screen=2)
    assert [one.job.variant for one in table.measured] == ["", "compiled", "one_by_one"]
    timed = [(row["peer"], row["seconds"]) for row in table.screened]
    assert timed[1:] == [("torch eager", 3), ("torch one_by_one", 2), ("torch compiled", 1)]
    assert list(table.left_out) == ["torch layers"]  # the fastest, at computing something else
    # Once each, alone; then ours and what is compiled twice, to be found on disk.
    once = ["", "eager", "layers", "one_by_one", "compiled"]
    assert scripted.started == [*once, "", "", "compiled", "compiled", "one_by_one"]


def test_a_process_that_dies_is_named_with_its_last_word(tmp_path: pathlib.Path):
    broken = dataclasses.replace(
        job("forward", stage="joint", side="torch", variant="eager"), folder=tmp_path
    )
    assert not broken.weights.exists()
    with pytest.raises(
        InputError, match=r"process of torch eager ended with 1 \(FileNotFound.*pickle"
    ):
        measure.Worker(broken)
