"""Memory that was freed goes back to the system."""

import platform
import subprocess
import sys

import pytest

# Blocks too small for mmap of their own, of which a few are kept, so that glibc keeps the heap.
FREED = """
from deepsc_jax.runtime import compiler
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
blocks = [bytes(60_000) for _ in range(4000)]
blocks = blocks[::400]
before = resident()
compiler.give_back_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_is_given_back():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100_000  # of 240 MB, in KiB
