"""The train step of a configuration, compiled for devices that are not here."""

import contextlib
import dataclasses
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from deepsc_jax.config import Config
from deepsc_jax.data import augment
from deepsc_jax.data.batch import DEPTH_AXES, count_tiles, fields
from deepsc_jax.planning import flops, hlo, kernels, targets
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject, PyTree
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Stage, System, initial
from deepsc_jax.training import state as states
from deepsc_jax.training.step import make_train_step

# What XLA finds in the place of CUDA's assembler. No plan looks at machine code; making it takes
# hundreds of calls, and a machine without a GPU may have no CUDA toolkit.
ASSEMBLER = """#!/bin/sh
case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done
"""
KINDS = ("parameters", "optimizer", "carried", "inputs", "temporaries", "peak")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled train step; everything is per device.

    Attributes:
      memory: bytes by kind (`KINDS`); peak is all that lives at once.
      flops: by kind of product, of plain convolutions: without a band's products with zeros.
      bytes_moved: to and from device memory.
      collectives: transfers between devices.
      convolutions: every one of them.
      moves: kernels that only transpose or copy.
      colliding_scatters: of `kernels.colliding_scatters`.
      refused: why the compiler gave up for want of memory; TPUs' does.
    """

    memory: dict[str, int]
    flops: dict[str, int]
    bytes_moved: int
    collectives: list[hlo.Collective]
    convolutions: list[kernels.Convolution]
    moves: list[kernels.Move]
    colliding_scatters: int
    refused: str = ""


def batch_shapes(
    config: Config, stage: Stage, scans: int, depth: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A training batch of `stage` as it travels, by shapes alone.

    Args:
      config: its tiles, slices and working grid.
      stage: decides what a batch holds.
      scans: in the batch.
      depth: slices of the deepest scan; its bucket decides the number of tiles.
    """
    data = config.data
    tiles, padded = count_tiles(stage.reads, config, depth), data.bucket(depth)
    margin = augment.margin(config.train, data.tile, [augment.nominal_spacing(data)])
    return {
        name: jax.ShapeDtypeStruct((scans, *field.shape), field.dtype)
        for name, field in fields(stage.reads, data, tiles, padded, margin=margin).items()
    }


def of_scans(system: System, stage: str, scans: int) -> System:
    """The same system with so many scans in a batch of `stage`."""
    config = system.config.with_stage(stage, batch=scans)
    return type(system)(config, system.layout, system.model)


def trace(system: System, stage_name: str, mesh: Mesh, scans: int, depth: int) -> jax.stages.Traced:
    """The train step that `training` runs, traced for a global batch of `scans`.

    Raises:
      InputError: the devices of the mesh's `data` axis, or their parts, do not divide the batch.
    """
    system = of_scans(system, stage_name, scans)
    stage = system.stage(stage_name)
    system = system.of(stage)
    config = system.config
    flag = config.stage_flag(stage.name, "batch")
    device_mesh.check_batch(flag, scans, config.platform.accumulation, mesh)
    state = jax.eval_shape(lambda: states.create(system, stage, initial(system)))
    shard = config.platform.shard_optimizer
    where = states.sharding(state, mesh, shard_optimizer=shard)
    step = make_train_step(system, stage, mesh, system.facts(stage, ()), where)
    batch = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=device_mesh.batch_sharding(mesh, DEPTH_AXES.get(name))
        )
        for name, x in batch_shapes(config, stage, scans, depth).items()
    }
    return step.trace(state, batch)


def compile_step(config: Config, stage: str, mesh: Mesh, scans: int, depth: int) -> Program:
    """Compile the train step for `mesh` and read what it needs.

    Args:
      config: the configuration.
      stage: the name of one of its model's.
      mesh: of devices from `targets.devices`.
      scans: in the global batch.
      depth: slices of the deepest scan.

    Raises:
      InputError: the batch does not fit the mesh, or the program cannot be compiled.
    """
    platform = mesh.devices.flat[0].platform
    system = build(config, platform)
    traced = trace(system, stage, mesh, scans, depth)
    plain = traced
    if system.layout.form != "native":
        native = dataclasses.replace(config.platform, conv_form="native")
        native_system = build(dataclasses.replace(config, platform=native), platform)
        plain = trace(native_system, stage, mesh, scans, depth)
    counted = dict(flops.count(plain.jaxpr))
    try:
        with compiler_options(platform) as options:
            compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"Used ([\d.]+)([MG]) of ", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not wanted:
            raise InputError(
                f"the {stage} step does not compile for {mesh.devices.size} devices: "
                f"{str(error).splitlines()[0]}"
            ) from error
        peak = int(float(wanted[1]) * {"M": 2**20, "G": targets.GIB}[wanted[2]])
        return Program({"peak": peak}, counted, 0, [], [], [], 0, str(error).splitlines()[0])
    module = hlo.parse(compiled.as_text() or "")
    return Program(
        memory=memory(traced, compiled),
        flops=counted,
        bytes_moved=hlo.bytes_moved(module),
        collectives=hlo.collectives(module),
        convolutions=kernels.convolutions(module),
        moves=kernels.moves(module),
        colliding_scatters=kernels.colliding_scatters(module),
    )


@contextlib.contextmanager
def compiler_options(platform: str) -> Iterator[JsonObject]:
    """XLA's options for a program that is never run: nothing is timed, and nothing assembled."""
    if platform != "gpu":
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        assembler = pathlib.Path(folder, "bin", "ptxas")
        assembler.parent.mkdir()
        assembler.write_text(ASSEMBLER)
        assembler.chmod(0o700)
        yield {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": folder}


def memory(traced: jax.stages.Traced, compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on one device, by what they are for (`KINDS`), of a step of a state and a batch."""
    (state, batch, *_), _ = compiled.input_shardings
    (shapes, inputs, *_), _ = traced.in_avals
    used = compiled.memory_analysis()
    assert used is not None
    return {
        "parameters": _local_bytes(shapes.params, state.params),
        "optimizer": _local_bytes(shapes.opt_state, state.opt_state),
        "carried": _local_bytes(shapes.carried, state.carried),
        "inputs": _local_bytes(inputs, batch),
        "temporaries": used.temp_size_in_bytes,
        "peak": used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes,
    }


def _local_bytes(values: PyTree, shardings: PyTree) -> int:
    """Bytes on one device; an input that the program does not read has no sharding, and none."""
    placed = jax.tree.leaves(shardings, is_leaf=lambda sharding: sharding is None)
    return sum(
        math.prod(sharding.shard_shape(value.shape)) * value.dtype.itemsize
        for value, sharding in zip(jax.tree.leaves(values), placed, strict=True)
        if sharding is not None
    )
