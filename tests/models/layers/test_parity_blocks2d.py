"""Convolution, pooling, and the blocks A and B of images, against PyTorch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from drawn import draw_params, masked_volume
from parity import DTYPES, GRADIENTS, VALUES, channel_first, channel_last, compare
from parity_norms import against, draw, step_errors
from reference.cnncf.blocks import Block

from deepsc_jax.models.cnncf.torch_names import norm_names
from deepsc_jax.models.layers.batch_norm import BATCH_STATS
from deepsc_jax.models.layers.blocks2d import Conv2d, ResBlockA, ResBlockB, first_max_pool
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.models.torch_names import CONV2D, Rule

TABLE = (
    Rule("conv_upper/kernel", "upper.conv.weight", CONV2D),
    *norm_names("norm_upper", "upper.norm"),
    Rule("conv{k}/kernel", "lower.conv{k}.weight", CONV2D),
    *norm_names("norm{k}", "lower.norm{k}"),
)


def pictures(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Normal values that are constant in half of the 4x4 blocks, where a maximum ties."""
    rng = np.random.default_rng(seed)
    inside = masked_volume((shape[0], 1, *shape[1:]), seed)[:, 0] > 0
    return np.where(inside, rng.normal(size=shape), -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sides", "stride"), [((8, 5), 2), ((1, 2), 2), ((7, 4), 1)])
def test_the_gradient_of_a_maximum_goes_to_torchs(sides: Any, stride: int, dtype: str, within: Any):
    # Few values, so that most windows hold ties; negative ones, so that padding must not win.
    x = np.random.default_rng(1).integers(-3, 0, (2, *sides, 3)).astype(float)
    errors = compare(
        lambda _, x: [first_max_pool(x, stride)],
        lambda x: [channel_last(torch.nn.functional.max_pool2d(channel_first(x), 3, stride, 1))],
        [x],
        dtype,
    )
    within("2D max-pool of first values", dtype, errors.against(0, GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, 1), (3, 2)])
def test_convolution(kernel: int, stride: int, dtype: str, within: Any):
    theirs = torch.nn.Conv2d(3, 4, kernel, stride, padding=kernel // 2, bias=False)
    module = Conv2d(4, kernel, stride, Layout(dtype=jnp.dtype(dtype)))
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 3))
    errors = compare(
        lambda p, x: [module.apply({"params": p}, x)],
        lambda x: [channel_last(theirs(channel_first(x)))],
        [x],
        dtype,
        draw_params(module, jnp.zeros(x.shape))["params"],
        theirs,
        table=(Rule("kernel", "weight", CONV2D),),
    )
    within("2D convolution", dtype, errors.against(VALUES[dtype], GRADIENTS[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "stride", "sides"), [("A", 2, (9, 12)), ("A", 1, (6, 5)), ("B", 2, (7, 10))]
)
def test_a_residual_block(kind: str, stride: int, sides: Any, dtype: str, within: Any):
    block = (ResBlockA if kind == "A" else ResBlockB)(5, stride, Layout(dtype=jnp.dtype(dtype)))
    shape = (3, *sides, 4)
    inputs = [pictures(shape, 1), pictures(shape, 2)]  # two, which must not be taken for the other

    def ours(variables: Any, i1: Any, i2: Any, train: bool) -> Any:
        outputs: Any
        outputs, moved = block.apply(variables, i1, i2, None, None, train, mutable=[BATCH_STATS])
        return outputs, moved[BATCH_STATS]

    module = Block(kind, 4, 5, stride)
    zeros = jnp.zeros(shape)
    variables = draw(lambda key: block.init(key, zeros, zeros, None, None, True))
    errors = step_errors(
        ours,
        lambda *x: [channel_last(y) for y in module(*map(channel_first, x))],
        module,
        variables,
        inputs,
        dtype,
        TABLE,
    )
    within(f"ResBlock-{kind}", dtype, against(errors, VALUES[dtype], GRADIENTS[dtype]))


def test_statistics_that_do_not_move_keep_their_bits():
    block, x = ResBlockB(3), pictures((2, 6, 6, 2)).astype(np.float32)
    variables = draw(lambda key: block.init(key, x, x, None, None, True))
    for moves in (False, True):
        moved: Any = block.apply(
            variables, x, x, None, jnp.asarray(moves), True, mutable=[BATCH_STATS]
        )[1]
        same = [
            np.array_equal(a, b)
            for a, b in zip(
                jax.tree.leaves(moved[BATCH_STATS]),
                jax.tree.leaves(variables[BATCH_STATS]),
                strict=True,
            )
        ]
        assert not any(same) if moves else all(same)
