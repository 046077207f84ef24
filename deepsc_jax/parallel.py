"""Devices: the mesh, its shardings, and the per-device program over it.

The mesh has two axes. `data` splits the batch and is manual: `over_data` runs one program per
device, as `pmap` did, so the gradient stays in float32 and is reduced where the program says, once.
`space` splits the depth of a scan and is left to XLA's partitioner. No other file names them.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepsc_jax.config import PlatformConfig
from deepsc_jax.errors import InputError

DATA, SPACE = "data", "space"


def use_cpu_cores(batches: Sequence[int]) -> None:
    """On a machine without accelerators, make one device of each core; call before all else of JAX.

    XLA's CPU backend leaves most of a second core idle inside one program: two programs on half of
    the batch each took half the time. Only as many as divide every global batch in `batches`.
    """
    jax.config.update("jax_num_cpu_devices", math.gcd(os.cpu_count() or 1, *batches))


def make_mesh(platform: PlatformConfig) -> Mesh:
    """The mesh of `platform.data` x `platform.space` devices.

    Raises:
      InputError: there are not so many devices.
    """
    found = jax.device_count()
    data = platform.data or found // platform.space
    needed = max(data, 1) * platform.space
    if needed > found:
        raise InputError(
            f"--data={platform.data} --space={platform.space}: {needed} devices are needed "
            f"and {found} were found: lower one of them"
        )
    devices = np.array(jax.devices()[:needed]).reshape(data, platform.space)
    return Mesh(devices, (DATA, SPACE), axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch(batch: int, mesh: Mesh, flag: str) -> None:
    """Refuse a global batch that the `data` axis does not divide.

    Raises:
      InputError: naming `flag`.
    """
    if batch % mesh.shape[DATA]:
        raise InputError(
            f"--{flag}={batch}: the batch is split over {mesh.shape[DATA]} devices: "
            "give a multiple of that, or lower --data"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters and optimizer state: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch, as global arrays over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
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


def sum_over_data(values: Any) -> Any:
    """The sum of every device's `values`, inside a program of `over_data`."""
    return jax.lax.psum(values, DATA)
