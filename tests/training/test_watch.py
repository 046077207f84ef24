"""Watching: what is said by it, and that it changes nothing."""

import dataclasses
import io
import json
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest
import stored
from PIL import Image
from stored import Scan
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data import pipeline
from deepsc_jax.data.batch import DEPTH_AXES, Reads
from deepsc_jax.data.store import Store
from deepsc_jax.models.deepsc.config import JointTraining, PreTraining
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.building import build
from deepsc_jax.systems.decoding import decode
from deepsc_jax.systems.system import (
    Batch,
    Facts,
    Losses,
    Predict,
    Stage,
    System,
    Variables,
    dice_at_thresholds,
    initial,
)
from deepsc_jax.systems.watching import lesion_figures, plane
from deepsc_jax.training import loop
from deepsc_jax.training import state as states
from deepsc_jax.training.checkpoint import Checkpoints
from deepsc_jax.training.meters import TIMED, StepClock
from deepsc_jax.training.step import make_eval_step, make_train_step
from deepsc_jax.training.watch import make_watch, relations, strip

DATA = DataConfig(working_size=(16, 16), tile=(8, 16, 16), depth_bucket=8, slices=8)
CONFIG = Config(
    dataclasses.replace(smallest.MODEL, segmentation=PreTraining(steps=4, batch=4)),
    DATA,
    TrainConfig(log_every=1, evaluate_every=2, checkpoint_every=4),
    PlatformConfig(data_devices=1),
)
NO_FACTS: Facts = {"class_weights": jnp.ones(3)}


class Two(System):
    """Two terms of four numbers, of which `one` and `other` have one each to themselves."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        options = self.config.stage("segmentation")
        reads = Reads(tiles="drawn")
        return (Stage("segmentation", reads, ("lesions",), options.steps, options.batch),)

    def init(self, key: Any, batch: Batch) -> Variables:
        del key, batch
        return {
            "params": {
                "both": jnp.asarray([0.7, 0.1]),
                "one": jnp.ones(1),
                "other": jnp.asarray(0.5),
            }
        }

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        del stage, facts
        params = variables["params"]
        mean, lesion = (batch[k].mean((1, 2, 3, 4)) for k in ("tiles", "lesions"))
        x = params["both"][0] * mean + params["both"][1]
        one, other = (x * params["one"][0] - 2) ** 2, (x - params["other"] + lesion) ** 2
        return {"one": one, "other": other, "loss": one + 3 * other}, {}

    def weighted(self, stage: Stage, terms: Losses) -> Losses:
        del stage
        return {"one": terms["one"], "other": 3 * terms["other"]}

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Any]:
        del stage
        return {"lesion": batch["tiles"] * variables["params"]["both"][0]}

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Any]:
        lesion = self.outputs(stage, variables, batch)["lesion"]
        return {"dice": dice_at_thresholds(lesion, batch["lesions"])}

    def watched(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Any]:
        del stage, variables
        found, truth = jnp.ones_like(batch["tiles"]), batch["lesions"] > 0
        size, middle = self.config.data.working_size, batch["depth"] // 2
        figures = lesion_figures(found, truth, batch["label"] == 2, batch["voxel_ml"])
        return figures | {"scan": plane(batch["tiles"], batch["origins"], middle, size)}

    def watched_parameters(self, stage: Stage, params: Any) -> dict[str, Any]:
        del stage
        return {"other_weight": params["other"]}

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        del stage
        return ()

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        raise NotImplementedError


def system_of(watch_every: int = 0, **platform: int) -> Two:
    config = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, watch_every=watch_every),
        platform=dataclasses.replace(CONFIG.platform, **platform),
    )
    return Two(config, build(config, "cpu").layout, sys)  # of the module nothing is used


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    scans = [Scan("train", i % 3, 8) for i in range(6)]
    scans += [Scan("validation", label, 8) for label in (0, 2, 2, 1, 0, 1)]
    return stored.write(tmp_path_factory.mktemp("store"), DATA, scans)


@pytest.fixture(scope="module")
def runs(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[int, pathlib.Path]:
    """A run that was watched at every second step, and one that was not."""
    folders = {every: tmp_path_factory.mktemp(f"watched{every}") for every in (0, 2)}
    for every, folder in folders.items():
        system = system_of(every)
        assert loop.train(system, store, folder, system.stages)
    return folders


def lines(run: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final(run: pathlib.Path) -> states.State:
    system = system_of()
    like = states.create(system, system.stages[0], initial(system))
    checkpoints = Checkpoints(run / "segmentation")
    state = checkpoints.load(jax.device_put(like, jax.devices()[0]), 4)["state"]
    checkpoints.close()
    return state


def test_watched_or_not_a_run_ends_with_the_same_bits(runs: dict[int, pathlib.Path]) -> None:
    jax.tree.map(np.testing.assert_array_equal, final(runs[0]), final(runs[2]))
    steps = [
        [{k: v for k, v in line.items() if k not in TIMED} for line in lines(run) if "loss" in line]
        for run in runs.values()
    ]
    assert steps[0] == steps[1]
    records = [
        (run / "segmentation" / "4" / "validation.json").read_text() for run in runs.values()
    ]
    assert records[0] == records[1]


def test_a_run_that_is_not_watched_has_the_program_it_had_and_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    texts = []
    for every in (0, 2):
        system = system_of(every)
        mesh = device_mesh.make_mesh(system.config.platform)
        step = make_train_step(system, system.stages[0], mesh, NO_FACTS)
        state, batch = at_start(system, store, mesh)
        texts.append(step.lower(state, batch).as_text())
    assert texts[0] == texts[1]

    def none(*_: object, **__: object) -> Any:
        raise AssertionError("nothing is to be watched")

    monkeypatch.setattr(Two, "watched", none)
    monkeypatch.setattr(Two, "watched_parameters", none)
    monkeypatch.setattr("deepsc_jax.training.stage.make_watch", none)
    system = system_of()
    assert loop.train(system, store, tmp_path, system.stages)


def test_the_terms_norms_and_cosine_make_the_norm_of_the_steps_gradient(
    runs: dict[int, pathlib.Path],
) -> None:
    watched = [line for line in lines(runs[2]) if "gradient_norm_one" in line]
    assert [line["step"] for line in watched] == [2, 4]
    assert not any("gradient_norm_one" in line for line in lines(runs[0]))
    taken = {line["step"]: line for line in lines(runs[2]) if "loss" in line}
    for line in watched:
        assert line.keys() == {
            "stage",
            "step",
            "gradient_norm_one",
            "gradient_norm_other",
            "gradient_cosine_one_other",
            "other_weight",
        }
        assert -1 <= line["gradient_cosine_one_other"] <= 1
        # Each has a number to itself, so the cosine of what they share says no more than a bound.
        one, other = line["gradient_norm_one"], line["gradient_norm_other"]
        total = taken[line["step"]]["gradient_norm"]
        assert abs(one - other) <= total * (1 + 1e-6)
        assert total <= (one + other) * (1 + 1e-6)


def at_start(system: Two, store: Store, mesh: Any) -> tuple[states.State, Batch]:
    stage = system.stages[0]
    batches = iter(
        pipeline.batches(store, "train", stage.reads, system.config, seed=0, batch_size=4)
    )
    batch = device_mesh.put_batch(next(batches), mesh, DEPTH_AXES)
    batches.close()
    state = states.create(system, stage, initial(system))
    return jax.device_put(state, device_mesh.replicated(mesh)), batch


@pytest.mark.parametrize("platform", [{}, {"data_devices": 2}, {"accumulation": 2}])
def test_gradients_of_terms_are_those_of_the_mean_over_the_batch_however_it_is_split(
    store: Store, platform: dict[str, int]
) -> None:
    system = system_of(1, **platform)
    stage, mesh = system.stages[0], device_mesh.make_mesh(system.config.platform)
    state, batch = at_start(system, store, mesh)
    found = make_watch(system, stage, mesh, NO_FACTS)(state, batch)

    alone = system_of(1)
    mesh = device_mesh.make_mesh(alone.config.platform)
    state, batch = at_start(alone, store, mesh)
    seen = decode(batch, stage.reads, DATA, alone.config.train)

    def gradient(name: str) -> Any:
        def mean(params: Any) -> Any:
            terms, _ = alone.losses(stage, {"params": params}, seen, NO_FACTS)
            return alone.weighted(stage, terms)[name].mean()

        return jax.grad(mean)(state.params)

    one, other = gradient("one"), gradient("other")
    for name, tree in (("one", one), ("other", other)):
        norm = math.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(tree)))
        # Sums of four scans in another order, in float32.
        assert found[f"gradient_norm_{name}"] == pytest.approx(norm, rel=1e-5)
    both = [np.asarray(tree["both"], float) for tree in (one, other)]
    cosine = both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1])
    assert found["gradient_cosine_one_other"] == pytest.approx(cosine, abs=1e-5)
    assert found["other_weight"] == 0.5


def test_norms_and_cosines_by_hand() -> None:
    found = relations(
        {
            "a": {"x": jnp.asarray([3.0, 4.0]), "y": jnp.asarray([12.0])},
            "b": {"x": jnp.asarray([4.0, 3.0]), "y": jnp.asarray([0.0])},
            "c": {"x": jnp.asarray([0.0, 0.0]), "y": jnp.asarray([-2.0])},
        }
    )
    assert {name: float(x) for name, x in found.items()} == pytest.approx(
        {
            "gradient_norm_a": 13.0,
            "gradient_norm_b": 5.0,
            "gradient_norm_c": 2.0,
            "gradient_cosine_a_b": 24 / 25,  # on x
            "gradient_cosine_a_c": -1.0,  # on y
            "gradient_cosine_b_c": math.nan,
        },
        nan_ok=True,
    )


def test_validation_says_what_is_found_in_scans_with_lesions_and_without(
    runs: dict[int, pathlib.Path], store: Store
) -> None:
    said = [line for line in lines(runs[2]) if "validation_score" in line]
    assert [line["step"] for line in said] == [2, 4]
    # All of every tile is marked: 8 x 16 x 16 voxels of 1 mm³, of which 4 are a lesion.
    lesion = [case.lesion_voxels for case in store.cases("validation") if case.lesion_voxels]
    expected = np.mean([2 * count / (2048 + count) for count in lesion])
    for line in said:
        assert line["validation_lesion_free_ml"] == pytest.approx(2.048, rel=1e-6)
        assert line["validation_lesion_dsc"] == pytest.approx(expected, rel=1e-6)
    assert not any("validation_lesion_free_ml" in line for line in lines(runs[0]))


def test_tensorboard_shows_scans_of_validation(runs: dict[int, pathlib.Path], store: Store) -> None:
    images: dict[str, list[Any]] = {}
    for file in (runs[2] / "tensorboard" / "segmentation").iterdir():
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith("validation/"):
                    images.setdefault(value.tag, []).append((event.step, value))
    names = [case.name for case in store.cases("validation")]
    assert sorted(images) == sorted(f"validation/{names[i]}" for i in (0, 2, 3, 5))
    case = store.cases("validation")[2]
    (first, value), (last, _) = images[f"validation/{case.name}"]
    assert (first, last) == (2, 4)
    encoded = value.image.encoded_image_string or value.tensor.string_val[2]
    picture = np.asarray(Image.open(io.BytesIO(encoded)))
    expected = np.round(store.read(case.name, "volume")[4] * 255)
    assert picture.shape == (16, 17)
    # Stored in 16 bits, shown in 8.
    np.testing.assert_allclose(picture[:, :16], expected, atol=1)


def test_pictures_stand_beside_each_other_in_one_height() -> None:
    one, two = np.full((4, 4), 1.0), np.asarray([[0.0, 0.5], [np.nan, 2.0]])
    expected = np.asarray(
        [
            [255, 255, 255, 255, 0, 0, 0, 128, 128, 0],
            [255, 255, 255, 255, 0, 0, 0, 128, 128, 0],
            [255, 255, 255, 255, 0, 0, 0, 255, 255, 0],
            [255, 255, 255, 255, 0, 0, 0, 255, 255, 0],
        ]
    )
    np.testing.assert_array_equal(strip({"one": one, "two": two}), expected)


def test_the_share_of_waiting_is_of_the_time_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("deepsc_jax.training.meters.time.monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    clock = StepClock(0)
    with clock.waiting():
        passes(100)
    clock.restart()  # what comes before the first step does not count
    with clock.waiting():
        passes(1)
    with clock.paused():
        passes(50)
    passes(3)
    assert clock.rates(2, 8) == {
        "seconds_per_step": 2.0,
        "scans_per_second": 4.0,
        "loader_share": 0.25,
    }
    passes(2)
    assert clock.rates(3, 8)["loader_share"] == 0


@pytest.mark.slow
def test_deepscs_joint_stage_is_watched(store: Store) -> None:
    model = dataclasses.replace(CONFIG.model, joint=JointTraining(steps=4, batch=4))
    config = dataclasses.replace(CONFIG, model=model)
    system, mesh = build(config, "cpu"), device_mesh.make_mesh(CONFIG.platform)
    stage = system.stage("joint")
    batches = iter(pipeline.batches(store, "train", stage.reads, config, seed=0, batch_size=4))
    batch = device_mesh.put_batch(next(batches), mesh, DEPTH_AXES)
    batches.close()
    state = states.create(system, stage, initial(system))
    state = jax.device_put(state, device_mesh.replicated(mesh))
    found = make_watch(system, stage, mesh, NO_FACTS)(state, batch)
    for name in ("dice", "focal", "lesion_free", "cross_entropy"):
        assert found[f"gradient_norm_{name}"] > 0
    assert found["cross_stitch_ll"] == pytest.approx(0.9)
    evaluated = make_eval_step(system, stage, mesh, watched=True)
    shown = evaluated(state.variables, batch | {"voxel_ml": jnp.ones(4)})
    assert shown["watched evidence_1"].shape == (4, 8, 8)
    lesions = np.asarray([bool((batch["lesion"][i] > 0).any()) for i in range(4)])
    np.testing.assert_array_equal(np.isfinite(shown["watched scale_1_max"]), lesions)
    np.testing.assert_array_equal(np.isfinite(shown["watched lesion_free_ml"]), ~lesions)
