"""CNNCF, CNNRF and the teachers against PyTorch: steps, thirty of them, names and numbers."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest_cnncf
import torch
from monai.networks.nets.resnet import ResNet, ResNetBlock, ResNetBottleneck
from parity import (
    DTYPES,
    JOINT_GRADIENTS,
    JOINT_VALUES,
    TRAINING,
    VALUES,
    channel_first,
    relative,
    to_tensors,
)
from parity_norms import against, draw, step_errors
from reference import cnncf as reference
from reference.cnncf.network import CNNCF
from reference.cnncf.regressor import CNNRF
from smallest_cnncf import PATCHES

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.interop import torch as interop
from deepsc_jax.models.cnncf import gate, network, regressor
from deepsc_jax.models.cnncf.config import Options, RegressorOptions
from deepsc_jax.models.cnncf.residual import BASIC, TEACHERS, ResNet2D, Shape
from deepsc_jax.models.cnncf.torch_names import RESIDUAL_NAMES
from deepsc_jax.models.layers.batch_norm import BATCH_STATS
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime import device_mesh
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

SLOW = pytest.mark.slow
CASES = [
    pytest.param({}, 1, True, "float64", id="xray-open-float64"),
    pytest.param({}, 1, True, "float32", id="xray-open-float32", marks=SLOW),
    pytest.param({}, 6, False, "float64", id="ct-shut-float64"),
    pytest.param({"mix": "full", "gate_pool": "gap"}, 4, True, "float64", id="full", marks=SLOW),
    pytest.param({"pseudo_colour": "jet"}, 1, False, "float32", id="jet", marks=SLOW),
    pytest.param({"variant": "published"}, 1, True, "float64", id="published-float64"),
    pytest.param({"variant": "published"}, 6, True, "float32", id="published", marks=SLOW),
]


@pytest.mark.parametrize(("options", "slices", "is_open", "dtype"), CASES)
def test_a_training_step(
    options: dict[str, Any], slices: int, is_open: bool, dtype: str, within: Any
):
    config = smallest_cnncf.config(slices, **options)
    flax = smallest_cnncf.system(config, dtype).network
    carried: Any = {}
    if config.model.variant == "paper":  # pyright: ignore
        carried = {gate.COLLECTION: smallest_cnncf.state(is_open)}
    x = smallest_cnncf.batch(slices)["slices"]
    outputs = ("stage1_logits", "stage2_logits", "logits") if carried else ("logits",)

    def ours(variables: Any, x: Any, train: bool) -> Any:
        out: Any
        out, moved = flax.apply(
            {**variables, **carried}, x[..., None], train=train, mutable=[BATCH_STATS]
        )
        return [out[name] for name in outputs], moved[BATCH_STATS]

    module = reference.network(config)
    if isinstance(module, CNNCF):
        module.gate.open.fill_(is_open)

    def theirs(x: torch.Tensor) -> list[torch.Tensor]:
        if not isinstance(module, CNNCF):
            return [module.logits(x)]
        first, second = module(x)
        return [first, second, second if is_open else first]

    single = smallest_cnncf.system(config).network  # of the same parameters
    variables = draw(lambda key: single.init(key, jnp.zeros((*x.shape, 1)), train=True))
    errors = step_errors(ours, theirs, module, variables, [x], dtype, network.TORCH_NAMES)
    within("CNNCF", dtype, against(errors, JOINT_VALUES[dtype], JOINT_GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=SLOW)])
def test_a_training_step_of_cnnrf(dtype: str, within: Any):
    options = RegressorOptions(stem=4, widths=(6, 8, 10), hidden=(7, 5))
    data = DataConfig(indicators=("a", "b", "c"))
    flax = regressor.build(options, data, Layout(dtype=jnp.dtype(dtype)))
    single = regressor.build(options, data, Layout())  # of the same parameters
    x = np.random.default_rng(0).uniform(size=(4, 24, 16, 3))

    def ours(variables: Any, x: Any, train: bool) -> Any:
        out: Any
        out, moved = flax.apply(variables, x, train=train, mutable=[BATCH_STATS])
        return [out["values"]], moved[BATCH_STATS]

    module = CNNRF(options, 3)
    variables = draw(lambda key: single.init(key, jnp.zeros(x.shape), train=True))
    errors = step_errors(
        ours,
        lambda x: [module(channel_first(x))],
        module,
        variables,
        [x],
        dtype,
        regressor.TORCH_NAMES,
    )
    within("CNNRF", dtype, against(errors, JOINT_VALUES[dtype], JOINT_GRADIENTS[dtype]))


def test_the_loss_of_cnnrf_is_the_mean_squared_error():
    given, truth = np.random.default_rng(0).uniform(size=(2, 6, 5))
    config = Config(RegressorOptions(), PATCHES)
    terms, _ = regressor.losses(config, {"values": jnp.asarray(given)}, {}, jnp.asarray(truth))
    expected = torch.nn.functional.mse_loss(torch.tensor(given), torch.tensor(truth))
    np.testing.assert_allclose(terms["loss"].mean(), expected.item(), rtol=1e-6)


@SLOW
@pytest.mark.parametrize("dtype", DTYPES)
def test_thirty_steps_in_which_the_gate_opens(dtype: str, within: Any):
    config = smallest_cnncf.config()
    system = smallest_cnncf.system(config, dtype)
    (stage,) = system.stages
    batches = [smallest_cnncf.batch(1, seed) for seed in range(30)]
    x = jnp.zeros((*batches[0]["slices"].shape, 1))
    single = smallest_cnncf.system(config).network  # of the same parameters
    variables = draw(lambda key: single.init(key, x, train=True))
    variables |= {gate.COLLECTION: gate.shut()}

    module = reference.network(config).to(getattr(torch, dtype))
    module.load_state_dict(interop.variables_to_torch(variables, network.TORCH_NAMES))
    weights = torch.tensor(smallest_cnncf.CLASS_WEIGHTS, dtype=getattr(torch, dtype))
    tensors = (to_tensors(b, dtype) for b in batches)
    theirs, counters = [], []
    for row in reference.train(module, config, stage.name, tensors, weights):
        theirs.append(row)
        assert isinstance(module, CNNCF)
        counters.append({name: x.item() for name, x in module.gate.named_buffers()})
    assert [row["gate_open"] for row in theirs] == [0] * 12 + [1] * 18

    with jax.enable_x64(dtype == "float64"):
        mesh = device_mesh.make_mesh(config.platform)
        state = states.create(system, stage, smallest_cnncf.cast(variables, dtype))
        current = jax.device_put(state, device_mesh.replicated(mesh))
        facts = {"class_weights": jnp.asarray(smallest_cnncf.CLASS_WEIGHTS, dtype)}
        step, ours = make_train_step(system, stage, mesh, facts), []
        for arrays, expected in zip(batches, counters, strict=True):
            given = smallest_cnncf.cast(arrays, dtype)
            current, scalars = step(
                current, jax.device_put(given, device_mesh.batch_sharding(mesh))
            )
            ours.append({name: float(scalars[name]) for name in theirs[0]})
            counted = {n: x.item() for n, x in current.carried[gate.COLLECTION].items()}
            assert counted == pytest.approx(expected, rel=1e-6)  # shares are float32 here
        final = jax.device_get(current.variables)

    bound = TRAINING[dtype]
    measured = {
        f"{name} at each step": (
            max(relative(o[name], t[name]) for o, t in zip(ours, theirs, strict=True)),
            bound,
        )
        for name in ("loss", "cross_entropy", "gate_cross_entropy")
    }
    left = module.state_dict()
    for title, collection in (("parameters", "params"), ("running statistics", BATCH_STATS)):
        expected = interop.from_torch(left, network.TORCH_NAMES, collection=collection)
        measured[f"{title} at the end"] = (relative(final[collection], expected), bound)
    within("30 steps, CNNCF", dtype, measured)


def monai(shape: Shape, classes: int) -> ResNet:
    """Of the published networks."""
    return ResNet(
        ResNetBlock if shape.kernels == BASIC else ResNetBottleneck,
        list(shape.blocks),
        list(shape.widths),
        spatial_dims=2,
        n_input_channels=3,
        conv1_t_size=3,
        conv1_t_stride=1,
        no_max_pool=True,
        num_classes=classes,
        bias_downsample=False,
    )


PUBLISHED = Shape(BASIC, (2, 1, 2, 1))
NETWORKS = pytest.mark.parametrize(
    ("shape", "parameters"),
    [*zip((PUBLISHED, *TEACHERS), (6153794, 7334466, 6449218, 9270338, 9550402), strict=True)],
)


@NETWORKS
def test_published_networks_have_monais_numbers_and_names(shape: Shape, parameters: int):
    with torch.device("meta"):
        theirs = monai(shape, 2)
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    flax = ResNet2D(shape, 2)
    variables = zeros_of(lambda key: flax.init(key, jnp.zeros((1, 32, 32, 3)), None, train=True))
    assert numbers(variables["params"]) == parameters
    weights = interop.variables_to_torch(variables, RESIDUAL_NAMES)
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in weights.items()} == expected


@NETWORKS
def test_published_networks_compute_what_monais_do(shape: Shape, parameters: int, within: Any):
    narrow = Shape(shape.kernels, shape.blocks, (4, 6, 8, 10))
    flax, x = ResNet2D(narrow, 2), np.random.default_rng(0).uniform(size=(2, 24, 20, 3))
    variables = draw(lambda key: flax.init(key, jnp.zeros(x.shape), None, train=True))
    theirs = monai(narrow, 2)
    theirs.load_state_dict(interop.variables_to_torch(variables, RESIDUAL_NAMES))
    with torch.no_grad():
        expected = theirs.eval()(channel_first(torch.from_numpy(x).float())).numpy()
    out: Any = jax.jit(lambda v, x: flax.apply(v, x, None, train=False))(variables, x)
    found = {"values": (relative(out["logits"], expected), VALUES["float32"])}
    within("published networks", "float32", found)


@pytest.mark.parametrize(
    ("options", "slices", "classes", "parameters"),
    [
        ({}, 1, 2, 9_493_956),
        ({}, 1, 3, 7_397_315 + 3_145_731),
        ({"gate_pool": "gap"}, 1, 2, 7_396_802 + 2 * 257),
        ({}, 300, 2, 9_493_956 + 303),
        ({"mix": "full"}, 300, 2, 9_493_956 + 903),
        ({"variant": "published"}, 1, 2, 6_153_794),
    ],
)
def test_the_full_size_network_has_its_number_of_parameters_and_names(
    options: dict[str, Any], slices: int, classes: int, parameters: int
):
    names = ("covid-19", "non-pneumonia", "cap")[:classes]
    data = DataConfig(slices=slices, classes=names)
    config = Config(Options(**options), data)
    flax = network.build(config.model, data, Layout())  # pyright: ignore
    x = jnp.zeros((1, slices, 512, 512, 1))
    variables = zeros_of(lambda key: flax.init(key, x, train=True))
    assert numbers(variables["params"]) == parameters
    weights = interop.variables_to_torch(variables, network.TORCH_NAMES)
    with torch.device("meta"):
        theirs = reference.network(config)
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in weights.items()} == expected


def test_cnnrf_has_its_number_of_parameters():
    flax = regressor.build(RegressorOptions(), PATCHES, Layout())
    variables = zeros_of(lambda key: flax.init(key, jnp.zeros((1, 64, 64, 3)), train=True))
    assert numbers(variables["params"]) == 5_763_269
    with torch.device("meta"):
        theirs = CNNRF(RegressorOptions(), 5)
    weights = interop.variables_to_torch(variables, regressor.TORCH_NAMES)
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in weights.items()} == expected


@pytest.mark.parametrize("suffix", interop.SUFFIXES)
def test_weights_and_the_gate_go_over_and_come_back(suffix: str, tmp_path: pathlib.Path):
    config = smallest_cnncf.config()
    system = smallest_cnncf.system(config)
    x = jnp.zeros((2, 1, *smallest_cnncf.DATA.working_size, 1))
    variables = draw(lambda key: system.network.init(key, x, train=True))
    state = smallest_cnncf.state(True) | {"tp": jnp.float32(7), "count": jnp.int32(5)}
    variables |= {gate.COLLECTION: state}
    interop.write(
        interop.variables_to_torch(variables, network.TORCH_NAMES), tmp_path / f"weights{suffix}"
    )
    weights = interop.read(tmp_path / f"weights{suffix}")
    module = reference.network(config)
    module.load_state_dict(weights)
    assert isinstance(module, CNNCF)
    assert module.gate.open
    assert module.gate.since == 3
    like = jax.eval_shape(lambda: variables)
    again = interop.variables_from_torch(module.state_dict(), network.TORCH_NAMES, like)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(variables), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    weights["gate.count"] = weights["gate.count"].float()
    with pytest.raises(interop.InputError, match=r"gate\.count is torch\.float32 .*int32"):
        interop.variables_from_torch(weights, network.TORCH_NAMES, like)


def zeros_of(init: Any) -> Any:
    """Zeros in place of fresh variables, but for perturbations."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    shapes.pop("perturbations")
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def numbers(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
