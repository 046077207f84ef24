"""The scripts of launch/, with stand-ins for the programs of a cluster."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from typing import Any

import kubernetes_validate
import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


def test_every_script_passes_shellcheck() -> None:
    assert SCRIPTS == ["local.sh", "predict.sbatch", "slurm.sbatch", "tpu.sh"]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    found = shutil.which("shellcheck", path=path)
    assert found, "shellcheck is missing: pip install -e '.[test]'"
    command = [found, *(str(LAUNCH / name) for name in SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def stand_in(folder: pathlib.Path, name: str, body: str) -> None:
    """A program of that name, which notes its arguments in calls.txt."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"{folder}/calls.txt"\n{body}\n')
    path.chmod(0o755)


def start(folder: pathlib.Path, script: str, *arguments: str, **more: str) -> subprocess.Popen:
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHON": str(folder / "python"), "SLURM_JOB_ID": "17"} | more
    env |= {"JAX_PLATFORMS": "cpu", "PORT": "1234"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.Popen(
        ["bash", str(LAUNCH / script), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def calls(folder: pathlib.Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def terminate_when_called(run: subprocess.Popen, folder: pathlib.Path, count: int = 1) -> None:
    while len(calls(folder)) < count:
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # for the stand-in to set its trap
    run.send_signal(signal.SIGTERM)


SAVES = "trap 'sleep 0.2; exit 75' TERM\nfor _ in $(seq 600); do sleep 0.1; done"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm_requeues_what_wants_to_go_on(
    tmp_path: pathlib.Path, code: int, requeued: bool
) -> None:
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", "")
    run = start(tmp_path, "slurm.sbatch", "--workdir=a b", SLURM_CPUS_PER_TASK="8")
    run.communicate()
    assert run.returncode == code
    train = f"{tmp_path}/python -m deepsc_jax.train --workdir=a b"
    train = f"srun --cpus-per-task=8 --kill-on-bad-exit=1 {train}"
    assert calls(tmp_path) == [train, *(["scontrol requeue 17"] if requeued else [])]


def test_slurm_passes_sigterm_on_and_waits_for_the_save(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", SAVES)
    stand_in(tmp_path, "scontrol", "")
    run = start(tmp_path, "slurm.sbatch")
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == ["scontrol requeue 17"]


def task(index: int, count: int, first: int = 0, step: int = 1) -> dict[str, str]:
    """What SLURM tells a task of an array; job 17 is also the whole array's number."""
    facts = {"ID": index, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in facts.items()} | {
        "SLURM_ARRAY_JOB_ID": "17",
        "SLURM_CPUS_PER_TASK": "8",
    }


@pytest.mark.parametrize(
    ("facts", "share"),
    [
        (task(0, 4), "0/4"),
        (task(3, 4), "3/4"),
        (task(64, 64, first=1), "63/64"),
        (task(9, 3, first=5, step=2), "2/3"),
        ({}, "0/1"),
    ],
)
def test_a_task_of_an_array_predicts_its_share(
    tmp_path: pathlib.Path, facts: dict[str, str], share: str
) -> None:
    stand_in(tmp_path, "srun", "exit 1")
    stand_in(tmp_path, "scontrol", "")
    run = start(tmp_path, "predict.sbatch", "--scans=a b", **facts)
    run.communicate()
    assert run.returncode == 1
    (call,) = calls(tmp_path)
    assert call.endswith(f"{tmp_path}/python -m deepsc_jax.predict --scans=a b --share={share}")


def test_an_array_with_gaps_is_refused(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "")
    run = start(tmp_path, "predict.sbatch", **task(7, 2, first=3))
    assert "task 7 of an array of 2 has no share of its own" in run.communicate()[1]
    assert (run.returncode, calls(tmp_path)) == (2, [])


def test_a_preempted_task_is_queued_again_without_the_rest_of_its_array(
    tmp_path: pathlib.Path,
) -> None:
    stand_in(tmp_path, "srun", SAVES)
    stand_in(tmp_path, "scontrol", "")
    run = start(tmp_path, "predict.sbatch", **task(3, 4))
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == ["scontrol requeue 17_3"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_slurm_asks_for_the_signal_early_and_to_be_requeued(script: str) -> None:
    asked = re.findall(r"^#SBATCH (--\S+)$", (LAUNCH / script).read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} <= set(asked)


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
    run = start(tmp_path, "tpu.sh", "pod", "us-east5-a", "--workdir=/mnt/a b")
    run.communicate()
    assert run.returncode == 0
    first, second = calls(tmp_path)
    assert first == second
    assert first == (
        "gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all --command="
        r"cd deepsc_jax && exec .venv/bin/python -m deepsc_jax.train --workdir=/mnt/a\ b"
    )


def test_the_jobset_is_valid() -> None:
    jobset: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    spec, policy = jobset["spec"], jobset["spec"]["failurePolicy"]
    # https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(spec) <= {"network", "failurePolicy", "successPolicy", "replicatedJobs", "suspend"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"}
    assert set(policy) <= {"maxRestarts", "restartStrategy", "rules"}
    for rule in policy["rules"]:
        assert {"name", "action"} <= set(rule) <= {"name", "action", "onJobFailureReasons"}
    for replicated in spec["replicatedJobs"]:
        assert {"name", "template"} <= set(replicated) <= {"name", "template", "replicas"}
        job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
        kubernetes_validate.validate(job, "1.31", strict=True)  # no field that it does not know
        misspelt = {**job, "spec": {**job["spec"], "paralelism": 8}}
        with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
            kubernetes_validate.validate(misspelt, "1.31", strict=True)


def test_the_jobset_is_one_job_of_processes_that_find_each_other() -> None:
    jobset: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert spec["network"]["enableDNSHostnames"] is True
    (replicated,) = spec["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"])
    host, port = flags["coordinator"].split(":")
    name = jobset["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"  # JobSet's name of its first pod
    assert [p["containerPort"] for p in container["ports"]] == [int(port)]
    assert flags["num_processes"] == str(job["parallelism"])
    assert flags["process_id"] == "$(JOB_COMPLETION_INDEX)"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_starts_all_again_after_a_preemption() -> None:
    spec = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0  # one lost pod fails the job: JobSet starts all of them again
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy demands
    assert pod["terminationGracePeriodSeconds"] == 120
    exits, disrupted = job["podFailurePolicy"]["rules"]
    assert exits["onExitCodes"] == {
        "containerName": pod["containers"][0]["name"],
        "operator": "In",
        "values": [75],
    }
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert exits["action"] == disrupted["action"] == "FailJob"
    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_the_scripts_know_the_exit_code_of_a_preemption() -> None:
    code = "from deepsc_jax import program; print(program.PREEMPTED)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=LAUNCH.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "75"
