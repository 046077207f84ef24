"""How the tests of `prepare` call it: small phantoms, kept as they come."""

import subprocess
import sys

from deepsc_jax.config import DataConfig

SIZE = 48
# The store keeps the phantoms as they come, so that files and store can be compared.
DATA = DataConfig(working_size=(SIZE, SIZE), tile=(8, 24, 24), depth_bucket=8)
FLAGS = ("--working_size=48,48", "--tile=8,24,24", "--depth_bucket=8", "--workers=1")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "deepsc_jax.prepare", *FLAGS, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
