"""Devices: the mesh, its shardings, and the per-device program over it.

The mesh has two axes. `data` splits the batch and is manual: `over_data` runs one program per
device, as `pmap` did, so the gradient stays in float32 and is reduced where the program says, once.
`space` splits the depth of every tile (a tile may be a whole scan) and is left to XLA's
partitioner, which exchanges the borders that convolutions need. No other file names them.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import PyTree, Untyped

DATA, SPACE = "data", "space"


class Wanted(Protocol):
    """The devices that a configuration asks for (`config.PlatformConfig`)."""

    @property
    def data_devices(self) -> int:
        """Over which a batch is split; 0 for all there are."""
        ...

    @property
    def space(self) -> int:
        """That share the depth of a tile."""
        ...

    @property
    def accumulation(self) -> int:
        """Parts in which a device takes its examples."""
        ...


def usable_cores() -> int:
    """Cores that this process may run on; a container or taskset may leave it fewer than exist."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


_MOST_CPU_DEVICES = 1024  # each is a thread and more


def use_cpu_cores(platform: Wanted, batches: Sequence[int]) -> None:
    """Make devices of the CPU, for where there is no accelerator; call before all else of JAX.

    As many as `platform` asks for; left to choose, one a core: XLA's CPU backend leaves most
    of a second core idle inside one program, and two programs on half of the batch each took half
    the time. Only as many as divide all of the `batches`.

    Raises:
      InputError: `platform` asks for more than any machine has.
    """
    cores = max(usable_cores() // platform.space, 1)
    parts = [batch // platform.accumulation for batch in batches]
    data = platform.data_devices or math.gcd(cores, *parts)
    if data * platform.space > _MOST_CPU_DEVICES:
        raise InputError(
            f"--data_devices={platform.data_devices} --space={platform.space}: "
            f"{data * platform.space} devices are more than one process makes of a CPU, "
            f"{_MOST_CPU_DEVICES}: lower one of them"
        )
    jax.config.update("jax_num_cpu_devices", data * platform.space)


def make_mesh(platform: Wanted, devices: Sequence[Untyped] | None = None) -> Mesh:
    """The mesh of `data_devices` x `space` of `devices`, by default of all there are.

    Raises:
      InputError: there are not so many devices.
    """
    devices = jax.devices() if devices is None else devices
    there = len(devices)
    data = platform.data_devices or there // platform.space
    needed = max(data, 1) * platform.space
    if needed > there:
        raise InputError(
            f"--data_devices={platform.data_devices} --space={platform.space}: {needed} devices "
            f"are needed and {there} were found: lower one of them"
        )
    if jax.process_count() > 1 and jax.local_device_count() % platform.space:
        raise InputError(
            f"--space={platform.space}: a scan is split over the devices of one process, and this "
            f"one has {jax.local_device_count()}: give a divisor of that"
        )
    grid = np.array(devices[:needed]).reshape(data, platform.space)
    return Mesh(grid, (DATA, SPACE), axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch(flag: str, batch: int, parts: int, mesh: Mesh) -> None:
    """Refuse a global batch that the `data` axis and the parts of a device do not divide.

    Raises:
      InputError: naming `--flag`.
    """
    if batch % (mesh.shape[DATA] * parts):
        in_parts = f" in {parts} parts each" if parts > 1 else ""
        raise InputError(
            f"--{flag}={batch}: the batch is split over {mesh.shape[DATA]} devices"
            f"{in_parts}: give a multiple of {mesh.shape[DATA] * parts}, or lower "
            "--data_devices or --accumulation"
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


def split_over_data(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shardings of a tree that is split over `data`: every leaf along its first axis that divides.

    ZeRO-1 (Rajbhandari et al. 2020) for an optimizer's state: each device keeps and updates its
    share of the moments. A leaf that no axis divides is copied.
    """

    def leaf(x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        for axis, side in enumerate(x.shape):
            if side and side % mesh.shape[DATA] == 0:
                return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))
        return replicated(mesh)

    return jax.tree.map(leaf, tree)


def batch_sharding(mesh: Mesh, depth_axis: int | None = None) -> NamedSharding:
    """The sharding of a batch's array: examples over `data`, its depth, if any, over `space`."""
    depth = [] if depth_axis is None else [*[None] * (depth_axis - 1), SPACE]
    return NamedSharding(mesh, PartitionSpec(DATA, *depth))


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, depth_axes: Mapping[str, int]
) -> dict[str, jax.Array]:
    """This process's share of a batch, as global arrays over the mesh.

    Args:
      batch: arrays by name, the example's axis first.
      mesh: the devices.
      depth_axes: which axis of an array is depth, of those that have it.
    """
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(mesh, depth_axes.get(name)), array
        )
        for name, array in batch.items()
    }


def over_data(program: Callable[..., PyTree], mesh: Mesh, *, gathered: bool = False) -> Callable:
    """`program(own, shared, batch)`, run by every device of the `data` axis on its examples.

    `own` arrives as a device's own copy, so that gradients with respect to it are the device's own
    too, until `sum_over_data`; `shared` stays one for all. Results are the same on all devices, or,
    where `gathered`, one row per example.
    """

    def per_device(own: PyTree, shared: PyTree, batch: PyTree) -> PyTree:
        return program(jax.lax.pcast(own, (DATA,), to="varying"), shared, batch)

    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA) if gathered else PartitionSpec(),
        axis_names={DATA},
    )


def varying(tree: PyTree) -> PyTree:
    """Constants as each device's own values, inside a program of `over_data`: a loop's start."""
    return jax.lax.pcast(tree, (DATA,), to="varying")


def sum_over_data(values: PyTree) -> PyTree:
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
      InputError: naming --data_devices.
    """
    shares = [0] * jax.process_count()
    for device in mesh.devices.flat:
        shares[device.process_index] += 1
    if len(set(shares)) > 1:
        raise InputError(
            f"--data_devices={mesh.shape[DATA]}: {shares} devices of the {len(shares)} processes "
            "would be used, the same number of each is expected: give --data_devices=0 for all"
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
def _copy_everywhere(mesh: Mesh) -> Callable[[PyTree], PyTree]:
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
    reduce = over_data(lambda *arguments: sum_over_data(arguments[-1]["x"].sum()), mesh)
    jax.jit(reduce)(np.float32(0), {}, put_batch(ones, mesh, {})).block_until_ready()


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
