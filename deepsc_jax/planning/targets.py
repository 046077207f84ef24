"""The chips a plan knows: their published peaks, and how XLA is told of them.

A GPU is described to XLA's compiler by a `GpuTargetConfigProto` in text form, which `target_config`
writes from the facts below; a TPU by the name of a topology, which libtpu knows.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Mapping

import jax
from jax.experimental import topologies

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import Untyped

GIB = 2**30
# Kinds of products, by what limits their speed: operands of 16 bits; float32 at the default
# precision (TensorFloat-32 on GPU, one bfloat16 pass on TPU); float32 that must stay float32.
PRODUCTS = ("bfloat16", "float32", "float32_exact")


@dataclasses.dataclass(frozen=True)
class GpuFacts:
    """What XLA's compiler asks about a GPU: limits of a kernel, and of one multiprocessor."""

    capability: tuple[int, int]
    multiprocessors: int
    fpus: int
    clock_ghz: float
    l2_bytes: int
    shared_per_multiprocessor: int
    shared_per_block: int
    architecture_specific: bool


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, as its maker publishes it: per chip, per second, dense.

    Attributes:
      title: its full name.
      memory: bytes of device memory that the driver or the TPU compiler offers.
      share: of it that JAX takes: on GPU by default 0.75 (XLA_PYTHON_CLIENT_MEM_FRACTION).
      bandwidth: bytes per second of device memory.
      peaks: FLOP per second of each of `PRODUCTS`.
      joined: chips that fast links join: a GPU node, a TPU pod.
      link: bytes per second that a chip sends over these links.
      network: bytes per second that a chip sends beyond them.
      source: where the figures were published.
      gpu: what XLA's CUDA compiler wants to know; None for a TPU.
      tpu: generation and number of torus axes; None for a GPU.
    """

    title: str
    memory: int
    share: float
    bandwidth: float
    peaks: Mapping[str, float]
    joined: int
    link: float
    network: float
    source: str
    gpu: GpuFacts | None = None
    tpu: tuple[str, int] | None = None

    @property
    def limit(self) -> int:
        """Bytes of a chip's memory that a program may take."""
        return int(self.memory * self.share)


def _peaks(bfloat16: float, float32: float, exact: float) -> Mapping[str, float]:
    return dict(zip(PRODUCTS, (bfloat16, float32, exact), strict=True))


def _tpu_peaks(bfloat16: float) -> Mapping[str, float]:
    """Only bfloat16 is published; XLA computes exact float32 products in six bfloat16 passes."""
    return _peaks(bfloat16, bfloat16, bfloat16 / 6)


CHIPS: Mapping[str, Chip] = {
    "a100": Chip(
        title="NVIDIA A100 SXM 80 GB",
        memory=85_100_068_864,
        share=0.75,
        bandwidth=2.039e12,
        peaks=_peaks(312e12, 156e12, 19.5e12),
        joined=8,
        link=300e9,
        network=25e9,
        source="NVIDIA A100 datasheet, 2021; DGX A100: 200 Gb/s a GPU",
        gpu=GpuFacts((8, 0), 108, 64, 1.41, 41_943_040, 167_936, 166_912, False),
    ),
    "h100": Chip(
        title="NVIDIA H100 SXM 80 GB",
        memory=84_942_979_072,
        share=0.75,
        bandwidth=3.35e12,
        peaks=_peaks(989e12, 494e12, 67e12),
        joined=8,
        link=450e9,
        network=50e9,
        source="NVIDIA H100 datasheet, 2023, without sparsity; DGX H100: 400 Gb/s a GPU",
        gpu=GpuFacts((9, 0), 132, 128, 1.98, 52_428_800, 233_472, 232_448, True),
    ),
    "h200": Chip(
        title="NVIDIA H200 SXM",
        memory=107_368 * 2**20 * 4 // 3,  # of which JAX 0.11.2 took 0.75, that many MiB
        share=0.75,
        bandwidth=4.8e12,
        peaks=_peaks(989e12, 494e12, 67e12),
        joined=8,
        link=450e9,
        network=50e9,
        source="NVIDIA H200 datasheet, 2024, without sparsity; DGX H200: 400 Gb/s a GPU",
        gpu=GpuFacts((9, 0), 132, 128, 1.98, 62_914_560, 233_472, 232_448, True),
    ),
    "b200": Chip(
        title="NVIDIA B200 (HGX)",
        memory=191_514_411_008,
        share=0.75,
        bandwidth=8.0e12,
        peaks=_peaks(2250e12, 1100e12, 80e12),
        joined=8,
        link=900e9,
        network=50e9,
        source="NVIDIA Blackwell architecture brief, 2024, HGX B200 without sparsity; "
        "DGX B200: 400 Gb/s a GPU",
        gpu=GpuFacts((10, 0), 148, 128, 1.965, 132_644_864, 233_472, 232_448, True),
    ),
    "v5e": Chip(
        title="TPU v5e",
        memory=int(15.75 * GIB),
        share=1.0,
        bandwidth=819e9,
        peaks=_tpu_peaks(197e12),
        joined=256,
        link=200e9,
        network=3.125e9,
        source="cloud.google.com/tpu/docs/v5e: 400 GB/s of links both ways; network 6.4 Tb/s a pod",
        tpu=("v5e", 2),
    ),
    "v5p": Chip(
        title="TPU v5p",
        memory=int(95.74 * GIB),
        share=1.0,
        bandwidth=2.765e12,
        peaks=_tpu_peaks(459e12),
        joined=8960,
        link=600e9,
        network=6.25e9,
        source="cloud.google.com/tpu/docs/v5p: 1200 GB/s of links both ways, 50 Gb/s of network",
        tpu=("v5p", 3),
    ),
    "v6e": Chip(
        title="TPU v6e",
        memory=int(31.25 * GIB),
        share=1.0,
        bandwidth=1.638e12,
        peaks=_tpu_peaks(918e12),
        joined=256,
        link=400e9,
        network=12.5e9,
        source="cloud.google.com/tpu/docs/v6e: 800 GB/s of links both ways; "
        "network assumed 100 Gb/s a chip",
        tpu=("v6e", 2),
    ),
}


def devices(name: str, count: int) -> list[Untyped]:
    """`count` devices of the chip `name` that can be compiled for, and nothing else.

    Raises:
      InputError: the compiler for them is not installed, or there is no such topology.
    """
    chip = CHIPS[name]
    if chip.gpu is not None:
        _require(("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), name, "plan")
        nodes = -(-count // chip.joined)
        topology = f"1x{nodes}x{count // nodes}"
        if count % nodes:
            raise InputError(
                f"--devices={count}: not a whole number of GPUs on each of {nodes} nodes of "
                f"{chip.joined}: give a multiple of {nodes}"
            )
        arguments: dict[str, Untyped] = {"topology": topology, "target_config": target_config(chip)}
    else:
        assert chip.tpu is not None
        _require(("libtpu",), name, "tpu")
        _quiet_libtpu()
        sides = _torus(count, chip.tpu[1])
        topology = f"{chip.tpu[0]}:" + "x".join(map(str, sides))
        arguments = {"topology_name": topology}
        if count < 4:
            arguments["chips_per_host_bounds"] = (*sides, 1, 1)[:3]
    try:
        described = topologies.get_topology_desc(
            platform="cuda" if chip.gpu else "tpu", **arguments
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise InputError(
            f"--platform={name} --devices={count}: the compiler refuses the topology {topology} "
            f"({str(error).splitlines()[0]}): give another number of devices"
        ) from error
    return list(described.devices)


def _require(modules: tuple[str, ...], name: str, extra: str) -> None:
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module):
                return
    raise InputError(
        f"--platform={name}: the compiler for it, {modules[0]}, was not found: "
        f"pip install 'deepsc_jax[{extra}]'"
    )


def _quiet_libtpu() -> None:
    """Tell libtpu that there is no TPU here, so that it neither looks for one nor complains."""
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "4",
        "TPU_MIN_LOG_LEVEL": "4",
    }.items():
        os.environ.setdefault(variable, value)


@functools.cache
def _torus(count: int, axes: int) -> tuple[int, ...]:
    """The sides of the most cubic box of `count` chips, smallest first."""
    if axes == 1:
        return (count,)
    sides = [side for side in range(1, count + 1) if count % side == 0]
    boxes = [(side, *_torus(count // side, axes - 1)) for side in sides]
    return min((tuple(sorted(box)) for box in boxes), key=lambda box: (sum(box), box))


def target_config(chip: Chip) -> str:
    """A GPU as the textproto of XLA's `stream_executor.GpuTargetConfigProto`."""
    gpu = chip.gpu
    assert gpu is not None
    major, minor = gpu.capability
    feature = "ACCELERATED_FEATURES" if gpu.architecture_specific else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_per_block}
  shared_memory_per_core: {gpu.shared_per_multiprocessor}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2_bytes}
  memory_bandwidth: {math.floor(chip.bandwidth)}
  device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.title}"
"""
