"""All commands as one, and what those that only read scans must not import."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

from deepsc_jax import __version__
from deepsc_jax.__main__ import COMMANDS
from deepsc_jax.data.store import Store
from deepsc_jax.models import registry
from deepsc_jax.runtime.entry import ALLOCATOR

# What takes seconds to import and memory in every worker, and may take the accelerator.
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow", "torch")
TELL = f"""
import atexit, sys
atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))
"""


def deepsc(*arguments: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"{TELL}\nfrom deepsc_jax import __main__\n__main__.run()"]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | ALLOCATOR,  # or `train` would be started over
    )


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_commands_are_listed_with_what_they_do_and_none_is_imported(arguments):
    done = deepsc(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    usage, _, *lines, _, more, imported = done.stdout.splitlines()
    assert usage.startswith("usage: deepsc COMMAND")
    assert "deepsc COMMAND --help" in more
    assert [line.split()[0] for line in lines] == list(COMMANDS)
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
    assert line.startswith("error: learn: expected one of prepare, analyze, ")


def test_the_version_is_told():
    assert deepsc("--version").stdout.splitlines()[0] == f"deepsc_jax {__version__}"


def test_the_help_of_a_command_is_its_own_and_ends_well():
    done = deepsc("train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "deepsc train --flagfile=" in done.stdout
    assert "python -m" not in done.stdout
    assert "--flagfile: " in done.stdout
    assert "--model: <deepsc|" in done.stdout
    assert "deepsc: segmentation, classification, joint;" in " ".join(done.stdout.split())
    assert "--tile:" not in done.stdout
    assert "All commands as one" not in done.stdout


def test_all_flags_of_a_command_are_listed_its_own_first_and_no_librarys():
    done = deepsc("prepare", "--helpfull")
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^ +--(?:\[no\])?([\w.]+):", done.stdout, re.MULTILINE)
    assert listed[:2] == ["flagfile", "phantoms"]
    assert "tile" in listed
    assert not {"alsologtostderr", "pdb", "undefok"} & set(listed)


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (
            "train",
            ["--lerning_rate=3"],
            "error: --lerning_rate: no such flag: perhaps --deepsc.segmentation.learning_rate or "
            "--deepsc.classification.learning_rate or --deepsc.joint.learning_rate: "
            "`deepsc train --helpfull` lists all",
        ),
        (
            "train",
            ["--workdir=run"],
            "error: --data_dir is missing: folder that `prepare` wrote; `deepsc train --help` "
            "shows how it is called",
        ),
        (
            "evaluate",
            ["--split=tests", "--checkpoint=a", "--data_dir=b", "--out=c"],
            "error: --split=tests: expected one of train, validation, test",
        ),
    ],
)
def test_a_mistake_in_a_flag_is_told_before_jax_is_imported(command, flags, said):
    done = deepsc(command, *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [said]
    assert done.stdout.splitlines() == ["[]"]


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
from deepsc_jax.runtime.entry import ALLOCATOR
for name in {FOLDERS}:  # a network of one file has its options beside it
    registry.options(name)()
    print(name, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"{name} []" for name in (*FREE, *FOLDERS)]
