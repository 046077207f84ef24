"""What every program does around its main: parse flags, and turn bad input into one line.

A program that takes the configuration calls `define_config_flags()` at import and
`config_from_flags()` in its main: there is one flag per field.
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import platform
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from absl import app, flags, logging

from deepsc_jax.config import SECTIONS, Config
from deepsc_jax.runtime.compilation_cache import install
from deepsc_jax.runtime.errors import InputError

# sysexits.h's EX_TEMPFAIL: nothing is wrong, start it again. The scripts in launch/ know it.
PREEMPTED = 75
INTERRUPTED = 130  # what shells say of a program ended by Ctrl-C

# glibc gives freed arrays back to the system and asks for them anew, page by page: half a million
# page faults a train step. So it keeps them, however large, and in huge pages.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def run(main: Callable[[], int | None], *, trains: bool = False) -> None:
    """Run `main` as a program and exit.

    Exits with 2 for a bad flag and 1 for bad input, each after one line on stderr; otherwise with
    what `main` returns: `PREEMPTED` where it has saved its work on SIGTERM and wants to go on;
    `INTERRUPTED` after Ctrl-C. A program that trains is started over with `ALLOCATOR` in its
    environment, which glibc reads at the start only, unless some of that is set already. Compiled
    programs are kept in `compilation_cache()` unless JAX_COMPILATION_CACHE_DIR names a folder.
    """
    if trains and sys.platform == "linux" and not ALLOCATOR.keys() & os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)
    if _compiles_for_gpus_it_lacks():
        jax.config.update("jax_platforms", "cpu")
    keep_compiled(
        jax.config.values["jax_compilation_cache_dir"] or compilation_cache(),
        float(os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0)),
    )
    app.run(lambda _: _guarded(main), flags_parser=_parse)


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


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}: options begin with --")
        if "working_size" in flags.FLAGS:
            config_from_flags()
    except (flags.Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return rest


def _guarded(main: Callable[[], int | None]) -> int | None:
    logging.set_verbosity(logging.ERROR)  # Orbax logs its internals
    try:
        return main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def define_cluster_flags() -> None:
    """Define the flags by which the processes of one job find each other."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "host:port at which process 0 listens for the others. Not needed under SLURM, Open MPI, "
        "Kubernetes and on Cloud TPU, where JAX finds out, nor for one process.",
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the job.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)

    @flags.multi_flags_validator(
        ["coordinator", "num_processes", "process_id"],
        "--coordinator=HOST:PORT, --num_processes and --process_id, below it, belong together",
    )
    def _(values: dict[str, Any]) -> bool:
        address, count, index = values.values()
        if address is None:
            return count is None and index is None
        port = address.rpartition(":")[2]
        return port.isdecimal() and None not in (count, index) and index < count


def define_config_flags() -> None:
    """Define one absl flag per field of every section of the configuration."""
    for section in SECTIONS.values():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            kind, text = hints[field.name], field.metadata["help"]
            default: Any = field.default
            if kind is bool:
                flags.DEFINE_bool(field.name, default, text)
            elif kind is int:
                flags.DEFINE_integer(field.name, default, text)
            elif kind is float:
                flags.DEFINE_float(field.name, default, text)
            elif typing.get_origin(kind) is Literal:
                flags.DEFINE_enum(field.name, default, list(typing.get_args(kind)), text)
            else:
                parser, serializer = _TupleParser(kind), _TupleSerializer()
                flags.DEFINE(parser, field.name, default, text, serializer=serializer)


def config_from_flags() -> Config:
    """The configuration that the parsed flags describe."""
    sections = {
        name: section(**{f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(section)})
        for name, section in SECTIONS.items()
    }
    return Config(**sections)


def flag_names() -> list[str]:
    """The name of every configuration flag, section by section."""
    return [f.name for section in SECTIONS.values() for f in dataclasses.fields(section)]


class _TupleParser(flags.ArgumentParser):
    """Comma-separated numbers of a fixed count; nested tuples are separated by slashes."""

    def __init__(self, kind: Any):
        super().__init__()
        self.items = typing.get_args(kind)
        self.nested = typing.get_origin(self.items[0]) is tuple
        self.number = typing.get_args(self.items[0])[0] if self.nested else self.items[0]
        self.syntactic_help = "numbers with commas between them"

    def parse(self, argument: Any) -> tuple[Any, ...]:
        if isinstance(argument, tuple):
            return argument
        if self.nested:
            return tuple(self._numbers(part) for part in argument.split("/"))
        numbers = self._numbers(argument)
        if len(numbers) != len(self.items):
            raise ValueError(f"{len(numbers)} values found, {len(self.items)} expected")
        return numbers

    def _numbers(self, text: str) -> tuple[Any, ...]:
        return tuple(self.number(part) for part in text.split(","))

    def flag_type(self) -> str:
        return "tuple"


class _TupleSerializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        nested = value and isinstance(value[0], tuple)
        parts = ["/".join(",".join(map(str, v)) for v in value)] if nested else map(str, value)
        return ",".join(parts)
