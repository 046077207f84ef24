"""What the figures of a benchmark depend on."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

from deepsc_jax.config import flags as config_flags
from deepsc_jax.runtime import device_mesh, entry
from deepsc_jax.runtime.types import JsonObject

# What else decides how fast something runs; the allocator's settings are among them.
SETTINGS = ("XLA_", "JAX_", "OMP_", "MKL_", "TORCH", "CUDA_", "NVIDIA_TF32_OVERRIDE")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "monai")


def environment() -> JsonObject:
    """This machine, its libraries, the command and its flags, and the commit."""
    return {
        "cores": device_mesh.usable_cores(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "flags": {name: _plain(value) for name, value in config_flags.changed().items()},
        "command": sys.argv[1:],
        "commit": _commit(),
    }


def settings() -> dict[str, str]:
    """The variables of this process's environment that decide how fast it is."""
    names = (*SETTINGS, *entry.ALLOCATOR)
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(names)}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    facts = pathlib.Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, and whether it was changed since."""
    here = pathlib.Path(__file__).parent
    said = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *command], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):  # installed without its repository
            return None
        said.append(done.stdout.strip())
    return f"{said[0]} with changes" if said[1] else said[0]


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
