"""The demo passes on what it is sent, and waits for what its programs save."""

import signal
import subprocess
import sys

import pytest

# What it runs says when it is ready, saves for a moment on a signal, and ends with a code of it.
PROGRAM = """
import signal, sys, time

def save(number, _):
    time.sleep(0.6)
    print("saved", flush=True)
    sys.exit(100 + number)

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, save)
print("ready", flush=True)
time.sleep(60)
"""
DEMO = """
import sys
from deepsc_jax.demo import run_passing_signals
print("ended with", run_passing_signals([sys.executable, "-c", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_it_is_sent_its_program_hears_once(number: signal.Signals) -> None:
    command = [sys.executable, "-c", DEMO, PROGRAM]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    said, errors = run.communicate(timeout=30)
    assert said.splitlines() == ["saved", f"ended with {100 + number}"]
    assert errors == ""
