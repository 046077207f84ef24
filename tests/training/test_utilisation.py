"""Where a run's time goes, and what its steps compute."""

import json
import pathlib
from collections.abc import Callable

import handful
import jax
import numpy as np
import pytest
import smallest

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.data.store import Store
from deepsc_jax.planning import model_flops, targets
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.training import loop, utilisation
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.meters import TIMED
from deepsc_jax.training.profiling import Trace
from deepsc_jax.training.utilisation import (
    COMPILING,
    SAVING,
    STARTING,
    STEPPING,
    WAITING,
    Ledger,
    Throughput,
    last_line,
)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Clocks that go on when they are told."""
    now = [1000.0]
    monkeypatch.setattr(utilisation.time, "monotonic", lambda: now[0] - 400)
    monkeypatch.setattr(utilisation.time, "time", lambda: now[0])

    def pass_(seconds: float) -> None:
        now[0] += seconds

    return pass_


def test_a_time_within_another_is_no_part_of_it(passes: Callable[[float], None]) -> None:
    ledger = Ledger()
    passes(10)
    with ledger.during(STEPPING):
        passes(40)
        with ledger.during(WAITING):
            passes(20)
        passes(10)
        with ledger.during(SAVING), ledger.during(COMPILING):
            passes(20)
    shares = ledger.shares()
    expected = {STARTING: 0.1, STEPPING: 0.5, WAITING: 0.2, SAVING: 0, COMPILING: 0.2, "lost": 0}
    assert {kind: shares[kind] for kind in expected} == pytest.approx(expected)


def test_what_came_after_the_last_record_is_lost(
    passes: Callable[[float], None], tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "time.json"
    first = Ledger(path)
    with first.during(STEPPING):
        passes(50)
        first.keep()
        passes(25)  # and is killed
    passes(5)
    again = Ledger(path)
    assert again.starts == 2
    with again.during(STEPPING):
        passes(20)
    assert again.shares()[STEPPING] == pytest.approx(0.7)
    assert again.shares()["lost"] == pytest.approx(0.3)
    again.keep(ended=True)
    passes(1000)  # a run that is over waits for nothing
    assert Ledger(path).shares()["lost"] == pytest.approx(0.3)


def test_another_file_in_the_records_place_is_named_and_left(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "time.json"
    for text in ("mine", json.dumps({"begun": 1, "starts": 1, "ended": None, "seconds": [1]})):
        path.write_text(text)
        with pytest.raises(InputError, match=r"time\.json: not the record of a run's time"):
            Ledger(path)
        assert path.read_text() == text


def test_only_the_writer_writes(tmp_path: pathlib.Path) -> None:
    Ledger(tmp_path / "time.json", writer=False).keep()
    assert not list(tmp_path.iterdir())


DATA = DataConfig(working_size=(16, 16), tile=(8, 16, 16), slices=8, depth_bucket=8)
CONFIG = Config(data=DATA, model=smallest.MODEL)


def test_rates_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"float32": 3e12, "bfloat16": 1e12}
    asked: list[tuple] = []

    def of_step(config: Config, stage: str, scans: int, depth: int) -> dict[str, float]:
        asked.append((stage, scans, depth))
        return counted

    chip = targets.CHIPS["h100"]
    monkeypatch.setattr(model_flops, "of_step", of_step)
    monkeypatch.setattr(model_flops, "published_chip", lambda: chip)
    system = build(CONFIG)
    stage = system.stage("joint")
    throughput = Throughput(system, stage, 2, counts=True)
    batch = {"volume": jax.numpy.zeros((4, 2, 8, 16, 16)), "depth": jax.numpy.zeros(4)}
    for _ in range(3):
        throughput.learn(batch)
        throughput.add(batch)
    rates = throughput.rates(0.5)
    assert asked == [("joint", 4, 16)]  # once a shape
    assert rates["voxels_per_second"] == 4 * 16 * 16 * 16 / 0.5
    assert rates["tflops_per_device"] == 4 / 0.5 / 2
    least = 3e12 / chip.peaks["float32"] + 1e12 / chip.peaks["bfloat16"]
    assert rates["mfu"] == pytest.approx(least / 2 / 0.5)
    assert rates["peak_memory_mib"] > 0
    throughput.add(batch)
    assert throughput.rates(0.5)["tflops_per_device"] == 4  # those since the last time alone


def test_a_steps_flops_do_not_depend_on_devices_and_recomputation() -> None:
    few = model_flops.of_step(CONFIG, "segmentation", 4, 8)
    twice = model_flops.of_step(CONFIG, "segmentation", 8, 8)
    assert few.keys() == twice.keys()
    assert all(twice[kind] == 2 * n for kind, n in few.items())


def test_the_last_line_has_what_is_known(passes: Callable[[float], None]) -> None:
    ledger = Ledger()
    with ledger.during(STEPPING):
        passes(30)
    with ledger.during(SAVING):
        passes(10)
    rates = {"tflops_per_device": 1.234, "scans_per_second": 5.0, "peak_memory_mib": 100.4}
    line = last_line(rates, ledger)
    assert line.startswith("1.23 TFLOP/s a device, 5 scans/s, at most 100 MiB; of 40 s in 1 start:")
    assert "stepping 75%" in line
    assert "saving 25%" in line
    assert "peak," not in line  # of an unknown chip


def test_the_steps_that_are_asked_for_are_traced(tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    trace = Trace(tmp_path / "profile", (2, 3), said.append)
    double = jax.jit(lambda x: 2 * x)
    x = np.ones(4)
    for step in range(1, 6):
        with trace.begin(step):
            x = double(x)
        trace.end(step, x)
        running = any(tmp_path.rglob("*.xplane.pb"))
        assert running == (step >= 3)
    trace.close()
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
    assert said == [f"steps to 3 are traced: xprof --logdir={tmp_path / 'profile'}"]


def test_nothing_is_traced_unasked(tmp_path: pathlib.Path) -> None:
    trace = Trace(tmp_path / "profile", None, print)
    with trace.begin(1):
        pass
    trace.end(1, ())
    trace.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_says_how_well_it_ran(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = handful.write(tmp_path / "data"), tmp_path / "run"
    system = build(handful.CONFIG.with_stage("classification", steps=3, batch=2), "cpu")
    store = Store(data / "store", system.config.data)
    workdirs.begin(run, system.config, store)
    loop.train(system, store, run, (system.stage("classification"),), profile=(2, 3))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "loss" in line)
    assert last["tflops_per_device"] > 0
    assert last["voxels_per_second"] > last["scans_per_second"] > 0
    assert 0 < last["goodput"] < 1
    assert 10 < last["peak_memory_mib"] < 20000
    assert set(TIMED) - last.keys() == {"mfu"}  # of a chip whose peak is not known
    said = [line for line in capsys.readouterr().out.splitlines() if "TFLOP/s a device" in line]
    assert len(said) == 1
    assert "in 1 start: stepping " in said[0]
    record = json.loads((run / "time.json").read_text())
    assert record["ended"] > record["begun"]
    assert record["seconds"][COMPILING] > 0
    assert len(list((run / "profile" / "classification").rglob("*.xplane.pb"))) == 1
