"""What a stage trains on, and its steps."""

import dataclasses
import json
import pathlib
from typing import Any

import handful
import jax
import jax.numpy as jnp
import pytest
from handful import CONFIG

from deepsc_jax.config import CLASSES
from deepsc_jax.data import pipeline, preparation
from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.data.datasets import read_cases
from deepsc_jax.data.store import Store
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Stage, System, initial
from deepsc_jax.training import checkpoint, logs, loop
from deepsc_jax.training import stage as stages
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

SYSTEM = build(CONFIG, "cpu")
NO_FACTS = {"class_weights": jnp.ones(len(CLASSES))}


def at_start(system: System, stage: Stage, mesh: jax.sharding.Mesh) -> states.State:
    """The state before a stage's first step, as the mesh has it."""
    state = states.create(system, stage, initial(system))
    return jax.device_put(state, device_mesh.replicated(mesh))


def first_batches(system: System, stage: Stage, store: Store) -> Any:
    """An iterator of a stage's training batches."""
    config = system.config
    return iter(pipeline.batches(store, "train", stage.reads, config, seed=0, batch_size=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return handful.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def store(folder: pathlib.Path) -> Store:
    return Store(folder / "store", CONFIG.data)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_what_is_not_finite_is_not_saved(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not even where steps are logged less often than saved: at 2, with a log line at 4."""

    class Broken:
        def __init__(self, *_: object):
            pass

        def given(self, _: object) -> "Broken":
            return self

        def __call__(self, state: states.State, _: object) -> tuple[states.State, Any]:
            scalars = {"loss": jnp.ones(()), "gradient_norm": jnp.ones(())}
            after = dataclasses.replace(state, step=state.step + 1)
            return after, scalars | {name: jnp.asarray(jnp.nan)}

    monkeypatch.setattr(stages, "make_train_step", Broken)
    train = dataclasses.replace(CONFIG.train, log_every=4)
    system = build(dataclasses.replace(CONFIG, train=train), "cpu")
    with pytest.raises(InputError, match=f"classification: {name} is nan by step 2"):
        loop.train(system, store, tmp_path, (system.stage("classification"),))
    assert not checkpoint.has_checkpoint(tmp_path / "classification")


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            stage, id=stage.name, marks=() if stage.name == "classification" else pytest.mark.slow
        )
        for stage in SYSTEM.stages
    ],
)
def test_only_the_first_step_of_each_shape_compiles(store: Store, stage: Stage) -> None:
    mesh = device_mesh.make_mesh(CONFIG.platform)
    step: Any = make_train_step(SYSTEM, stage, mesh, NO_FACTS)
    current, batches = at_start(SYSTEM, stage, mesh), first_batches(SYSTEM, stage, store)
    shapes = set()
    for _ in range(4):
        batch = next(batches)
        shapes.add(tuple(x.shape for x in batch.values()))
        current, _ = step(current, device_mesh.put_batch(batch, mesh, DEPTH_AXES))
    assert step.program._cache_size() == len(shapes) <= CONFIG.data.depth_buckets
    batches.close()


def test_scanned_tiles_trace_over_the_mesh(store: Store) -> None:
    # What `auto` means on GPU and TPU; lowering is enough to see that shapes and axes agree.
    platform = dataclasses.replace(CONFIG.platform, tile_loop="loop", data_devices=2)
    system = build(dataclasses.replace(CONFIG, platform=platform), "cpu")
    stage, mesh = system.stage("joint"), device_mesh.make_mesh(platform)
    assert system.layout.loop_tiles
    step = make_train_step(system, stage, mesh, NO_FACTS)
    batches = first_batches(system, stage, store)
    batch = device_mesh.put_batch(next(batches), mesh, DEPTH_AXES)
    batches.close()
    step.lower(states.create(system, stage, initial(system)), batch)


def test_a_stage_that_learns_lesions_trains_on_scans_with_known_ones(store: Store) -> None:
    unknown = dataclasses.replace(store.cases("train")[0], lesion_mask=None, lesions_known=False)
    assert not unknown.lesions_known

    cases = [unknown, *store.cases("train")[1:]]
    for stage, kept in (
        ("classification", cases),
        ("segmentation", cases[1:]),
        ("joint", cases[1:]),
    ):
        assert pipeline.learnable(cases, SYSTEM.stage(stage).reads) == kept


def test_validation_that_cannot_tell_checkpoints_apart_is_refused_at_once(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    cases = read_cases(folder / "cases.csv")
    free = [c for c in cases if c.split != "validation" or CLASSES[c.label] == "non-pneumonia"]
    assert preparation.prepare(free, tmp_path, CONFIG.data, workers=1) == []
    store = Store(tmp_path / "store", CONFIG.data)
    reasons = {
        "segmentation": "no scan with a lesion",
        "classification": "scans of one class",
        "joint": "no scan with a lesion",
    }
    for stage, reason in reasons.items():
        with pytest.raises(InputError, match=f"validation has {reason}"):
            loop.train(SYSTEM, store, tmp_path / "run", (SYSTEM.stage(stage),))


def test_what_was_logged_after_the_checkpoint_or_cut_short_is_dropped(
    tmp_path: pathlib.Path,
) -> None:
    log = logs.MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("joint", step, {"loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "joint", "st')  # killed
    log = logs.MetricsLog(tmp_path)
    log.resume("joint", 2)
    log.write("joint", 3, {"loss": 2.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.slow
def test_one_batch_is_learnt_by_heart(store: Store) -> None:
    """If a stage cannot overfit two scans, something is wrong with its gradient.

    With four channels it cannot: of normal tissue as dense as lesions it learns two thirds.
    """
    wide = dataclasses.replace(
        CONFIG.model,
        inception_channels=8,
        lesion_channels=(16, 16, 16),
        classifier_stem_channels=8,
        encoder_channels=(8, 8, 8),
    )
    config = dataclasses.replace(CONFIG, model=wide)
    system = build(config.with_stage("joint", steps=150, learning_rate=4e-3), "cpu")
    stage, mesh = system.stage("joint"), device_mesh.make_mesh(CONFIG.platform)
    step = make_train_step(system, stage, mesh, NO_FACTS)
    current, batches = at_start(system, stage, mesh), first_batches(system, stage, store)
    batch = device_mesh.put_batch(next(batches), mesh, DEPTH_AXES)
    batches.close()
    losses = []
    for _ in range(150):
        current, scalars = step(current, batch)
        losses.append({k: float(v) for k, v in scalars.items()})
    assert losses[-1]["cross_entropy"] < 0.1 * losses[0]["cross_entropy"]
    assert losses[-1]["dice"] < 0.5 * losses[0]["dice"]
