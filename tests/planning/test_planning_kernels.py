"""Convolutions, moves and scatters, read from excerpts of programs and from compiled ones."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from deepsc_jax.models.layers.blocks import Deconv, max_pool
from deepsc_jax.models.layers.convolution import conv3d
from deepsc_jax.planning import hlo, kernels

LAST, FIRST = "b012f_o012i->b012f", "bf012_oi012->bf012"


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text() or "")


def excerpt(*instructions, before=""):
    lines = "\n".join(f"  {line}" for line in instructions)
    return hlo.parse(f"HloModule jit_step\n\n{before}\nENTRY %main () -> f32[8] {{\n{lines}\n}}\n")


def cudnn(target, labels=LAST, window="size=3x3x3 pad=1_1x1_1x1_1"):
    return (
        f'window={{{window}}}, dim_labels={labels}, custom_call_target="__cudnn$conv{target}", '
        'backend_config={"cudnn_conv_backend_config":{"conv_result_scale":1}}'
    )


@pytest.mark.parametrize(
    ("target", "operands", "result", "by"),
    [
        ("Forward", "%x, %kernel", "bf16[1,8,8,8,32]", "forward"),
        ("BiasActivationForward", "%x, %kernel, %bias", "bf16[1,8,8,8,32]", "fused"),
        ("BackwardInput", "%y, %kernel", "bf16[1,8,8,8,16]", "backward_input"),
        ("BackwardFilter", "%x, %y", "bf16[32,3,3,3,16]", "backward_filter"),
    ],
)
def test_a_cudnn_call_with_the_channels_of_its_kernel(target, operands, result, by):
    module = excerpt(
        "%x = bf16[1,8,8,8,16]{4,3,2,1,0} parameter(0)",
        "%y = bf16[1,8,8,8,32]{4,3,2,1,0} parameter(1)",
        "%kernel = bf16[32,3,3,3,16]{4,3,2,1,0} parameter(2)",
        "%bias = f32[32]{0} parameter(3)",
        f"ROOT %conv = ({result}{{4,3,2,1,0}}, u8[0]{{0}}) custom-call({operands}), "
        + cudnn(target),
    )
    (found,) = kernels.convolutions(module)
    assert found == kernels.Convolution(by, LAST, True, "bf16", (16, 32), dilated=False)
    assert kernels.aligned(found)


def test_a_convolution_left_to_xla_with_holes_and_channels_first():
    module = excerpt(
        "%x = f32[1,12,8,8,8]{4,3,2,1,0} parameter(0)",
        "%kernel = f32[16,12,3,3,3]{4,3,2,1,0} parameter(1)",
        "ROOT %conv = f32[1,16,8,16,16]{4,3,2,1,0} convolution(%x, %kernel), "
        f"window={{size=3x3x3 pad=1_1x1_1x1_1 lhs_dilate=1x2x2}}, dim_labels={FIRST}",
    )
    (found,) = kernels.convolutions(module)
    assert found == kernels.Convolution("xla", FIRST, False, "f32", (12, 16), dilated=True)
    assert not kernels.aligned(found)


@pytest.mark.parametrize(
    ("layout", "last"),
    [
        ("3,2,1,0:T(8,128)(2,1)", True),
        ("2,3,1,0:T(8,128)(2,1)", False),
        ("0,3,2,1:T(8,128)(2,1)", False),
    ],
)
@pytest.mark.parametrize("labels", ["b01f_01io->b01f", "f01b_i01o->01bf"])
def test_channels_are_last_where_they_lie_so_in_memory(labels, layout, last):
    module = excerpt(
        f"%x = bf16[64,8,8,128]{{{layout}}} parameter(0)",
        "%y = bf16[3,3,128,128]{3,2,1,0} parameter(1)",
        f"ROOT %conv = f32[64,8,8,128]{{3,2,1,0}} convolution(%x, %y), dim_labels={labels}",
    )
    (found,) = kernels.convolutions(module)
    assert found.channel_last == last


def test_other_custom_calls_are_not_convolutions():
    module = excerpt(
        "%x = bf16[8,8]{1,0} parameter(0)",
        'ROOT %product = bf16[8,8]{1,0} custom-call(%x, %x), custom_call_target="__cublas$gemm"',
    )
    assert kernels.convolutions(module) == []


def test_convolutions_inside_fusions_are_found():
    module = compiled(
        lambda x, k: jnp.sin(conv3d(x, k, 1, "native")), (1, 4, 4, 4, 2), (3, 3, 3, 2, 5)
    )
    (found,) = kernels.convolutions(module)
    assert (found.by, found.labels[:5], found.channels) == ("xla", "b012f", (2, 5))


BEFORE = """
%only_moves (p: f32[8,4]) -> bf16[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  %turned = f32[4,8]{1,0} transpose(%p), dimensions={1,0}
  ROOT %narrow = bf16[4,8]{1,0} convert(%turned)
}

%computes (p: f32[8,4]) -> f32[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  %turned = f32[4,8]{1,0} transpose(%p), dimensions={1,0}
  ROOT %sine = f32[4,8]{1,0} sine(%turned)
}

%body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%q), index=1
  %kept = f32[8,4]{1,0} copy(%x)
  %narrowed = bf16[4,8]{1,0} fusion(%kept), kind=kLoop, calls=%only_moves
  %computed = f32[4,8]{1,0} fusion(%kept), kind=kLoop, calls=%computes
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %kept)
}

%condition (q: (s32[], f32[8,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""


def test_moves_are_counted_as_often_as_their_loop_runs_and_by_whether_they_lay_anew():
    module = excerpt(
        "%zero = s32[] parameter(0)",
        "%x = f32[8,4]{1,0} parameter(1)",
        "%other = f32[8,4]{0,1} copy(%x)",
        "%turned = f32[4,8,1]{2,1,0} transpose(%x), dimensions={1,0,2}",
        "%start = (s32[], f32[8,4]{1,0}) tuple(%zero, %x)",
        "ROOT %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"5"}}',
        before=BEFORE,
    )
    found = kernels.moves(module)
    # The fusion of bfloat16 in the loop of 5, and a copy and a transpose of float32 before it.
    assert kernels.moved(found, relaid=True) == {
        "count": 3,
        "bytes": 2 * 128 + 5 * 64,
        "largest": 128,
    }
    assert kernels.moved(found, relaid=False) == {"count": 1, "bytes": 5 * 128, "largest": 128}


def test_nothing_moved_is_nothing():
    assert kernels.moved([], relaid=True) == {"count": 0, "bytes": 0, "largest": 0}


def test_a_max_pool_by_reduce_window_would_be_seen_and_ours_is_not_one():
    def pooled(x):
        window = (1, 2, 2, 2, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID").sum()

    volume = (1, 4, 4, 4, 2)
    assert kernels.colliding_scatters(compiled(jax.grad(pooled), volume)) == 1
    ours = compiled(jax.grad(lambda x: max_pool(x).sum()), volume)
    assert kernels.colliding_scatters(ours) == 0


def test_scatters_that_cannot_collide_are_not_counted():
    module = excerpt(
        "%x = f32[8]{0} parameter(0)",
        "%i = s32[2,1]{1,0} parameter(1)",
        "%y = f32[2]{0} parameter(2)",
        "%apart = f32[8]{0} scatter(%x, %i, %y), index_vector_dim=1, unique_indices=true",
        "ROOT %any = f32[8]{0} scatter(%x, %i, %y), index_vector_dim=1, to_apply=%add",
    )
    assert kernels.colliding_scatters(module) == 1


def test_the_deconvolution_and_its_gradient_are_products_without_holes():
    layer, volume = Deconv(8), (1, 2, 2, 2, 8)
    params = jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct(volume, "float32"))
    gradient = jax.jit(jax.grad(lambda p, x: layer.apply(p, x).sum(), argnums=(0, 1)))  # type: ignore[union-attr]
    shape = jax.ShapeDtypeStruct(volume, "float32")
    text = gradient.lower(params, shape).compile().as_text() or ""
    assert kernels.convolutions(hlo.parse(text)) == []
