"""Processes that cannot become one job, or must not, and devices that are not there."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from deepsc_jax.runtime import cluster
from deepsc_jax.runtime.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import sys
from deepsc_jax.runtime import cluster
from deepsc_jax.runtime.errors import InputError
try:
    {}
except InputError as error:
    sys.exit(f"error: {{error}}")
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI_"))}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code)],
        cwd=ROOT,
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


INTERACTIVE = {
    "SLURM_JOB_ID": "5",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def test_a_step_of_one_task_goes_alone_whatever_the_job_is_allotted() -> None:
    done = run("print(cluster.initialize())", **INTERACTIVE)
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert done.stderr == (
        "SLURM has allotted 4 tasks and started 1 here: training with 1; srun without --ntasks "
        "starts all\n"
    )


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("found_by", ["flag", "slurm"])
def test_a_port_in_use_is_one_line(family: socket.AddressFamily, found_by: str) -> None:
    with socket.socket(family) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if found_by == "flag":
            done = run(f"cluster.initialize('localhost:{port}', 2, 0)")
        else:
            environment = INTERACTIVE | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
            done = run("cluster.initialize()", **environment, JAX_COORDINATOR_PORT=str(port))
    whose = f"--coordinator=localhost:{port}" if found_by == "flag" else "SLURM job 5"
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {whose}: port {port} cannot be listened at (Address al")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("platform", ["cuda", "tpu", "abacus"])
def test_a_platform_that_is_not_there_is_one_line(platform: str) -> None:
    if platform == "cuda" and pathlib.Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    done = run("cluster.require_devices()", JAX_PLATFORMS=platform)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: no such device was found (")
    assert len(done.stderr.splitlines()) == 1


def test_what_one_process_refuses_all_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> None:
        raise InputError("run: held")

    def answer(*refused: bool) -> Any:
        return lambda values: np.asarray([values, *refused])

    monkeypatch.setattr(cluster, "by_process", answer(False))
    with pytest.raises(InputError, match="run: held"):
        cluster.together(refuses)
    cluster.together(lambda: None)
    monkeypatch.setattr(cluster, "by_process", answer(False, True))
    with pytest.raises(InputError, match="process 2 cannot go on"):
        cluster.together(lambda: None)


@pytest.mark.parametrize("port", [0, 65536, 10**12])
def test_a_port_that_there_cannot_be_is_one_line(port: int) -> None:
    with pytest.raises(InputError, match="expected one from 1 to 65535"):
        cluster._require_free("--coordinator", port)


def test_waiting_for_the_others_is_said_after_a_while(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 0.05)
    with cluster._said_when_it_waits("host:1234"):
        time.sleep(0.5)
    assert "waiting for the other processes of the job at host:1234" in capfd.readouterr().err
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 60)
    with cluster._said_when_it_waits("host:1234"):
        pass
    assert capfd.readouterr().err == ""


def test_what_jax_is_told_of_numbers_is_compared() -> None:
    before = cluster.numerics()
    with jax.default_matmul_precision("highest"):
        changed = cluster.numerics()
    assert [name for name in before if before[name] != changed[name]] == [
        "JAX_DEFAULT_MATMUL_PRECISION"
    ]
