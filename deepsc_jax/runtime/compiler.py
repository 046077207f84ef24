"""XLA: how the network's programs are compiled, and the host memory that compiling took."""

import ctypes
import functools
import gc
import hashlib
import importlib.util
import math
import os
import pathlib
import platform
import sys
import warnings

import jax
import numpy as np

from deepsc_jax.runtime.compilation_cache import install

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


def options(chip: str, tile: tuple[int, int, int], form: str) -> dict[str, bool | str]:
    """XLA's options for a network's programs on `chip` (a device's `platform`), run or planned.

    On GPUs convolutions stay channel-last, as the network writes them and as tensor cores want
    them; XLA's default turns every one to channel-first.

    On CPUs the barriers stay that keep apart what a block computes twice (`--remat`): without them
    XLA merges both again. For large tiles, Eigen's convolutions, a train step with YNNPACK's took
    half as long again (64x96x96; at 48x40x56 a fifth less), and the order of steps that needs the
    least memory, a third less. YNNPACK for products alone gave wrong sums (JAX 0.10.2; tests of
    meshes saw it). The form `direct` has oneDNN in place of YNNPACK.
    """
    if chip == "gpu":
        return {"xla_gpu_force_conv_nhwc": True}
    if chip != "cpu":
        return {}
    options: dict[str, bool | str] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    if form == "direct":
        options |= ONEDNN
    if math.prod(tile) >= LARGE_TILE:
        options["xla_cpu_experimental_ynn_fusion_type"] = ""
        options["xla_cpu_scheduler_type"] = "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
    return options


def give_back_memory() -> None:
    """Give the system the memory that was freed; call it once a program has been compiled.

    glibc keeps what tracing and compiling took, of a train step about a GiB. Does nothing but
    collect garbage where the C library cannot be asked to.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def set_up() -> None:
    """Choose the devices that are there, and keep what XLA compiles; before all else of JAX.

    In `compilation_cache()`, unless JAX_COMPILATION_CACHE_DIR names a folder.
    """
    if _compiles_for_gpus_it_lacks():
        jax.config.update("jax_platforms", "cpu")
    keep_compiled(
        jax.config.values["jax_compilation_cache_dir"] or compilation_cache(),
        float(os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0)),
    )


def keep_compiled(folder: str | None, least_seconds: float = 0.0) -> None:
    """Keep in `folder` what XLA compiled, if that took so many seconds; by default all.

    Not what `--conv_form=direct` compiles: XLA cannot write a program with oneDNN, of which JAX
    would warn each time.
    """
    install(compilation_cache())
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    unwritten = "Error writing persistent compilation cache entry .*: MemoryError"
    warnings.filterwarnings("ignore", unwritten)


def compilation_cache() -> str | None:
    """Where programs keep what XLA compiled, so that the next run need not: one folder a CPU model.

    What was compiled for one CPU may not run on another that shares the home folder. None for a
    user without one, as in some containers.
    """
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(root):
        return None
    described = pathlib.Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    features = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    kind = hashlib.sha256("\n".join(sorted(set(features))).encode()).hexdigest()[:8]
    return os.path.join(root, "deepsc_jax", f"xla-{platform.machine()}-{kind}")


def _compiles_for_gpus_it_lacks() -> bool:
    """Whether XLA's CUDA compiler is here without a GPU (extra `plan`).

    JAX would look for the rest of CUDA, and print a traceback, before it takes the CPU.
    """
    plugin = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    driver = any(pathlib.Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))
    tpu = importlib.util.find_spec("libtpu") is not None
    return plugin and not (driver or tpu or os.environ.get("JAX_PLATFORMS"))
