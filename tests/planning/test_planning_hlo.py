"""Collectives and bytes, read from compiled programs and from excerpts of such text."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from deepsc_jax.config import PlatformConfig
from deepsc_jax.planning import hlo
from deepsc_jax.runtime import device_mesh

ALL = (tuple(range(8)),)
PARTS = tuple((base, base + 1, base + 4, base + 5) for base in (0, 2, 8, 10))
WHOLE, SPLIT = PartitionSpec(), PartitionSpec("data")


def compiled(function, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text() or "")


def over_eight(function, out=WHOLE):
    mesh = device_mesh.make_mesh(PlatformConfig(data_devices=8))
    return jax.shard_map(function, mesh=mesh, in_specs=SPLIT, out_specs=out, check_vma=False)


# What one device holds of 64 rows of 3: 8 rows, 96 bytes.
TRANSFERS = {
    "all-reduce": (lambda x: lax.psum(x, "data"), WHOLE, 96, ALL),
    "all-gather": (lambda x: lax.all_gather(x, "data"), WHOLE, 8 * 96, ALL),
    "reduce-scatter": (lambda x: lax.psum_scatter(x, "data", tiled=True), SPLIT, 96, ALL),
    "all-to-all": (lambda x: lax.all_to_all(x, "data", 0, 0, tiled=True), SPLIT, 96, ALL),
    "collective-permute": (
        lambda x: lax.ppermute(x, "data", [(0, 1), (1, 2)]),
        SPLIT,
        96,
        ((0, 1), (1, 2)),
    ),
}


@pytest.mark.parametrize("kind", TRANSFERS)
def test_every_kind_of_transfer_with_its_bytes_and_devices(kind):
    function, out, size, groups = TRANSFERS[kind]
    (found,) = hlo.collectives(compiled(over_eight(function, out), (64, 3)))
    assert found == hlo.Collective(kind, "f32", size, 1, False, groups)


def test_a_transfer_in_nested_loops_is_flagged_with_how_often_it_runs():
    def inner(carry, _):
        return jnp.sin(lax.psum(carry, "data")), None

    def outer(carry, _):
        return lax.scan(inner, carry, None, length=5)[0], None

    program = over_eight(lambda x: lax.psum(lax.scan(outer, x, None, length=3)[0], "data"))
    found = hlo.collectives(compiled(program, (64, 3)))
    assert sorted((c.kind, c.trips, c.in_loop) for c in found) == [
        ("all-reduce", 1, False),
        ("all-reduce", 15, True),
    ]


def test_a_transfer_in_a_loop_of_unknown_length_says_so():
    def program(x):
        return lax.while_loop(lambda x: x[0, 0] < 9, lambda x: lax.psum(x, "data"), x)

    (found,) = hlo.collectives(compiled(over_eight(program), (64, 3)))
    assert (found.trips, found.in_loop) == (None, True)


def test_groups_of_a_mesh_with_two_axes():
    mesh = device_mesh.make_mesh(PlatformConfig(data_devices=4, space=2))
    program = device_mesh.over_data(lambda _, __, x: device_mesh.sum_over_data(x), mesh)
    (found,) = hlo.collectives(compiled(program, (), (), (8, 4)))
    assert sorted(found.groups) == [(0, 2, 4, 6), (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", ALL),
        ("mesh['data'=4,'space'=2] {'space'}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['data'=4,'space'=2] {'data'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['data'=4,'space'=2] {'data','space'}", ALL),
        ("mesh['a'=8] {'a':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        # 8 = 2 x 2 x 2, of which the middle one: devices 4 apart, each with its two of b.
        ("mesh['a'=8,'b'=2] {'a':(2)2,'b'}", PARTS),
        ("mesh[a=4,b=2] {a}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        # In the order written: what JAX 0.10's XLA lists as {{0,2,4,6,1,3,5,7}}.
        ("mesh['a'=4,'b'=2] {'b','a'}", ((0, 2, 4, 6, 1, 3, 5, 7),)),
        ("mesh['a'=8] {'a':(4)2,'a':(1)2}", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("{}", ALL),
    ],
)
def test_groups_in_the_forms_that_xla_writes(written, groups):
    (found,) = hlo.collectives(all_reduce(written))
    assert found.groups == groups


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("torus(8)", r"in no known form: .*torus"),
        ("mesh['a'=4,'b'=2], device_ids=(0,2,4,6,1,3,5,7) {'a'}", "in no known form"),
        ("mesh['a'=4,'b'=2] {'c'}", "over other axes than the mesh's"),
    ],
)
def test_groups_in_an_unknown_form_are_an_error(written, said):
    with pytest.raises(ValueError, match=said):
        hlo.collectives(all_reduce(written))


def all_reduce(groups):
    return excerpt(
        "%p = f32[8]{0} parameter(0)",
        f"ROOT %sum = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add",
    )


def test_the_devices_of_a_program_are_read():
    assert compiled(over_eight(lambda x: lax.psum(x, "data")), (64, 3)).devices == 8
    assert compiled(lambda x: x @ x, (4, 4)).devices == 1


def test_a_one_device_program_has_no_transfers():
    assert hlo.collectives(compiled(lambda x: x @ x, (4, 4))) == []


def test_bytes_are_every_kernels_operands_and_results():
    # A product, which is one kernel: two operands of 16 x 16 and a result.
    assert hlo.bytes_moved(compiled(lambda a, b: a @ b, (16, 16), (16, 16))) == 3 * 4 * 256


def test_a_loop_that_writes_rows_in_place_moves_rows_not_the_whole():
    # 100 iterations, each reading and writing a row of 1000; the whole is 400 kB.
    def program(rows):
        return lax.map(lambda row: jnp.sin(row) * row, rows)

    moved = hlo.bytes_moved(compiled(program, (100, 1000)))
    assert 2 * 400_000 <= moved < 6 * 400_000


def excerpt(*instructions, before=""):
    lines = "\n".join(f"  {line}" for line in instructions)
    head = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
    return hlo.parse(
        head + textwrap.dedent(before) + f"\nENTRY %main () -> f32[8] {{\n{lines}\n}}\n"
    )


def test_an_asynchronous_pair_compiled_for_h100_is_one_transfer():
    module = excerpt(
        "%gradient = f32[43133]{0} parameter(0)",
        "%fused = f32[43133]{0} copy(/*index=0*/%gradient)",
        "%all-reduce-start = f32[43133]{0} all-reduce-start(%fused), channel_id=1, "
        "replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%region_1.2, "
        'metadata={op_name="jit(step)/shard_map/psum_invariant"}, backend_config={"wait":"(a"}',
        "ROOT %all-reduce-done = f32[43133]{0} all-reduce-done(%all-reduce-start)",
    )
    assert hlo.collectives(module) == [
        hlo.Collective("all-reduce", "f32", 4 * 43133, 1, False, ALL)
    ]


def test_a_combined_transfer_counts_the_bytes_of_all_its_operands():
    module = excerpt(
        "%a = f32[10,3]{1,0} parameter(0)",
        "%b = bf16[7]{0} parameter(1)",
        "%all-gather-start = ((f32[10,3], bf16[7]), (f32[80,3], bf16[56])) "
        "all-gather-start(%a, %b), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}",
        "ROOT %done = (f32[80,3], bf16[56]) all-gather-done(%all-gather-start)",
    )
    (found,) = hlo.collectives(module)
    assert (found.dtype, found.bytes) == ("bf16+f32", 4 * (120 + 14))
    assert found.groups == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_a_wrapped_asynchronous_transfer_is_counted_once():
    before = """
    %wrapped (p: f32[64]) -> f32[8] {
      %p = f32[64]{0} parameter(0)
      ROOT %reduce-scatter.1 = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}
    }
    """
    module = excerpt(
        "%x = f32[64]{0} parameter(0)",
        "%start = ((f32[64]{0}), f32[8]{0}) async-start(%x), calls=%wrapped",
        "ROOT %done = f32[8]{0} async-done(%start), calls=%wrapped",
        before=before,
    )
    (found,) = hlo.collectives(module)
    assert (found.kind, found.bytes) == ("reduce-scatter", 256)


def test_on_tpu_a_loops_length_is_in_its_condition_and_fast_memory_is_not_counted():
    before = """
    %condition (p: (s32[], f32[256])) -> pred[] {
      %limit = s32[]{:T(128)} constant(8), metadata={stack_frame_id=240}
      %p = (s32[]{:T(128)}, f32[256]{0:T(256)S(1)}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%p), index=0
      ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
    }

    %body (q: (s32[], f32[256])) -> (s32[], f32[256]) {
      %q = (s32[]{:T(128)}, f32[256]{0:T(256)S(1)}) parameter(0)
      %x = f32[256]{0:T(256)S(1)} get-tuple-element(%q), index=1
      %sum = f32[256]{0:T(256)S(1)} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
      %kept = f32[256]{0:T(256)} copy(%sum)
      %j = s32[]{:T(128)} get-tuple-element(%q), index=0
      ROOT %next = (s32[]{:T(128)}, f32[256]{0:T(256)S(1)}) tuple(%j, %sum)
    }
    """
    module = excerpt(
        "%start = (s32[]{:T(128)}, f32[256]{0:T(256)S(1)}) parameter(0)",
        "ROOT %loop = (s32[]{:T(128)}, f32[256]{0:T(256)S(1)}) while(%start), "
        "condition=%condition, body=%body",
        before=before,
    )
    (found,) = hlo.collectives(module)
    assert (found.bytes, found.trips, found.in_loop) == (1024, 8, True)
    assert hlo.bytes_moved(module) == 8 * 1024  # what the copy writes


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match=r"no entry computation"):
        hlo.parse("HloModule nothing")
