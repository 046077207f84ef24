"""The 3D ResNet against MONAI's: values, gradients and running statistics; its pooling's ties."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn import draw_params, masked_volume
from monai.networks.nets.resnet import ResNet, ResNetBottleneck, resnet50
from parity import (
    DTYPES,
    GRADIENTS,
    JOINT_GRADIENTS,
    JOINT_VALUES,
    channel_first,
    channel_last,
    compare,
    module_gradient,
    relative,
)

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.interop.torch import from_torch, to_torch
from deepsc_jax.models.comparators import resnet3d
from deepsc_jax.models.comparators.resnet3d import TORCH_NAMES, Options
from deepsc_jax.models.layers.batch_norm import BATCH_STATS
from deepsc_jax.models.layers.blocks import first_max_pool
from deepsc_jax.models.layers.layout import Layout

OPTIONS = Options(widths=(4, 4, 6, 8), blocks=(1, 2, 1, 1))
SHAPE, LABELS, WEIGHTS = (3, 9, 20, 16, 1), (0, 2, 1), (0.5, 1.0, 2.0)
PAIRS = [
    ("native", "float64"),
    ("folded", "float32"),
    pytest.param("folded", "float64", marks=pytest.mark.slow),
    pytest.param("native", "float32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sides", [(6, 8, 4), (5, 7, 9), (1, 2, 3)])
def test_the_gradient_of_a_maximum_goes_to_torchs(sides: Any, dtype: str, within: Any):
    # Few values, so that most windows hold ties.
    x = np.random.default_rng(1).integers(0, 3, (2, *sides, 3)).astype(float)
    errors = compare(
        lambda _, x: [first_max_pool(x)],
        lambda x: [channel_last(torch.nn.functional.max_pool3d(channel_first(x), 3, 2, 1))],
        [x],
        dtype,
    )
    within("max-pool of first values", dtype, errors.against(0, GRADIENTS[dtype]))


@pytest.mark.parametrize(("form", "dtype"), PAIRS)
def test_a_training_step_and_what_it_leaves_behind(form: str, dtype: str, within: Any):
    network = resnet3d.build(OPTIONS, DataConfig(), Layout(form, jnp.dtype(dtype)))  # pyright: ignore
    kind, x = getattr(torch, dtype), masked_volume(SHAPE)
    variables = draw_params(in_training(network), jnp.zeros(SHAPE))
    params, stats = variables["params"], variables[BATCH_STATS]
    theirs = ResNet(
        ResNetBottleneck, list(OPTIONS.blocks), list(OPTIONS.widths), n_input_channels=1,
        num_classes=3,
    ).to(kind)  # fmt: skip
    weights = to_torch(params, TORCH_NAMES) | to_torch(stats, TORCH_NAMES, BATCH_STATS)
    theirs.load_state_dict(weights, strict=True)
    for collection, tree in variables.items():
        again = from_torch(theirs.state_dict(), TORCH_NAMES, tree, collection)
        jax.tree.map(np.testing.assert_array_equal, again, tree)

    @jax.jit
    def ours(params: Any, stats: Any, x: Any, class_weights: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            variables = {"params": params, BATCH_STATS: stats}
            out: Any
            out, moved = network.apply(variables, x, train=True, mutable=[BATCH_STATS])
            labels = jnp.asarray(LABELS)
            terms, _ = resnet3d.losses(Config(OPTIONS), out, {}, labels, class_weights)
            return terms["loss"].sum(), (terms["loss"], out["logits"], moved[BATCH_STATS])

        gradients, (terms, logits, moved) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        after: Any = network.apply({"params": params, BATCH_STATS: moved}, x, train=False)
        return [terms, logits], after["logits"], gradients[1], gradients[0], moved

    tensor = torch.from_numpy(x).to(kind).requires_grad_()
    logits = theirs(channel_first(tensor))
    terms = torch.nn.functional.cross_entropy(
        logits, torch.tensor(LABELS), torch.tensor(WEIGHTS, dtype=kind), reduction="none"
    )
    terms.sum().backward()
    with torch.no_grad():
        after = theirs.eval()(channel_first(tensor))
    assert tensor.grad is not None
    expected = (
        [terms.detach().numpy(), logits.detach().numpy()],
        after.numpy(),
        tensor.grad.numpy(),
        module_gradient(theirs, TORCH_NAMES),
        from_torch(theirs.state_dict(), TORCH_NAMES, collection=BATCH_STATS),
    )
    with jax.enable_x64(dtype == "float64"):
        cast = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, stats, x, WEIGHTS))
        cast = (*cast[:3], jnp.asarray(cast[3]))
        found = jax.device_get(ours(*cast))
    errors = [relative(f, e) for f, e in zip(found, expected, strict=True)]
    names = (
        "values",
        "values by running statistics",
        "input gradients",
        "parameter gradients",
        "running statistics",
    )
    values, gradients = JOINT_VALUES[dtype], JOINT_GRADIENTS[dtype]
    bounds = (values, values, gradients, gradients, values)
    measured = dict(zip(names, zip(errors, bounds, strict=True), strict=True))
    within("3D ResNet", dtype, measured)


def in_training(network: Any) -> Any:
    """The network with `train` set, as `draw_params` initialises it."""

    class Training:
        def init(self, key: Any, x: Any) -> Any:
            return network.init(key, x, train=True, mutable=["params", BATCH_STATS])

    return Training()


def test_the_full_size_network_has_monais_number_of_parameters_and_names():
    network = resnet3d.build(Options(), DataConfig(), Layout())
    shape = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), jnp.float32)
    variables: Any = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=True), shape)
    with torch.device("meta"):
        theirs = resnet50(spatial_dims=3, n_input_channels=1, num_classes=3)
    ours = {"params": 0, BATCH_STATS: 0}
    for collection in ours:
        leaves = jax.tree.leaves(variables[collection])
        ours[collection] = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    assert ours["params"] == sum(p.numel() for p in theirs.parameters())
    buffers = [b for name, b in theirs.named_buffers() if "num_batches" not in name]
    assert ours[BATCH_STATS] == sum(b.numel() for b in buffers)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variables["params"])
    stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variables[BATCH_STATS])
    weights = to_torch(zeros, TORCH_NAMES) | to_torch(stats, TORCH_NAMES, BATCH_STATS)
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in weights.items()} == expected
