"""All commands as one, and what those that only read scans must not import."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from deepsc_jax.__main__ import COMMANDS
from deepsc_jax.data.store import Store
from deepsc_jax.models import registry

# What takes seconds to import and memory in every worker, and may take the accelerator.
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow", "torch")
TELL = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))
"""


def deepsc(*arguments: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"{TELL}\nfrom deepsc_jax import __main__\n__main__.run()"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_commands_are_listed_with_what_they_do_and_none_is_imported(arguments):
    done = deepsc(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, imported = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["deepsc", name] for name in COMMANDS]
    for name, line in zip(COMMANDS, lines, strict=True):
        document = importlib.import_module(f"deepsc_jax.{name}").__doc__ or ""
        assert line.endswith(document.splitlines()[0])
    assert imported == "[]"


def test_every_command_has_its_flags_and_its_main():
    for name in COMMANDS:
        module = importlib.import_module(f"deepsc_jax.{name}")
        assert all(callable(getattr(module, part)) for part in ("define_flags", "main", "run"))


def test_an_unknown_command_is_refused_in_one_line():
    done = deepsc("learn", "--seed=1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: learn: expected one of prepare, train, ")


def test_a_command_shows_its_own_flags():
    done = deepsc("prepare", "--help")
    assert "--phantoms" in done.stdout
    assert "All commands as one" not in done.stdout


def test_prepare_writes_a_store_without_jax(tmp_path: pathlib.Path):
    done = deepsc(
        "prepare",
        "--flagfile=configs/tiny.flags",  # the shipped one, with flags of a model
        "--phantoms=1,0,0",
        "--phantom_size=32",
        "--out=data",
        "--workers=1",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    (case,) = Store(tmp_path / "data" / "store").cases()
    assert case.split == "train"


# With all that they import: scans, stores, lungs, pictures.
FREE = (
    "runtime.entry",
    "config.flags",
    "models.registry",
    "data.batch",
    "data.augment",
    "prepare",
    "inference.workers",
)


FOLDERS = [name for name, row in registry.MODELS.items() if ".config:" in row.options]


def test_what_processes_that_read_scans_import_is_free_of_jax():
    program = f"""
import importlib, sys
for module in {FREE}:
    importlib.import_module(f"deepsc_jax.{{module}}")
    print(module, [name for name in {HEAVY} if name in sys.modules])
from deepsc_jax.models import registry
for name in {FOLDERS}:  # a network of one file has its options beside it
    registry.options(name)()
    print(name, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{name} []" for name in (*FREE, *FOLDERS)]
