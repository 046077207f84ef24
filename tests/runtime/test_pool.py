"""Jobs in processes: their results, and that no process outlives the one that started it."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.pool import AbortError, in_parallel


def job(item: int | str) -> int:
    if item == "abort":
        raise AbortError("the disk is full")
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "missing":
        pathlib.Path("/absent/file").read_text()
    return 2 * int(item)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_failures_in_their_place(workers, capfd):
    one, two, three, four = in_parallel(job, [1, "missing", "two", 4], workers, "")
    assert (one, four) == (2, 8)
    assert str(two) == "[Errno 2] No such file or directory: '/absent/file'"
    assert "ValueError" in str(three)
    errors = capfd.readouterr().err
    assert "ValueError" in errors  # a defect's trace helps to mend it, a missing file needs none
    assert "/absent/file" not in errors


@pytest.mark.parametrize("workers", [1, 2])
def test_one_job_can_end_all(workers):
    with pytest.raises(AbortError, match="the disk is full"):
        in_parallel(job, ["abort", *range(20)], workers, "")


def test_a_killed_worker_is_said():
    with pytest.raises(InputError, match=r"--workers=2: a worker was killed.*use fewer"):
        in_parallel(job, ["kill", 1], 2, "")


SCRIPT = """
    import os, pathlib, sys, time

    def job(folder):
        pathlib.Path(folder, str(os.getpid())).touch()
        time.sleep(600)

    if __name__ == "__main__":
        from deepsc_jax.runtime.pool import in_parallel
        in_parallel(job, sys.argv[1:] * 2, 2, "")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_the_program(tmp_path, number):
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(textwrap.dedent(SCRIPT))
    started.mkdir()
    with subprocess.Popen(
        [sys.executable, script, started],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as program:
        wait_for(lambda: len(list(started.iterdir())) == 2)
        program.send_signal(number)
        # The pipe is closed once all that have it, the workers too, are gone.
        _, errors = program.communicate(timeout=60)
    assert program.returncode == -number
    assert errors.count(b"Traceback") == (number == signal.SIGINT)  # the program's own alone
    for path in started.iterdir():
        wait_for(lambda path=path: not pathlib.Path("/proc", path.name).exists())


def wait_for(condition) -> None:
    """Return when it holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
