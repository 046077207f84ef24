"""Jobs of several processes, run for real on one machine: gloo in the place of a network."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
JOB = """
import os, signal, sys, time
import jax
import numpy as np
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime import cluster
from deepsc_jax.config import PlatformConfig
from deepsc_jax.runtime.errors import InputError

def compare(*given):
    values = {"store": "a"} | given[jax.process_index()]
    try:
        cluster.require_same({name: cluster.digest(value) for name, value in values.items()})
        print("same")
    except InputError as error:
        print(error)

def refuses_in(process):
    def check():
        if jax.process_index() == process:
            raise InputError("ct.nii: has changed")
    try:
        return cluster.together(check)
    except InputError as error:
        return error

what = sys.argv[1]
address = sys.argv[2:] and (sys.argv[2], 2, int(sys.argv[3]))
with cluster.job(*address) as count:
    mesh = device_mesh.make_mesh(PlatformConfig())
    found = cluster.by_process(np.asarray([cluster.is_writer()]))
    print("processes", count, "devices", mesh.size, found.tolist(), flush=True)
    if what == "compares":
        print("float64", cluster.by_process(np.asarray([jax.process_index() + 1 / 3])).tolist())
        compare({}, {})
        compare({"--learning_rate": "1"}, {"--learning_rate": "2"})
        compare({}, {"--newer": "1"})
        compare({"--a": "1"}, {"--b": "1"})
        print("threshold", refuses_in(1), flush=True)
    if what == "late":
        device_mesh.connect(mesh)
        time.sleep(0 if cluster.is_writer() else 40)
        print("any:", bool(device_mesh.make_any_process(mesh)(not cluster.is_writer())))
    if not cluster.is_writer():
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "fails":
            raise InputError("scan.nii.gz: not a scan")
    if what not in ("ends", "late", "compares"):
        cluster.wait_for_all("never")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start_job(what: str, *, explicit: bool = True, **environment: str) -> list[subprocess.Popen]:
    """Two processes of `JOB` without a launcher; `environment` may depend on {i}."""
    address = [f"localhost:{free_port()}"]
    jobs = []
    for i in range(2):
        flags = [*address, str(i)] if explicit else []
        env = {name: value.format(i=i) for name, value in environment.items()}
        jobs.append(
            subprocess.Popen(
                [sys.executable, "-c", JOB, what, *flags],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return jobs


LAUNCHERS = {
    "slurm": {
        "SLURM_JOB_ID": "{port}",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{{i}}",
        "SLURM_LOCALID": "{{i}}",
    },
    "open-mpi": {
        "OMPI_MCA_orte_hnp_uri": "{job}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{{i}}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{{i}}",
    },
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_processes_of_a_launcher_find_each_other(launcher: str) -> None:
    # JAX makes the port of the job's number: 61440 and what is left of it by 4096.
    port = os.getpid() % 4096
    settings = LAUNCHERS[launcher].items()
    environment = {name: value.format(port=port, job=port * 4096) for name, value in settings}
    jobs = start_job("ends", explicit=False, **environment)
    for job in jobs:
        said, errors = job.communicate(timeout=100)
        assert job.returncode == 0, errors
        assert "processes 2 devices 2 [[True], [False]]" in said


def test_processes_that_would_each_train_alone_are_refused() -> None:
    code = "from deepsc_jax.runtime import cluster; cluster.initialize()"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "OMPI_COMM_WORLD_SIZE": "8"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "InputError: 8 processes were started by a launcher that JAX does not" in done.stderr


@pytest.mark.parametrize(
    ("flags", "accepted"),
    [
        ([], True),
        (["--coordinator=host:1234", "--num_processes=2", "--process_id=1"], True),
        (["--coordinator=host:1234", "--num_processes=2"], False),
        (["--coordinator=host", "--num_processes=2", "--process_id=1"], False),
        (["--coordinator=host:1234", "--num_processes=2", "--process_id=2"], False),
        (["--num_processes=2"], False),
    ],
)
def test_the_flags_of_a_job_belong_together(flags: list[str], accepted: bool) -> None:
    code = (
        "from deepsc_jax.runtime import entry, job_flags\n"
        "entry.run(lambda: print('accepted'), job_flags.define_flags)"
    )
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if accepted else 2)
    assert ("accepted" in done.stdout) == accepted
    assert accepted or "belong together" in done.stderr


def test_a_process_that_fails_says_why_and_takes_the_others_with_it() -> None:
    first, second = start_job("fails")
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 1
    assert "error: process 1 of 2: scan.nii.gz: not a scan" in said
    assert "Traceback" not in said
    said = first.communicate(timeout=60)[1]
    assert first.returncode != 0
    assert "another process is gone" in said or "another task died" in said


def test_what_differs_among_processes_is_named_in_all_of_them() -> None:
    refusals = ("cannot go on: its own line says why", "ct.nii: has changed")
    for job, refusal in zip(start_job("compares"), refusals, strict=True):
        said, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors
        lines = [line for line in said.splitlines() if not line.startswith("[Gloo]")]
        _, gathered, same, differs, newer, renamed, threshold = lines
        assert gathered == f"float64 {[[1 / 3], [1 + 1 / 3]]}"  # no float32 between
        assert same == "same"
        assert "differ from process 0 in --learning_rate (process 1): give all of" in differs
        assert "different versions of this program" in newer
        assert "different versions of this program" in renamed
        assert threshold.startswith("threshold ")
        assert threshold.endswith(refusal)


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_without_a_launcher_too_the_others_end_within_a_minute(how: str) -> None:
    first, second = start_job(how)
    try:
        said = first.communicate(timeout=90)[1]  # 30 s of silence, and the start
        assert first.returncode not in (0, None)
        assert "another process is gone" in said or "another task died" in said
    finally:
        second.kill()
        second.wait()


@pytest.mark.slow
@pytest.mark.scale
def test_processes_wait_for_one_that_compiles_longer() -> None:
    # Gloo's own patience, where devices reduce together for the first time, is 30 seconds.
    for job in start_job("late", JAX_NUM_CPU_DEVICES="2"):
        said, errors = job.communicate(timeout=300)
        assert job.returncode == 0, errors
        assert "any: True" in said
