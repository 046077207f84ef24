"""FLOPs of traced programs, against counts worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from deepsc_jax.config import PlatformConfig
from deepsc_jax.models.layers.blocks import EXACT
from deepsc_jax.models.layers.convolution import conv3d
from deepsc_jax.planning.flops import count
from deepsc_jax.runtime import device_mesh


def flops(function, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return dict(count(jax.make_jaxpr(function)(*arguments)))


def test_a_matrix_product_is_two_per_row_column_and_inner_index():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == {"float32": 2 * 3 * 5 * 7}


def test_a_batched_contraction_over_two_axes():
    found = flops(lambda a, b: jnp.einsum("bijk,bjkl->bil", a, b), (2, 3, 4, 5), (2, 4, 5, 6))
    assert found == {"float32": 2 * (2 * 3 * 6) * (4 * 5)}


def test_kinds_are_told_apart_by_type_and_precision():
    assert flops(lambda a: a @ a, (2, 2), dtype=jnp.bfloat16) == {"bfloat16": 16}
    assert flops(lambda a: jnp.dot(a, a, precision=EXACT), (2, 2)) == {"float32_exact": 16}
    mixed = flops(lambda a: (a.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16), a @ a), (2, 2))
    assert mixed == {"bfloat16": 16, "float32": 16}


# A row of 5 with a kernel of 3: 15 products without padding of which 2 meet the padding; with
# stride 2 the outputs at 0, 2 and 4 have 2, 3 and 2.
@pytest.mark.parametrize(("stride", "products"), [(1, 13), (2, 7)])
def test_a_convolution_counts_only_products_with_what_is_there(stride, products):
    def convolve(x, kernel):
        return conv3d(x, kernel, stride, "native")

    found = flops(convolve, (2, 5, 5, 5, 4), (3, 3, 3, 4, 6))
    assert found == {"float32": 2 * (2 * 4 * 6) * 13 * products**2}


@pytest.mark.parametrize("stride", [1, 2])
def test_both_gradients_of_a_convolution_count_as_much_as_itself(stride):
    def loss(x, kernel):
        return (conv3d(x, kernel, stride, "native") ** 2).sum()

    shapes = (2, 4, 6, 8, 4), (3, 3, 3, 4, 6)
    forward = flops(loss, *shapes)["float32"]
    assert flops(jax.grad(loss), *shapes) == {"float32": 2 * forward}
    assert flops(jax.grad(loss, argnums=(0, 1)), *shapes) == {"float32": 3 * forward}


def test_a_grouped_convolution_reads_only_its_group():
    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1,), "VALID", feature_group_count=2)

    # 3 batch x 6 features x 4 positions, each of 5 taps x 2 channels of its group of 4
    assert flops(convolve, (3, 4, 8), (6, 2, 5)) == {"float32": 2 * 3 * 6 * 4 * 5 * 2}


def repeated(carry, rows):
    return lax.scan(lambda c, row: (c @ c, row @ row), carry, rows)


def test_a_loops_body_counts_as_often_as_it_runs():
    assert flops(repeated, (2, 2), (7, 3, 3)) == {"float32": 7 * (2 * 2**3 + 2 * 3**3)}


def test_what_no_output_needs_is_not_counted_in_a_loop_either():
    assert flops(lambda c, rows: repeated(c, rows)[0], (2, 2), (7, 3, 3)) == {"float32": 7 * 16}
    assert flops(lambda c, rows: repeated(c, rows)[1], (2, 2), (7, 3, 3)) == {"float32": 7 * 54}
    assert flops(lambda a: (a @ a, a)[1], (2, 2)) == {}


def test_a_carry_that_only_feeds_another_is_counted():
    def step(carry, _):
        one, other = carry
        return (one @ one, other + one), None

    def second(one):
        return lax.scan(step, (one, one), None, length=5)[0][1]

    assert flops(second, (2, 2)) == {"float32": 5 * 16}


def test_remat_counts_what_is_computed_again():
    def layer(x):
        return jnp.sin(jnp.sin(x @ x) @ x)

    def gradient(function):
        return jax.grad(lambda x: function(x).sum())

    product = 2 * 4**3
    assert flops(layer, (4, 4)) == {"float32": 2 * product}
    # Each product's gradient is two products.
    assert flops(gradient(layer), (4, 4)) == {"float32": (2 + 4) * product}
    value_too = jax.value_and_grad(lambda x: jax.checkpoint(layer)(x).sum())
    # Both are computed again: the gradients of the sines need them.
    assert flops(value_too, (4, 4)) == {"float32": (2 + 2 + 4) * product}
    # Where the value is not asked for, nothing is computed for the first time.
    assert flops(gradient(jax.checkpoint(layer)), (4, 4)) == {"float32": (2 + 4) * product}


def test_the_costlier_branch_of_a_condition_counts():
    def chosen(flag, x):
        return lax.cond(flag > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    found = count(jax.make_jaxpr(chosen)(1, jnp.ones((2, 2))))
    assert found == {"float32": 32}


def test_a_loop_of_unknown_length_is_refused_only_if_it_holds_products():
    def until(body):
        return lambda x: lax.while_loop(lambda x: x.sum() < 9, body, x)

    assert flops(until(lambda x: x + 1), (2, 2)) == {}
    with pytest.raises(ValueError, match=r"unknown length"):
        flops(until(lambda x: x @ x), (2, 2))


def test_products_over_a_mesh_are_counted_for_one_device():
    mesh = device_mesh.make_mesh(PlatformConfig(data_devices=4, space=2))
    split = device_mesh.over_data(lambda w, _, rows: rows @ w, mesh, gathered=True)
    # 12 rows over 4 devices, and the partitioner splits each share over 2.
    assert flops(split, (5, 6), (), (12, 5)) == {"float32": 2 * 3 * 5 * 6 // 2}


def test_an_axis_made_manual_inside_is_not_split_again():
    mesh = device_mesh.make_mesh(PlatformConfig(data_devices=4, space=2))

    def inner(rows, weights):
        return jax.shard_map(
            lambda r, w: r @ w,
            in_specs=(PartitionSpec("space"), PartitionSpec()),
            out_specs=PartitionSpec("space"),
            axis_names={"space"},
        )(rows, weights)

    split = jax.shard_map(
        inner,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
        axis_names={"data"},
    )
    # 16 rows over 4 x 2 devices
    assert flops(split, (16, 5), (5, 6)) == {"float32": 2 * 2 * 5 * 6}
