"""Distillation against PyTorch: the loss, a student's steps, and whose soft labels it is given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest_cnncf
import stored
import torch
from parity import DTYPES, TRAINING, VALUES, relative, to_tensors
from parity_norms import draw
from reference import cnncf as reference
from reference.cnncf import distillation as theirs
from reference.cnncf.network import CNNCF
from stored import Scan

from deepsc_jax.data import pipeline
from deepsc_jax.data.store import Store
from deepsc_jax.interop import torch as interop
from deepsc_jax.models.cnncf import distillation, gate, network
from deepsc_jax.models.layers.batch_norm import BATCH_STATS
from deepsc_jax.runtime import device_mesh
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

SLOW = pytest.mark.slow
STEPS = 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation(temperature: float, dtype: str, within: Any) -> None:
    student, *others = np.random.default_rng(0).normal(0, 3, size=(5, 6, 3))
    teachers, kind = np.stack(others, axis=1), getattr(torch, dtype)
    of_student = torch.tensor(student, dtype=kind, requires_grad=True)
    loss = theirs.loss(of_student, torch.tensor(teachers, dtype=kind), temperature)
    loss.backward()
    assert of_student.grad is not None
    with jax.enable_x64(dtype == "float64"):

        def ours(logits: Any) -> Any:
            soft = distillation.soft_labels(jnp.asarray(teachers, dtype), temperature)
            return distillation.distillation_loss(logits, soft, temperature).mean()

        value, gradient = jax.value_and_grad(ours)(jnp.asarray(student, dtype))
    bound = VALUES[dtype]
    measured = {
        "values": (relative(value, loss.detach().numpy()), bound),
        "input gradients": (relative(gradient, of_student.grad.numpy()), 10 * bound),
    }
    within("distillation", dtype, measured)


def test_a_hard_label_is_no_special_case_of_distillation() -> None:
    """A teacher's probability of exactly 0 adds nothing."""
    loss = distillation.distillation_loss(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), 1.0)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    mixed = distillation.student_loss(jnp.array([4.0]), jnp.array([1.0]), 0.25)
    np.testing.assert_allclose(mixed, 3.25)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("paper", "float64"),
        pytest.param("paper", "float32", marks=SLOW),
        pytest.param("published", "float64", marks=SLOW),
    ],
)
def test_steps_of_a_student(variant: str, dtype: str, within: Any) -> None:
    """The gate is open, so that stage II learns."""
    config = smallest_cnncf.config(variant=variant, teachers=2)
    system = smallest_cnncf.system(config, dtype)
    stage = system.stages[-1]
    batches = []
    for seed in range(STEPS):
        batch = smallest_cnncf.batch(1, seed)
        said = np.random.default_rng(seed).normal(0, 2, (len(batch["label"]), 2, 3))
        batches.append(batch | {"teachers": said})
    x = jnp.zeros((*batches[0]["slices"].shape, 1))
    single = smallest_cnncf.system(config).network  # of the same parameters
    variables = draw(lambda key: single.init(key, x, train=True))
    carried = {gate.COLLECTION: smallest_cnncf.state(True)} if variant == "paper" else {}

    module = reference.network(config).to(getattr(torch, dtype))
    exported = interop.variables_to_torch({**variables, **carried}, network.TORCH_NAMES)
    module.load_state_dict(exported)
    assert not isinstance(module, CNNCF) or module.gate.open
    weights = torch.tensor(smallest_cnncf.CLASS_WEIGHTS, dtype=getattr(torch, dtype))
    tensors = (to_tensors(b, dtype) for b in batches)
    expected = list(reference.train(module, config, stage.name, tensors, weights))
    assert all(row["distillation"] > 0 for row in expected)

    with jax.enable_x64(dtype == "float64"):
        mesh = device_mesh.make_mesh(config.platform)
        given = smallest_cnncf.cast({**variables, **carried}, dtype)
        current = jax.device_put(states.create(system, stage, given), device_mesh.replicated(mesh))
        facts = {"class_weights": jnp.asarray(smallest_cnncf.CLASS_WEIGHTS, dtype)}
        step, found = make_train_step(system, stage, mesh, facts), []
        for arrays in batches:
            placed = jax.device_put(
                smallest_cnncf.cast(arrays, dtype), device_mesh.batch_sharding(mesh)
            )
            current, scalars = step(current, placed)
            found.append({name: float(scalars[name]) for name in expected[0]})
        final = jax.device_get(current.variables)

    bound = TRAINING[dtype]
    measured = {
        f"{name} at each step": (
            max(relative(o[name], t[name]) for o, t in zip(found, expected, strict=True)),
            bound,
        )
        for name in ("loss", "cross_entropy", "distillation")
    }
    left = module.state_dict()
    for title, collection in (("parameters", "params"), ("running statistics", BATCH_STATS)):
        of_torch = interop.from_torch(left, network.TORCH_NAMES, collection=collection)
        measured[f"{title} at the end"] = (relative(final[collection], of_torch), bound)
    within("steps of a student", dtype, measured)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    scans = [Scan("train", label, 8) for label in (0, 1, 2, 0, 1, 2, 0)]
    return stored.write(tmp_path_factory.mktemp("store"), smallest_cnncf.DATA, scans)


def test_a_batch_holds_the_soft_labels_of_its_own_cases(store: Store) -> None:
    cases = store.cases("train")
    said = {case.name: np.full((2, 3), i, np.float32) for i, case in enumerate(cases)}
    first = np.zeros(1, int)
    images = {store.read_slices(c.name, first).tobytes(): i for i, c in enumerate(cases)}
    config = smallest_cnncf.config(teachers=2)
    reads = smallest_cnncf.system(config).stages[-1].reads
    read = iter(pipeline.batches(store, "train", reads, config, seed=1, batch_size=2, taught=said))
    for _ in range(8):
        batch = next(read)
        for image, logits in zip(batch["slices"], batch["teachers"], strict=True):
            assert (logits == images[image.tobytes()]).all()
    read.close()


def test_of_each_fold_are_left_the_cases_that_are_held_out_or_the_others(store: Store) -> None:
    """Every case is held out once, of three folds of seven patients."""
    held_out = []
    for i in range(3):
        fold = {c.name for c in store.of_fold(i, 3, held_out=True).cases("train")}
        others = {c.name for c in store.of_fold(i, 3, held_out=False).cases("train")}
        assert len(fold) in (2, 3)
        assert fold | others == {c.name for c in store.cases("train")}
        assert not fold & others
        held_out += fold
    assert sorted(held_out) == sorted(c.name for c in store.cases("train"))
