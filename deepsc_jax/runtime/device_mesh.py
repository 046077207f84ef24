"""Devices: the mesh, its shardings, and the per-device program over it.

The mesh has two axes. `data` splits the batch and is manual: `over_data` runs one program per
device, as `pmap` did, so the gradient stays in float32 and is reduced where the program says, once.
`space` splits the depth of every tile (a tile may be a whole scan) and is left to XLA's
partitioner, which exchanges the borders that convolutions need. No other file names them.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepsc_jax.config import Config, DataConfig, PlatformConfig, Stage
from deepsc_jax.runtime.errors import InputError

DATA, SPACE = "data", "space"


def usable_cores() -> int:
    """Cores that this process may run on; a container or taskset may leave it fewer than exist."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def use_cpu_cores(config: Config, stages: Sequence[Stage]) -> None:
    """Make devices of the CPU, for where there is no accelerator; call before all else of JAX.

    As many as `config.platform` asks for; left to choose, one a core: XLA's CPU backend leaves most
    of a second core idle inside one program, and two programs on half of the batch each took half
    the time. Only as many as divide every stage's batch.
    """
    platform = config.platform
    batches = [config.train.batch(stage) // platform.accumulation for stage in stages]
    cores = max(usable_cores() // platform.space, 1)
    data = platform.data or math.gcd(cores, *batches)
    jax.config.update("jax_num_cpu_devices", data * platform.space)


def make_mesh(platform: PlatformConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `platform.data` x `platform.space` of `devices`, by default of all there are.

    Raises:
      InputError: there are not so many devices.
    """
    devices = jax.devices() if devices is None else devices
    found = len(devices)
    data = platform.data or found // platform.space
    needed = max(data, 1) * platform.space
    if needed > found:
        raise InputError(
            f"--data={platform.data} --space={platform.space}: {needed} devices are needed "
            f"and {found} were found: lower one of them"
        )
    if jax.process_count() > 1 and jax.local_device_count() % platform.space:
        raise InputError(
            f"--space={platform.space}: a scan is split over the devices of one process, and this "
            f"one has {jax.local_device_count()}: give a divisor of that"
        )
    grid = np.array(devices[:needed]).reshape(data, platform.space)
    return Mesh(grid, (DATA, SPACE), axis_types=(AxisType.Auto, AxisType.Auto))


LARGE_TILE = 2**18  # voxels


# Convolutions by oneDNN, and large products.
ONEDNN = {
    "xla_cpu_experimental_onednn_custom_call": True,
    "xla_cpu_experimental_ynn_fusion_type": "",  # YNNPACK would take its convolutions
}


@functools.cache
def has_onednn() -> bool:
    """Whether XLA's CPU backend has oneDNN's convolutions, as JAX 0.11's on x86-64 Linux has."""
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((1, 4, 4, 4, 8), (3, 3, 3, 8, 8))]
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1, 1),
        padding="SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            program = jax.jit(convolve, compiler_options=ONEDNN).lower(*shapes).compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):  # they are experimental
                raise
            return False
    return "__onednn$convolution" in (program.as_text() or "")


def compiler_options(platform: str, data: DataConfig, form: str) -> dict[str, bool | str]:
    """XLA's options for the network's programs on `platform` (a device's), run or only planned.

    On GPUs convolutions stay channel-last, as the network writes them and as tensor cores want
    them; XLA's default turns every one to channel-first.

    On CPUs the barriers stay that keep apart what a block computes twice (`--remat`): without them
    XLA merges both again. For large tiles, Eigen's convolutions, a train step with YNNPACK's took
    half as long again (64x96x96; at 48x40x56 a fifth less), and the order of steps that needs the
    least memory, a third less. YNNPACK for products alone gave wrong sums (JAX 0.10.2; tests of
    meshes saw it). The form `direct` has oneDNN in place of YNNPACK.
    """
    if platform == "gpu":
        return {"xla_gpu_force_conv_nhwc": True}
    if platform != "cpu":
        return {}
    options: dict[str, bool | str] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if form == "direct":
        options |= ONEDNN
    if math.prod(data.tile) >= LARGE_TILE:
        options["xla_cpu_experimental_ynn_fusion_type"] = ""
        options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return options


def check_batch(config: Config, stage: Stage, mesh: Mesh) -> None:
    """Refuse a global batch that the `data` axis and the parts of a device do not divide.

    Raises:
      InputError: naming the stage's flag.
    """
    batch, parts = config.train.batch(stage), config.platform.accumulation
    if batch % (mesh.shape[DATA] * parts):
        in_parts = f" in {parts} parts each" if parts > 1 else ""
        raise InputError(
            f"--{stage}_batch={batch}: the batch is split over {mesh.shape[DATA]} devices"
            f"{in_parts}: give a multiple of {mesh.shape[DATA] * parts}, or lower --data or "
            "--accumulation"
        )


def split_depth(x: jax.Array, axis: int = 0) -> jax.Array:
    """`x`, with `axis` split over `space` where a mesh with that axis is in use."""
    return _pinned(x, PartitionSpec(*[None] * axis, SPACE))


def whole_depth(x: jax.Array) -> jax.Array:
    """`x`, all of it on every device of `space`."""
    return _pinned(x, PartitionSpec())


def sum_over_space(
    program: Callable[..., jax.Array], volumes: Sequence[jax.Array], shared: jax.Array
) -> jax.Array:
    """The sum over the devices of `space` of `program(*volumes, shared)`, each on its slices.

    Args:
      program: sees its device's slices of `volumes`; `with_neighbours` asks others for theirs.
      volumes: `(batch, depth, ...)`.
      shared: the same on all devices.
    """

    def per_device(shared: jax.Array, *parts: jax.Array) -> jax.Array:
        return jax.lax.psum(program(*parts, jax.lax.pcast(shared, (SPACE,), to="varying")), SPACE)

    split = [PartitionSpec(None, SPACE)] * len(volumes)
    return jax.shard_map(
        per_device,
        in_specs=(PartitionSpec(), *split),
        out_specs=PartitionSpec(),
        axis_names={SPACE},
    )(shared, *volumes)


def with_neighbours(x: jax.Array, slices: int) -> jax.Array:
    """A device's `x (batch, depth, ...)` with so many slices of each neighbour, 0 past the ends.

    Inside a program of `sum_over_space`.
    """
    if slices == 0:
        return x
    last = jax.lax.axis_size(SPACE) - 1
    before = jax.lax.ppermute(x[:, -slices:], SPACE, [(i, i + 1) for i in range(last)])
    behind = jax.lax.ppermute(x[:, :slices], SPACE, [(i + 1, i) for i in range(last)])
    return jax.numpy.concatenate([before, x, behind], axis=1)


def depth_is_split() -> bool:
    """Whether a mesh with several devices along `space` is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get(SPACE, 1) > 1


def _pinned(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    if not depth_is_split():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device has a whole copy of, such as the parameters."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_data(tree: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that is split over `data`: every leaf along its first axis that divides.

    ZeRO-1 (Rajbhandari et al. 2020) for an optimizer's state: each device keeps and updates its
    share of the moments. A leaf that no axis divides is copied.
    """

    def leaf(x: Any) -> NamedSharding:
        for axis, side in enumerate(x.shape):
            if side and side % mesh.shape[DATA] == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))
        return replicated(mesh)

    return jax.tree.map(leaf, tree)


DEPTH_AXIS = {"tiles": 2, "lesions": 2, "slices": 1}  # of what a batch holds


def batch_sharding(mesh: Mesh, name: str = "") -> NamedSharding:
    """The sharding of a batch's array: scans over `data`, the depth of volumes over `space`."""
    between = [None] * (DEPTH_AXIS.get(name, 0) - 1)
    depth = [*between, SPACE] if name in DEPTH_AXIS else []
    return NamedSharding(mesh, PartitionSpec(DATA, *depth))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch, as global arrays over the mesh."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh, name), array)
        for name, array in batch.items()
    }


def over_data(program: Callable[..., Any], mesh: Mesh, *, gathered: bool = False) -> Callable:
    """`program(replicated, batch)`, run by every device of the `data` axis on its share.

    Its first argument arrives as a device's own copy, so that gradients with respect to it are the
    device's own too, until `sum_over_data`. Results are the same on all devices, or, where
    `gathered`, one row per example.
    """

    def per_device(shared: Any, batch: Any) -> Any:
        return program(jax.lax.pcast(shared, (DATA,), to="varying"), batch)

    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA) if gathered else PartitionSpec(),
        axis_names={DATA},
    )


def varying(tree: Any) -> Any:
    """Constants as each device's own values, inside a program of `over_data`: a loop's start."""
    return jax.lax.pcast(tree, (DATA,), to="varying")


def sum_over_data(values: Any) -> Any:
    """The sum of every device's `values`, inside a program of `over_data`.

    As one vector, so in one all-reduce: XLA's combiner left four of a joint step's gradient.
    """
    vector, unravel = ravel_pytree(values)
    return unravel(jax.lax.psum(vector, DATA))


def shared_sum_over_data(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of every device's `vector`, in one all-reduce: as own values, and as one for all.

    Own values take part in what differs between devices, so that the gradient is one all-reduce
    too; the others may be a program's replicated results. Outside of a program of `over_data` both
    are `vector`.
    """
    if DATA not in jax.sharding.get_abstract_mesh().manual_axes:
        return vector, vector
    total = jax.lax.psum(vector, DATA)
    return jax.lax.pcast(total, (DATA,), to="varying"), total


def check_processes(mesh: Mesh) -> None:
    """Refuse a mesh of which one process has more devices than another.

    Raises:
      InputError: naming --data.
    """
    shares = [0] * jax.process_count()
    for device in mesh.devices.flat:
        shares[device.process_index] += 1
    if len(set(shares)) > 1:
        raise InputError(
            f"--data={mesh.shape[DATA]}: {shares} devices of the {len(shares)} processes would be "
            "used, the same number of each is expected: give --data=0 for all"
        )


def whole_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """The rows of every process's share of a batch, on every process, in the order of the mesh."""
    if jax.process_count() == 1:
        return batch
    put = {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh), array)
        for name, array in batch.items()
    }
    return jax.device_get(_copy_everywhere(mesh)(put))


@functools.cache
def _copy_everywhere(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))


def connect(mesh: Mesh) -> None:
    """Connect the processes for programs over `mesh`, before any of them compiles for long.

    Gloo connects devices when they first reduce together, and gives up after 30 seconds: one
    process may find its program in the compilation cache while another compiles it for minutes.
    """
    if jax.process_count() == 1:
        return
    make_any_process(mesh)(False).block_until_ready()
    ones = {"x": np.ones(mesh.shape[DATA] // jax.process_count(), np.float32)}
    reduce = over_data(lambda _, batch: sum_over_data(batch["x"].sum()), mesh)
    jax.jit(reduce)(np.float32(0), put_batch(ones, mesh)).block_until_ready()


def make_any_process(mesh: Mesh) -> Callable[[bool], jax.Array]:
    """A program that tells every process whether any of them says yes.

    Like a train step, it runs in the background until its result is read, and all processes must
    call it equally often.
    """
    each = NamedSharding(mesh, PartitionSpec((DATA, SPACE)))
    ours = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
    any_of_all = jax.jit(lambda flags: flags.any(), out_shardings=replicated(mesh))

    def any_process(flag: bool) -> jax.Array:
        return any_of_all(jax.make_array_from_process_local_data(each, np.full(ours, flag)))

    return any_process
