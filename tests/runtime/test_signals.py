"""SIGTERM, SIGHUP and SIGINT: at once where nothing is to be saved, heeded where something is."""

import signal
import subprocess
import sys
import time

import pytest

from deepsc_jax.runtime import exit_codes

CODES = {
    signal.SIGTERM: exit_codes.PREEMPTED,
    signal.SIGHUP: exit_codes.PREEMPTED,
    signal.SIGINT: exit_codes.INTERRUPTED,
}

# It hangs in one C call, as a compilation does: no Python handler runs in the main thread.
HANGS = """
import hashlib, sys, threading
from deepsc_jax.runtime.signals import signals

signals.listen()
threading.Thread(target=lambda: print("ready", flush=True)).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)
"""
SAVES = """
import os, sys, time
from deepsc_jax.runtime.signals import signals

signals.listen()
with signals.heeded("step 3"):
    print("ready", flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
sys.exit(signals.code)
"""
HELD = """
import os, signal, sys
from deepsc_jax.runtime.signals import hold, signals
if len(sys.argv) == 1:
    hold()
    os.kill(os.getpid(), signal.SIGTERM)
    os.execv(sys.executable, [*sys.orig_argv, "again"])
signals.listen()
import time
time.sleep(20)
"""
FORKS = """
import multiprocessing, time
from deepsc_jax.runtime.signals import signals

signals.listen()
with signals.heeded("a step"):
    ended = set()
    for _ in range(50):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        worker.terminate()
        worker.join(5)
        ended.add(worker.exitcode)
    print(*ended, signals.received)
"""


def start(program: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_with_nothing_to_save_a_signal_ends_even_a_compilation_at_once(
    number: signal.Signals, code: int
) -> None:
    run, begun = start(HANGS), time.monotonic()
    run.send_signal(number)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == code
    assert errors.startswith(f"{number.name} during start-up: nothing to save; ")
    assert len(errors.splitlines()) == 1
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_what_is_to_be_saved_is_saved(number: signal.Signals, code: int) -> None:
    run = start(SAVES, "0.1")
    run.send_signal(number)
    assert run.communicate(timeout=20) == ("saving\nsaved\n", "")
    assert run.returncode == code


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not() -> None:
    run = start(SAVES, "60")
    run.send_signal(signal.SIGTERM)
    assert run.stdout is not None
    assert run.stdout.readline() == "saving\n"
    run.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=20)
    assert run.returncode == exit_codes.INTERRUPTED
    assert errors.startswith("SIGINT again during step 3: ended at once; ")


def test_a_signal_during_an_exec_is_heard_after_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELD], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == exit_codes.PREEMPTED
    assert done.stderr.startswith("SIGTERM during start-up: nothing to save; ")


def test_what_a_forked_worker_is_sent_is_not_its_parents() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stdout == f"{-signal.SIGTERM} None\n", done.stderr
