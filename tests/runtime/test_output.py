"""Standard output that nobody reads, or that takes nothing."""

import os
import pathlib
import subprocess
import sys

import pytest

from deepsc_jax.runtime import exit_codes

PROGRAM = """
from absl import flags
from deepsc_jax.runtime import entry

def main():
    for number in range(flags.FLAGS.lines):
        print("line", number, flush=flags.FLAGS.each)

def define():
    flags.DEFINE_integer("lines", 1, "")
    flags.DEFINE_bool("each", False, "")

entry.run(main, define, computes=False, trains=%s)
"""
ROOT = pathlib.Path(__file__).parents[2]


def run(output: int, *arguments: str) -> tuple[int, str]:
    """Exit code, and what stands on standard error."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        command, stdout=output, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", PROGRAM % False),
        ("-c", PROGRAM % False, "--lines=9", "--each"),
        ("-u", "-c", PROGRAM % False, "--lines=9"),
        ("-c", PROGRAM % True, "--lines=9999"),
        ("-c", PROGRAM % False, "--helpfull"),
        ("-m", "deepsc_jax", "--help"),
    ],
)
def test_where_nobody_reads_it_ends_without_a_word(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(writer, *arguments) == (exit_codes.CLOSED_OUTPUT, "")
    finally:
        os.close(writer)


@pytest.mark.parametrize("lines", [1, 9999])
def test_output_that_takes_nothing_is_one_line(lines: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code, said = run(full, "-c", PROGRAM % False, f"--lines={lines}")
    finally:
        os.close(full)
    assert code == exit_codes.FILE_SYSTEM
    (line,) = said.splitlines()
    assert line.startswith("error: ")
    assert "No space left on device" in line
