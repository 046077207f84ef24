"""Batch norm against PyTorch's: values, gradients and three steps of running statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn import draw_params
from parity import DTYPES, GRADIENTS, VALUES, channel_first, channel_last, compare, relative

from deepsc_jax.interop.torch import from_torch, to_torch
from deepsc_jax.models.layers.batch_norm import BATCH_STATS, BatchNorm
from deepsc_jax.models.layers.blocks import GroupNorm
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.models.torch_names import Rule

TABLE = (
    Rule("scale", "weight"),
    Rule("bias", "bias"),
    Rule("mean", "running_mean", collection=BATCH_STATS),
    Rule("var", "running_var", collection=BATCH_STATS),
)


def their_steps(norm: torch.nn.Module, batches: list[np.ndarray], probe: Any, kind: Any) -> Any:
    """Every step's values, gradient of its input and parameters, and statistics after it."""
    rows = []
    for x in batches:
        tensor = torch.from_numpy(x).to(kind).requires_grad_()
        norm.zero_grad()
        y = channel_last(norm(channel_first(tensor)))
        (y * torch.from_numpy(probe).to(kind)).sum().backward()
        assert tensor.grad is not None
        gradients: Any = {name: p.grad for name, p in norm.named_parameters()}
        stats = from_torch(norm.state_dict(), TABLE, collection=BATCH_STATS)
        rows.append((y.detach().numpy(), tensor.grad.numpy(), from_torch(gradients, TABLE), stats))
    return rows


@pytest.mark.parametrize("form", ["native", "folded"])
@pytest.mark.parametrize("space", [(4, 5, 6), (7, 6), (1, 1, 1)], ids=["3d", "2d", "voxel"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm(dtype: str, space: tuple[int, ...], form: Any, within: Any):
    rng = np.random.default_rng(0)
    batches = [rng.normal(2, 3, size=(5, *space, 6)) for _ in range(3)]
    probe = rng.normal(size=batches[0].shape)
    kind = torch.nn.BatchNorm2d if len(space) == 2 else torch.nn.BatchNorm3d
    theirs = kind(6).to(getattr(torch, dtype))
    params = {"scale": rng.normal(1, 0.3, 6), "bias": rng.normal(size=6)}
    stats = {"mean": rng.normal(size=6), "var": np.exp(rng.normal(size=6))}
    weights = to_torch(params, TABLE) | to_torch(stats, TABLE, BATCH_STATS)
    theirs.load_state_dict(weights, strict=True)
    expected = their_steps(theirs, batches, probe, getattr(torch, dtype))
    norm = BatchNorm(Layout(form))

    @jax.jit
    def step(params: Any, stats: Any, x: Any, probe: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            variables = {"params": params, BATCH_STATS: stats}
            y, moved = norm.apply(variables, x, train=True, mutable=[BATCH_STATS])
            return (y * probe).sum(), (y, moved[BATCH_STATS])

        gradients, (y, moved) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, gradients[1], gradients[0], moved

    with jax.enable_x64(dtype == "float64"):
        cast = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, stats, probe, batches))
        params, stats, probe, inputs = cast
        errors = []
        for x, wanted in zip(inputs, expected, strict=True):
            found = step(params, stats, x, probe)
            stats = found[-1]
            errors.append([relative(f, e) for f, e in zip(found, wanted, strict=True)])
        still = norm.apply({"params": params, BATCH_STATS: stats}, inputs[0], train=False)
    with torch.no_grad():
        of_eval = theirs.eval()(
            channel_first(torch.from_numpy(batches[0]).to(getattr(torch, dtype)))
        )
    values, of_input, of_params, of_stats = np.max(errors, axis=0)
    measured = {
        "values": (values, VALUES[dtype]),
        "values by running statistics": (
            relative(still, channel_last(of_eval).numpy()),
            VALUES[dtype],
        ),
        "input gradients": (of_input, GRADIENTS[dtype]),
        "parameter gradients": (of_params, GRADIENTS[dtype]),
        "running statistics": (of_stats, VALUES[dtype]),
    }
    within("batch norm", dtype, {k: (float(e), bound) for k, (e, bound) in measured.items()})


def test_one_value_has_no_variance_where_torch_refuses_it():
    x = np.ones((1, 1, 1, 1, 2), np.float32)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.nn.BatchNorm3d(2)(channel_first(torch.from_numpy(x)))
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, train=True)
    moved: Any
    y, moved = norm.apply(variables, x, train=True, mutable=[BATCH_STATS])
    np.testing.assert_array_equal(y, np.zeros(x.shape))
    np.testing.assert_allclose(moved[BATCH_STATS]["mean"], 0.1)
    np.testing.assert_allclose(moved[BATCH_STATS]["var"], 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_norm_of_one_channel_a_group_is_an_instance_norm(dtype: str, within: Any):
    norm, theirs = GroupNorm(6), torch.nn.InstanceNorm3d(6, affine=True)
    # Of another seed than the objective's weights: about these the gradient is only rounding.
    x = np.random.default_rng(1).normal(2, 3, size=(2, 3, 4, 5, 6))
    params = draw_params(norm, jnp.zeros(x.shape), None)["params"]
    errors = compare(
        lambda p, x: [norm.apply({"params": p}, x, None)],
        lambda x: [channel_last(theirs(channel_first(x)))],
        [x],
        dtype,
        params,
        theirs,
        table=TABLE,
    )
    within("instance norm", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))
