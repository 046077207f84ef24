"""The scripts for one machine and for a TPU pod, and `make demo`."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sysconfig
import time

import pytest
from stand_ins import LAUNCH, SAVES, calls, stand_in, start, terminate_when_called

SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def test_every_script_passes_shellcheck() -> None:
    jobs = ["distil.sbatch", "folds.sbatch", "local.sh", "predict.sbatch", "slurm.sbatch"]
    assert ["benchmark_gpu.sh", *jobs, "tpu.sh"] == SCRIPTS
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    found = shutil.which("shellcheck", path=path)
    assert found, "shellcheck is missing: pip install -e '.[test]'"
    command = [found, *(str(LAUNCH / name) for name in SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_local_numbers_the_processes_and_passes_sigterm_on(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "python", SAVES)
    run = start(tmp_path, "local.sh", "3", "--workdir=a b")
    terminate_when_called(run, tmp_path, 3)
    run.communicate(timeout=30)
    assert run.returncode == 75
    job = "--coordinator=localhost:1234 --num_processes=3"
    assert sorted(calls(tmp_path)) == [
        f"python -m deepsc_jax.train --workdir=a b {job} --process_id={i}" for i in range(3)
    ]


def alive(folder: pathlib.Path) -> list[int]:
    """The stand-ins for python that go on."""
    found = []
    for pid in (folder / "pids.txt").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [int(pid)] * (state != "Z")  # not one that nobody has asked for its code
    return found


def path_without(folder: pathlib.Path, left_out: str) -> str:
    """A PATH of all programs but one."""
    programs = folder / "programs"
    programs.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in pathlib.Path(place).glob("*"):
            link = programs / program.name
            link.unlink(missing_ok=True)
            link.symlink_to(program)
    (programs / left_out).unlink(missing_ok=True)
    return f"{folder}{os.pathsep}{programs}"


@pytest.mark.parametrize("setpriv", [True, False])
def test_the_processes_save_and_end_when_the_launcher_is_killed(
    tmp_path: pathlib.Path, setpriv: bool
) -> None:
    path = {} if setpriv else {"PATH": path_without(tmp_path, "setpriv")}
    assert not setpriv or shutil.which("setpriv"), "util-linux is missing"
    stand_in(tmp_path, "python", f'echo $$ >>"{tmp_path}/pids.txt"\n{SAVES}')
    run = start(tmp_path, "local.sh", "2", **path)
    while len(calls(tmp_path)) < 2:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(alive(tmp_path)) == 2
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while alive(tmp_path):
        assert time.monotonic() < deadline, "its processes go on"
        time.sleep(0.05)


def test_ctrl_c_saves_and_ends_with_its_own_code_and_again_ends_at_once(
    tmp_path: pathlib.Path,
) -> None:
    stand_in(tmp_path, "python", SAVES)
    run = start(tmp_path, "local.sh", "2")
    terminate_when_called(run, tmp_path, 2, signal.SIGINT)
    run.communicate(timeout=30)
    assert run.returncode == 130
    stand_in(tmp_path, "python", f'echo $$ >>"{tmp_path}/pids.txt"\ntrap "" TERM\nexec sleep 60')
    (tmp_path / "calls.txt").unlink()
    run = start(tmp_path, "local.sh", "2")
    terminate_when_called(run, tmp_path, 2, signal.SIGINT)
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=30)
    assert run.returncode == 130
    time.sleep(0.1)
    assert alive(tmp_path) == []


def test_a_closed_terminal_saves_as_sigterm_does(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "python", SAVES)
    run = start(tmp_path, "local.sh", "2")
    terminate_when_called(run, tmp_path, 2, signal.SIGHUP)
    run.communicate(timeout=30)
    assert run.returncode == 75


def test_a_python_that_is_none_is_named(tmp_path: pathlib.Path) -> None:
    run = start(tmp_path, "local.sh", "2", PYTHON=str(tmp_path / "none"))
    errors = run.communicate(timeout=30)[1]
    assert run.returncode == 2
    assert errors == (
        f"error: PYTHON={tmp_path}/none is no program: name the one of the installation\n"
    )


@pytest.mark.parametrize("setting", [{"PAUSE": "30s"}, {"RESTARTS": "-1"}, {"RESTARTS": "many"}])
def test_a_setting_of_tpu_that_is_no_number_is_named(
    tmp_path: pathlib.Path, setting: dict[str, str]
) -> None:
    stand_in(tmp_path, "gcloud", "exit 75")
    run = start(tmp_path, "tpu.sh", "pod", "zone", "--workdir=w", **setting)
    errors = run.communicate(timeout=30)[1]
    ((name, value),) = setting.items()
    assert errors == f"error: {name}={value}: expected a whole number\n"
    assert (run.returncode, calls(tmp_path)) == (2, [])


def test_local_ends_with_the_process_that_failed(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "python", 'case "$*" in *id=1) exit 7 ;; esac\nexec sleep 60')
    run = start(tmp_path, "local.sh", "2")
    errors = run.communicate(timeout=30)[1]
    assert run.returncode == 7
    assert errors.startswith("error: process 1 of 2 ended with code 7: ending the others")
    assert len(errors.splitlines()) == 1


def test_local_shares_the_gpus_out(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "python", f'echo "$CUDA_VISIBLE_DEVICES" >>"{tmp_path}/gpus.txt"')
    stand_in(tmp_path, "nvidia-smi", "seq 0 3")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = {
        k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS")
    }
    env |= {"PATH": path, "PYTHON": str(tmp_path / "python")}
    command = ["bash", str(LAUNCH / "local.sh")]
    subprocess.run([*command, "2"], env=env, check=True)
    assert sorted((tmp_path / "gpus.txt").read_text().splitlines()) == ["0,1", "2,3"]
    uneven = subprocess.run([*command, "3"], env=env, capture_output=True, text=True, check=False)
    assert uneven.returncode == 2
    assert "4 GPUs cannot be shared out evenly among 3 processes" in uneven.stderr


@pytest.mark.parametrize("script", ["local.sh", "tpu.sh"])
def test_a_wrong_call_says_how_it_is_called(tmp_path: pathlib.Path, script: str) -> None:
    run = start(tmp_path, script, "--workdir=run")
    assert f"usage: launch/{script} " in run.communicate()[1]
    assert run.returncode == 2


def test_tpu_starts_all_workers_and_again_while_they_are_preempted(tmp_path: pathlib.Path) -> None:
    again = f'[ "$(grep -c gcloud "{tmp_path}/calls.txt")" = 1 ] && exit 75 || exit 0'
    stand_in(tmp_path, "gcloud", again)
    run = start(tmp_path, "tpu.sh", "pod", "us-east5-a", "--workdir=/mnt/a b", PAUSE="0")
    run.communicate()
    assert run.returncode == 0
    first, second = calls(tmp_path)
    assert first == second
    assert first == (
        "gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all --command="
        r"cd deepsc_jax && exec .venv/bin/python -m deepsc_jax.train --workdir=/mnt/a\ b"
    )


@pytest.mark.parametrize(
    ("code", "starts"), [(0, 1), (1, 1), (2, 1), (255, 1), (130, 1), (75, 6), (70, 4), (137, 4)]
)
def test_tpu_restarts_are_few_and_pause_longer_each_time(
    tmp_path: pathlib.Path, code: int, starts: int
) -> None:
    stand_in(tmp_path, "gcloud", f"exit {code}")
    stand_in(tmp_path, "sleep", "")
    run = start(tmp_path, "tpu.sh", "pod", "zone", "--workdir=w", RESTARTS="5", PAUSE="150")
    _, errors = run.communicate(timeout=30)
    assert run.returncode == code
    pauses = [call for call in calls(tmp_path) if call.startswith("sleep")]
    assert len(calls(tmp_path)) - len(pauses) == starts
    assert pauses == ["sleep 150", "sleep 300", "sleep 450", "sleep 600", "sleep 600"][: starts - 1]
    assert (f"after {starts - 1} restarts: not started again" in errors) == (starts > 1)


@pytest.mark.parametrize(
    "name", ["a b.nii.gz", "`touch ran`.nii", "$(touch ran).nii", '";touch ran;".nii', "$x'y.nii"]
)
def test_make_demo_takes_any_name_as_a_name(tmp_path: pathlib.Path, name: str) -> None:
    shutil.copy(LAUNCH.parent / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"{tmp_path}/given"\n')
    python.chmod(0o755)
    (tmp_path / ".venv/.installed").touch()
    command = ["make", "--no-print-directory", "-C", str(tmp_path), "demo"]
    subprocess.run([*command, f"SCAN={name}"], check=True, capture_output=True)
    assert (tmp_path / "given").read_text().splitlines() == [
        "-m",
        "deepsc_jax.demo",
        f"--scan={name}",
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"SCAN": name})
    assert (tmp_path / "given").read_text().splitlines()[-1] == f"--scan={name}"
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "given").read_text().splitlines() == ["-m", "deepsc_jax.demo"]
    assert not (tmp_path / "ran").exists()
