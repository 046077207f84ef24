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

from deepsc_jax.config import CLASSES, STAGES, Stage
from deepsc_jax.data import pipeline, preparation
from deepsc_jax.data.datasets import read_cases
from deepsc_jax.data.store import Store
from deepsc_jax.models.deepsc import network as deepsc
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training import checkpoint, logs, loop, state
from deepsc_jax.training.step import make_train_step


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

    def broken(*_: object) -> Any:
        return lambda state, _: (
            dataclasses.replace(state, step=state.step + 1),
            {"loss": jnp.ones(()), "gradient_norm": jnp.ones(())} | {name: jnp.asarray(jnp.nan)},
        )

    monkeypatch.setattr(loop, "make_train_step", broken)
    train = dataclasses.replace(CONFIG.train, log_every=4)
    with pytest.raises(InputError, match=f"classification: {name} is nan by step 2"):
        loop.train(dataclasses.replace(CONFIG, train=train), store, tmp_path, ("classification",))
    assert not checkpoint.has_checkpoint(tmp_path / "classification")


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_step_of_a_stage_is_the_only_one_that_compiles(
    store: Store, stage: Stage
) -> None:
    mesh = device_mesh.make_mesh(CONFIG.platform)
    model = deepsc.build(CONFIG, "cpu")
    step = make_train_step(CONFIG, stage, model, mesh, jnp.ones(len(CLASSES)))
    params = state.initial_params(CONFIG, model)
    current = jax.device_put(state.create(CONFIG, stage, params), device_mesh.replicated(mesh))
    batches = iter(pipeline.batches(store, "train", stage, CONFIG, seed=0, batch_size=2))
    for _ in range(4):
        current, _ = step(current, device_mesh.put_batch(next(batches), mesh))
    assert step._cache_size() == 1
    batches.close()


def test_scanned_tiles_trace_over_the_mesh(store: Store) -> None:
    # What `auto` means on GPU and TPU; lowering is enough to see that shapes and axes agree.
    platform = dataclasses.replace(CONFIG.platform, tile_loop="loop", data=2)
    config = dataclasses.replace(CONFIG, platform=platform)
    mesh = device_mesh.make_mesh(platform)
    model = deepsc.build(config, "cpu")
    assert model.layout.loop_tiles
    step = make_train_step(config, "joint", model, mesh, jnp.ones(len(CLASSES)))
    batches = iter(pipeline.batches(store, "train", "joint", config, seed=0, batch_size=2))
    batch = device_mesh.put_batch(next(batches), mesh)
    batches.close()
    step.lower(state.create(config, "joint", state.initial_params(config, model)), batch)


def test_a_stage_that_learns_lesions_trains_on_scans_with_known_ones(store: Store) -> None:
    unknown = dataclasses.replace(store.cases("train")[0], lesion_mask=None)
    assert not unknown.lesions_known

    cases = [unknown, *store.cases("train")[1:]]
    assert pipeline.learnable(cases, "classification") == cases
    assert pipeline.learnable(cases, "segmentation") == cases[1:]
    assert pipeline.learnable(cases, "joint") == cases[1:]


def test_validation_that_cannot_tell_checkpoints_apart_is_refused_at_once(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    cases = read_cases(folder / "cases.csv")
    free = [c for c in cases if c.split != "validation" or CLASSES[c.label] == "non-pneumonia"]
    assert preparation.prepare(free, tmp_path, CONFIG.data, workers=1) == []
    store = Store(tmp_path / "store", CONFIG.data)
    reasons: dict[Stage, str] = {
        "segmentation": "no scan with a lesion",
        "classification": "scans of one class",
        "joint": "no scan with a lesion",
    }
    for stage, reason in reasons.items():
        with pytest.raises(InputError, match=f"validation has {reason}"):
            loop.train(CONFIG, store, tmp_path / "run", (stage,))


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
    """If a stage cannot overfit two scans, something is wrong with its gradient."""
    train = dataclasses.replace(CONFIG.train, joint_steps=150, joint_learning_rate=3e-3)
    config = dataclasses.replace(CONFIG, train=train)
    mesh = device_mesh.make_mesh(config.platform)
    model = deepsc.build(config, "cpu")
    step = make_train_step(config, "joint", model, mesh, jnp.ones(len(CLASSES)))
    current = jax.device_put(
        state.create(config, "joint", state.initial_params(config, model)),
        device_mesh.replicated(mesh),
    )
    dataset = pipeline.batches(store, "train", "joint", config, seed=0, batch_size=2)
    batch = device_mesh.put_batch(next(iter(dataset)), mesh)
    losses = []
    for _ in range(150):
        current, scalars = step(current, batch)
        losses.append({k: float(v) for k, v in scalars.items()})
    assert losses[-1]["cross_entropy"] < 0.1 * losses[0]["cross_entropy"]
    assert losses[-1]["dice"] < 0.6 * losses[0]["dice"]
