"""What programs do around their main."""

import os
import subprocess
import sys

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
