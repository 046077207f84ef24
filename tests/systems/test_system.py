"""The interface between the engine and all models, and that the engine trains whatever has it."""

import dataclasses
import math
import pathlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import stored
from counting import CONFIG, Counting, counting
from parity_network import CONFIG as DEEPSC
from parity_network import system_of
from sklearn import metrics
from stored import Scan

from deepsc_jax.data.batch import DEPTH_AXES, Reads
from deepsc_jax.data.store import Store, StoredCase
from deepsc_jax.inference.predictor import Predictor, abstract_state
from deepsc_jax.metrics.overlap import THRESHOLDS
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.models.torch_names import LINEAR, Rule
from deepsc_jax.runtime import device_mesh
from deepsc_jax.systems.system import (
    Batch,
    Stage,
    dice_at_thresholds,
    initial,
    inverse_frequency,
)
from deepsc_jax.training import loop
from deepsc_jax.training import state as states
from deepsc_jax.training.checkpoint import Checkpoints
from deepsc_jax.training.state import State
from deepsc_jax.training.step import make_eval_step, make_train_step

SYSTEM = counting()
FIRST, SECOND = SYSTEM.stages


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six training and four validation scans."""
    depths = zip((8, 5, 12, 9, 16, 3, 7, 11, 6, 8), 4 * (0, 1, 2), strict=False)
    scans = [
        Scan("train" if i < 6 else "validation", label, depth)
        for i, (depth, label) in enumerate(depths)
    ]
    return stored.write(tmp_path_factory.mktemp("store"), CONFIG.data, scans)


def same(found: Any, expected: Any) -> bool:
    """Whether two trees are alike to the last bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def newest(workdir: pathlib.Path, stage: Stage) -> State:
    """The state of a stage's newest checkpoint."""
    checkpoints = Checkpoints(workdir / stage.name)
    step = checkpoints.latest_step()
    assert step is not None
    contents = checkpoints.load(abstract_state(SYSTEM, stage), step)
    checkpoints.close()
    return contents["state"]


def test_stages_are_found_by_name_and_the_last_one_shapes_the_network():
    assert [SYSTEM.stage(name) for name in ("first", "second")] == [FIRST, SECOND]
    assert SYSTEM.init_reads == SECOND.reads
    assert (SECOND.steps, SECOND.batch, SECOND.after) == (1, 2, ("first",))
    joint = system_of(DEEPSC)
    names = [stage.name for stage in joint.stages]
    assert names == ["segmentation", "classification", "joint"]
    assert [stage.after for stage in joint.stages] == [(), (), ("segmentation", "classification")]
    assert joint.init_reads == Reads(tiles="all", slices=True)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_run_and_stage_has_a_seed_of_its_own(seed: int):
    train = dataclasses.replace(DEEPSC.train, seed=seed)
    joint = system_of(dataclasses.replace(DEEPSC, train=train))
    assert [joint.seed(stage) for stage in joint.stages] == [3 * seed + i for i in (1, 2, 3)]


def test_a_stage_after_none_starts_fresh_and_one_after_others_joins_their_parts():
    fresh = initial(SYSTEM)
    assert fresh["params"]["weight"].shape == (8 * 16, 3)
    assert same(fresh, initial(SYSTEM))
    other = jax.tree.map(lambda x: x + 1, fresh)
    assert same(SYSTEM.start(FIRST, fresh, {}), fresh)
    joined = SYSTEM.start(SECOND, fresh, {"first": other})
    assert same(joined["params"]["weight"], other["params"]["weight"])
    assert same(joined["params"]["bias"], fresh["params"]["bias"])
    assert same(joined["counts"], other["counts"])


def test_facts_are_inverse_frequencies_and_ones_of_no_cases(store: Store):
    def weights(cases: list[StoredCase]) -> Any:
        return SYSTEM.facts(FIRST, cases)["class_weights"]

    cases = store.cases("train")
    assert [case.label for case in cases] == [0, 1, 2, 0, 1, 2]
    # N / (3 n): of two, one and one 4 / 6, 4 / 3, 4 / 3; a class without a case counts as one.
    np.testing.assert_allclose(weights(cases[:4]), [2 / 3, 4 / 3, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(weights([]), np.ones(3))
    np.testing.assert_allclose(inverse_frequency(jnp.array([3, 0, 1])), [5 / 9, 5 / 3, 5 / 3])


def test_dice_at_every_threshold_by_hand():
    # Two of four voxels are lesion: at 0.1 three are found, two of them right; at 0.5 one; then 0.
    probability = jnp.array([[0.9, 0.45, 0.3, 0.05]] * 2)
    truth = jnp.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = dict(zip(THRESHOLDS, dice_at_thresholds(probability, truth).T, strict=True))
    at = {0.1: 4 / 5, 0.25: 4 / 5, 0.4: 1.0, 0.5: 2 / 3, 0.85: 2 / 3}
    for threshold, expected in at.items():
        assert found[threshold][0] == pytest.approx(expected), threshold
    assert all(math.isnan(row[1]) for row in found.values())  # there is no lesion to find


def test_a_record_is_the_best_mean_dice_and_the_macro_auc():
    dice = np.full((3, len(THRESHOLDS)), 0.2)
    dice[0, 3], dice[1, 3], dice[1, 5] = 0.9, 0.5, 0.8
    dice[2] = np.nan  # without a lesion
    labels = np.array([0, 1, 2, 0, 1])
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    auc = metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    of_lesions = SYSTEM.record(FIRST, {"dice": dice, "label": labels[:3]})
    assert of_lesions == pytest.approx(
        {"dsc": 0.7, "threshold": THRESHOLDS[3], "auc": None, "score": 0.7}
    )
    of_classes = SYSTEM.record(FIRST, {"probabilities": probabilities, "label": labels})
    assert of_classes == pytest.approx({"dsc": None, "threshold": None, "auc": auc, "score": auc})
    rows = {"dice": dice, "probabilities": probabilities, "label": labels}
    assert SYSTEM.record(FIRST, rows)["score"] == pytest.approx(0.7 + auc)


def test_the_learning_rate_falls_linearly_to_zero():
    rate = SYSTEM.learning_rate(FIRST)
    found = [np.asarray(rate(step)) for step in range(6)]
    np.testing.assert_allclose(found, [0.1, 0.075, 0.05, 0.025, 0, 0], atol=1e-8)


def batch_of(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "slices": rng.uniform(size=(count, 4, 8, 16)).astype(np.float32),
        "depth": np.full(count, 8, np.int32),
        "label": np.arange(count, dtype=np.int32) % 3,
    }


@pytest.mark.parametrize(
    ("devices", "parts", "loop_tiles"),
    [(1, 1, False), (2, 1, False), (2, 2, False), (2, 2, True), (1, 4, True), (4, 1, True)],
)
def test_a_carried_collection_passes_through_the_train_step(
    devices: int, parts: int, loop_tiles: bool
):
    system = counting(data_devices=devices, accumulation=parts, loop_tiles=loop_tiles)
    mesh = device_mesh.make_mesh(system.config.platform)
    facts = {"class_weights": jnp.array([0.5, 1.0, 2.0])}
    step = make_train_step(system, FIRST, mesh, facts)
    variables = initial(system)
    state = jax.device_put(states.create(system, FIRST, variables), device_mesh.replicated(mesh))
    assert state.carried.keys() == {"counts"}

    # The same steps, by hand: Adam on the mean over the whole batch, with no mesh at all.
    def mean_loss(params: Any, batch: Batch) -> jax.Array:
        logits = system.outputs(FIRST, {"params": params}, batch)["logits"]
        chosen = jax.nn.log_softmax(logits)[jnp.arange(4), batch["label"]]
        return -(facts["class_weights"][batch["label"]] * chosen).mean()

    params: Any = jax.tree.map(jnp.array, variables["params"])  # the state is donated
    adam = system.optimizer(FIRST)
    moments = adam.init(params)
    for number in range(2):
        batch = batch_of(4, number)
        state, scalars = step(state, device_mesh.put_batch(batch, mesh, DEPTH_AXES))
        loss, gradient = jax.value_and_grad(mean_loss)(params, jax.tree.map(jnp.asarray, batch))
        updates, moments = adam.update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)
        counts = jax.device_get(state.carried["counts"])
        assert counts == {"batches": parts * (number + 1), "scans": 4 * (number + 1)}
    # Adam divides a gradient by its own size: rounding grows where it is near zero.
    for name, expected in params.items():
        np.testing.assert_allclose(state.params[name], expected, rtol=0, atol=1e-4, err_msg=name)
    for shard in state.carried["counts"]["scans"].addressable_shards:
        assert shard.data == 8  # on every device
    assert state.variables.keys() == {"params", "counts"}


def test_an_evaluation_has_a_row_of_measures_for_each_example():
    mesh = device_mesh.make_mesh(CONFIG.platform)
    batch, variables = batch_of(4, 0), initial(SYSTEM)
    measure = make_eval_step(SYSTEM, FIRST, mesh)
    found = measure(variables, device_mesh.put_batch(batch, mesh, DEPTH_AXES))
    expected = SYSTEM.measures(FIRST, variables, jax.tree.map(jnp.asarray, batch))
    assert found.keys() == expected.keys() == {"probabilities"}
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], rtol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bits_with_what_it_carries(
    store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped after step 3, with a checkpoint at 2: step 3 is taken again."""

    class StoppedError(Exception):
        pass

    def stop(self: loop.Progress, step: int, **_: float) -> None:
        if step == 3:
            raise StoppedError

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert loop.train(SYSTEM, store, whole, (FIRST,))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "show", stop)
        with pytest.raises(StoppedError):
            loop.train(SYSTEM, store, stopped, (FIRST,))
    half = newest(stopped, FIRST)
    assert (int(half.step), int(half.carried["counts"]["scans"])) == (2, 8)
    assert loop.train(SYSTEM, store, stopped, (FIRST,))
    expected, found = newest(whole, FIRST), newest(stopped, FIRST)
    assert same(found, expected)  # step, parameters, counts and Adam's moments
    assert jax.device_get(found.carried) == {"counts": {"batches": 4, "scans": 16}}
    assert not same(found.params, half.params)


def test_a_later_stage_starts_from_the_best_checkpoint_of_the_one_before(
    store: Store, tmp_path: pathlib.Path
):
    assert loop.train(SYSTEM, store, tmp_path, SYSTEM.stages)
    with_records = Checkpoints(tmp_path / "first")
    best = with_records.best_step()
    assert best is not None
    first = with_records.load(abstract_state(SYSTEM, FIRST), best)["state"]
    with_records.close()
    second = newest(tmp_path, SECOND)  # of one step, at a learning rate of 0
    assert same(second.params["weight"], first.params["weight"])
    assert same(second.params["bias"], initial(SYSTEM)["params"]["bias"])
    assert not same(second.params["weight"], initial(SYSTEM)["params"]["weight"])
    counts = jax.device_get(first.carried["counts"])
    assert jax.device_get(second.carried["counts"]) == {
        "batches": counts["batches"] + 1,
        "scans": counts["scans"] + 2,
    }


def test_what_is_carried_for_training_alone_does_not_go_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
):
    interop = pytest.importorskip("deepsc_jax.interop.torch", reason="needs torch")
    names = (Rule("weight", "linear.weight", LINEAR), Rule("bias", "linear.bias"))
    system = counting()
    monkeypatch.setattr(system.model, "TORCH_NAMES", names, raising=False)
    variables = initial(system)
    assert "counts" in variables
    weights = interop.variables_to_torch(system.exported(variables), system.torch_names)
    assert weights.keys() == {"linear.weight", "linear.bias"}
    back = interop.run_variables(system, {name: 2 * x for name, x in weights.items()})
    assert same(back["counts"], variables["counts"])
    assert same(back["params"], jax.tree.map(lambda x: 2 * x, variables["params"]))


def test_another_data_set_takes_the_same_program():
    """Class weights are an argument: as constants of the program they had it compiled anew."""
    mesh = device_mesh.make_mesh(CONFIG.platform)
    state = states.create(SYSTEM, FIRST, initial(SYSTEM))
    batch = device_mesh.put_batch(batch_of(4, 0), mesh, DEPTH_AXES)
    texts = [
        make_train_step(SYSTEM, FIRST, mesh, {"class_weights": jnp.array(weights)})
        .lower(state, batch)
        .as_text()
        for weights in ([0.5, 1.0, 2.0], [3.0, 0.25, 1.5])
    ]
    assert texts[0] == texts[1]


class OnPlateau(Counting):
    """Halves its rate at every step but the first: no loss falls by so much."""

    def optimizer(self, stage: Stage) -> optax.GradientTransformation:
        del stage
        plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.0, atol=1e9)
        return optax.chain(optax.sgd(0.1), plateau)

    def rate_taken(self, stage: Stage, step: Any, opt_state: Any) -> Any:
        del stage, step
        return 0.1 * opt_state[1].scale


def test_an_optimizer_is_told_the_loss_and_the_log_its_own_rate():
    system = OnPlateau(CONFIG, Layout(), ModuleType("linear"))
    mesh = device_mesh.make_mesh(CONFIG.platform)
    facts = {"class_weights": jnp.ones(3)}
    step = make_train_step(system, FIRST, mesh, facts)
    state = states.create(system, FIRST, initial(system))
    state = jax.device_put(state, device_mesh.replicated(mesh))
    rates = []
    for number in range(3):
        batch = device_mesh.put_batch(batch_of(4, number), mesh, DEPTH_AXES)
        state, scalars = step(state, batch)
        rates.append(float(scalars["learning_rate"]))
    assert rates == pytest.approx([0.1, 0.05, 0.025])


def test_it_predicts_and_what_it_carries_is_part_of_the_network_that_is_named():
    variables = initial(SYSTEM)
    predictor = Predictor(SYSTEM, FIRST, variables, 0.5, "scans")
    found = predictor(np.ones((5, 8, 16), np.float32))
    assert found.lesion is None
    assert found.classes is not None
    assert found.classes.sum() == pytest.approx(1)
    counts = {"batches": jnp.int32(1), "scans": jnp.int32(0)}
    other = Predictor(SYSTEM, FIRST, variables | {"counts": counts}, 0.5, "scans")
    assert predictor.network.volumes == ()
    assert predictor.network.digest != other.network.digest
