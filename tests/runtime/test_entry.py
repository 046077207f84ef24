"""What programs do around their main."""

import os
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import pytest

from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.entry import ALLOCATOR

PROGRAM = """
import os
from absl import flags
from deepsc_jax.runtime import entry
names = list(entry.ALLOCATOR)
entry.run(
    lambda: print(flags.FLAGS.word, [os.environ.get(n) for n in names]),
    lambda: flags.DEFINE_string("word", None, ""),
    trains=True,
)
"""


def run(**environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--word=kept"],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_program_that_trains_has_the_allocator_settings_and_its_flags():
    assert run() == f"kept {list(ALLOCATOR.values())}"


def test_settings_of_the_users_own_are_left_alone():
    assert run(MALLOC_TOP_PAD_="1") == "kept [None, None, '1', None]"


CACHING = """
import jax
from deepsc_jax.runtime import entry
entry.run(lambda: jax.jit(lambda x: x + 1)(1).block_until_ready() and None, lambda: None)
"""


def compiled_into(folder: pathlib.Path, **environment: str) -> list[pathlib.Path]:
    """The folders below `folder` in which a program left what it compiled."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    command = [sys.executable, "-c", CACHING]
    subprocess.run(command, env=clean | environment, check=True)
    return [path.parent for path in folder.rglob("jit__lambda*-cache")]


def test_what_is_compiled_is_kept_for_the_next_run(tmp_path: pathlib.Path):
    (kept,) = compiled_into(tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert re.fullmatch(r"deepsc_jax/xla-\w+-[0-9a-f]{8}", str(kept.relative_to(tmp_path)))


def test_the_users_own_folder_of_compiled_programs_is_taken(tmp_path: pathlib.Path):
    own, other = tmp_path / "own", tmp_path / "other"
    named = {"JAX_COMPILATION_CACHE_DIR": str(own), "XDG_CACHE_HOME": str(other)}
    assert compiled_into(tmp_path, **named) == [own]


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert compiler.compilation_cache() is None


@pytest.mark.parametrize(
    ("found", "driver", "platforms", "left_out"),
    [
        (["jax_cuda13_plugin"], False, "", True),
        (["jax_cuda13_plugin"], True, "", False),
        (["jax_cuda13_plugin"], False, "cuda", False),
        (["jax_cuda13_plugin", "libtpu"], False, "", False),
        ([], False, "", False),
    ],
)
def test_gpus_are_left_out_where_only_their_compiler_is_installed(
    monkeypatch: pytest.MonkeyPatch, found: list[str], driver: bool, platforms: str, left_out: bool
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr("pathlib.Path.exists", lambda _: driver)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert compiler._compiles_for_gpus_it_lacks() == left_out


ENDS = """
import sys
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
def main():
    {}
entry.run(main, lambda: None, computes=False, trains={})
"""


def ended(code: str, *, trains: bool = False) -> subprocess.CompletedProcess:
    """A program that does that."""
    command = [sys.executable, "-c", ENDS.format(code, trains)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("trains", [False, True])
def test_what_a_user_or_a_machine_can_cause_is_one_line_and_a_code(trains: bool):
    cases = {
        "raise InputError('scan.nii: no scan')": (1, "error: scan.nii: no scan"),
        "open('/nowhere/file')": (74, "error: /nowhere/file: No such file or directory: "),
        "raise MemoryError": (71, "error: out of memory (MemoryError): "),
    }
    for code, (expected, line) in cases.items():
        done = ended(code, trains=trains)
        assert done.returncode == expected
        assert done.stderr.startswith(line)
        assert len(done.stderr.splitlines()) == 1


def test_an_error_of_ours_keeps_its_traceback_and_has_a_code():
    done = ended("print('so far'); return 1 / 0")
    assert (done.returncode, done.stdout) == (70, "so far\n")
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ZeroDivisionError(")


def test_ctrl_c_is_one_line_and_its_own_code():
    done = ended("raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_of_a_program_that_cannot_be_kept_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiler.keep_compiled(None)
        for reason in ("MemoryError", "OSError: no space left"):
            warnings.warn(
                f"Error writing persistent compilation cache entry for 'f': {reason}", stacklevel=1
            )
    assert [str(one.message).rpartition(" ")[2] for one in said] == ["left"]


HANDLES = """
import os, signal, sys, tempfile, time
from deepsc_jax.runtime import entry
def main():
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(dir=os.environ["PLACE"]):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
entry.run(main, lambda: None, computes=False, trains=True)
"""


def test_a_program_with_a_handler_of_its_own_cleans_up_as_benchmarks_do(tmp_path: pathlib.Path):
    """It has the allocator settings of training, and nothing to save."""
    done = subprocess.run(
        [sys.executable, "-c", HANDLES],
        env=os.environ | {"PLACE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (143, "")
    assert not list(tmp_path.iterdir())
