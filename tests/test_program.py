"""What programs do around their main."""

import os
import subprocess
import sys

import pytest

from deepsc_jax import program
from deepsc_jax.program import ALLOCATOR

PROGRAM = """
import os
from absl import flags
from deepsc_jax import program
flags.DEFINE_string("word", None, "")
names = list(program.ALLOCATOR)
program.run(lambda: print(flags.FLAGS.word, [os.environ.get(n) for n in names]), trains=True)
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
    assert program._compiles_for_gpus_it_lacks() == left_out
