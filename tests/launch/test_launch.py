"""The scripts of launch/, with stand-ins for the programs of a cluster."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sysconfig
import time
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deepsc_jax.runtime import exit_codes

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


def terminate_when_called(
    run: subprocess.Popen,
    folder: pathlib.Path,
    count: int = 1,
    number: signal.Signals = signal.SIGTERM,
) -> None:
    while len(calls(folder)) < count:
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # for the stand-in to set its trap
    run.send_signal(number)


SAVES = "trap 'sleep 0.2; exit 75' TERM\nfor _ in $(seq 600); do sleep 0.1; done"
SHOW = "scontrol show job --oneliner"


def scontrol(folder: pathlib.Path, state: str = "RUNNING") -> None:
    """SLURM's controller, for which the job is in that state."""
    shown = f"JobId=17 JobState={state} Reason=None"
    stand_in(folder, "scontrol", f'[ "$1" = show ] && echo "{shown}" || true')


CRASHES = (69, 70, 124, 134, 137, 139)
AT_MOST = [(code, restarts, restarts < 3) for code in CRASHES for restarts in (2, 3)]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (130, 0, False), (75, 99, True), *AT_MOST],
)
def test_slurm_requeues_what_wants_to_go_on_and_crashes_three_times(
    tmp_path: pathlib.Path, script: str, code: int, restarts: int, requeued: bool
) -> None:
    stand_in(tmp_path, "srun", f"exit {code}")
    scontrol(tmp_path)
    run = start(tmp_path, script, SLURM_RESTART_COUNT=str(restarts))
    said, errors = run.communicate(timeout=30)
    assert run.returncode == code
    assert calls(tmp_path)[1:] == ([f"{SHOW} 17", "scontrol requeue 17"] if requeued else [])
    assert ("queued again, to go on" in said) == requeued
    gave_up = f"error: ended with code {code} after {restarts} restarts: not queued again\n"
    assert errors == (gave_up if code > 2 and code != 130 and not requeued else "")


def test_slurm_runs_training_with_its_flags_and_cores(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "")
    start(tmp_path, "slurm.sbatch", "--workdir=a b", SLURM_CPUS_PER_TASK="8").communicate()
    train = f"{tmp_path}/python -m deepsc_jax.train --workdir=a b"
    options = "--cpus-per-task=8 --kill-on-bad-exit=0 --wait=60"
    assert calls(tmp_path) == [f"srun {options} {train}"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED", "TIMEOUT"])
@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_what_scancel_or_slurm_itself_ends_is_left_to_slurm(
    tmp_path: pathlib.Path, script: str, state: str
) -> None:
    stand_in(tmp_path, "srun", SAVES)
    scontrol(tmp_path, state)
    run = start(tmp_path, script)
    terminate_when_called(run, tmp_path)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == [f"{SHOW} 17"]
    assert f"while SLURM has the job as {state}: left to SLURM" in said


def test_a_controller_that_answers_late_is_asked_again(tmp_path: pathlib.Path) -> None:
    stand_in(tmp_path, "srun", "exit 75")
    stand_in(tmp_path, "sleep", "")
    busy = f'[ "$(grep -c show "{tmp_path}/calls.txt")" = 1 ] && exit 1'
    stand_in(tmp_path, "scontrol", f"{busy}\n[ $1 = show ] && echo JobState=RUNNING || exit 0")
    run = start(tmp_path, "slurm.sbatch")
    run.communicate(timeout=30)
    assert calls(tmp_path)[1:] == [f"{SHOW} 17", "sleep 5", f"{SHOW} 17", "scontrol requeue 17"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_slurm_passes_sigterm_on_and_waits_for_the_save(
    tmp_path: pathlib.Path, script: str
) -> None:
    stand_in(tmp_path, "srun", SAVES)
    scontrol(tmp_path)
    run = start(tmp_path, script)
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == [f"{SHOW} 17", "scontrol requeue 17"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch"])
def test_a_signal_between_the_trap_and_the_step_is_given_to_the_step(
    tmp_path: pathlib.Path, script: str
) -> None:
    # The script as it is, but for a signal to itself right before srun is started, and one right
    # after, before the script knows its number.
    lines = (LAUNCH / script).read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    after = lines.index("step=$!")
    stand_in(tmp_path, "srun", SAVES)
    scontrol(tmp_path)
    for place in (at, after):
        assert lines[after - 1].endswith("&")
        moved = [*lines[:place], "kill -TERM $$", *lines[place:]]
        (tmp_path / script).write_text("\n".join(moved))
        run = start(tmp_path, str(tmp_path / script))
        run.communicate(timeout=30)
        assert run.returncode in (75, 143)  # 143: it was not yet srun
        assert calls(tmp_path)[-2:] == [f"{SHOW} 17", "scontrol requeue 17"]
        (tmp_path / "calls.txt").unlink()


def test_a_step_that_ends_well_as_the_signal_comes_is_not_queued_again(
    tmp_path: pathlib.Path,
) -> None:
    stand_in(tmp_path, "srun", "trap '' TERM\nsleep 1\nexit 0")
    scontrol(tmp_path)
    run = start(tmp_path, "slurm.sbatch")
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 0
    assert len(calls(tmp_path)) == 1


def test_both_slurm_scripts_hear_signals_and_requeue_alike() -> None:
    def parts(script: str) -> list[str]:
        text = (LAUNCH / script).read_text()
        begin, end = "# SIGTERM is heard", "set -uo pipefail"
        return [text[text.index(begin) : text.index(end)], text[text.index("step=$!") :]]

    assert parts("slurm.sbatch") == parts("predict.sbatch")


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
    scontrol(tmp_path)
    run = start(tmp_path, "predict.sbatch", **task(3, 4))
    terminate_when_called(run, tmp_path)
    run.communicate(timeout=30)
    assert run.returncode == 75
    assert calls(tmp_path)[1:] == [f"{SHOW} 17_3", "scontrol requeue 17_3"]


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


# An image by its digest: https://github.com/opencontainers/distribution-spec
BY_DIGEST = re.compile(r"[a-z0-9][a-z0-9._:/-]*/[a-z0-9._/-]+@sha256:[0-9a-f]{64}")


def validate(jobset: dict[str, Any]) -> None:
    """As the cluster would: every field known, and images by their digest.

    Raises:
      ValidationError: something is not as Kubernetes or JobSet has it.
      ValueError: an image is not named by a digest.
    """
    spec, policy = jobset["spec"], jobset["spec"]["failurePolicy"]
    # https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(spec) <= {"network", "failurePolicy", "successPolicy", "replicatedJobs", "suspend"}
    assert set(spec["network"]) <= {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"}
    assert set(policy) <= {"maxRestarts", "restartStrategy", "rules"}
    on = {"onJobFailureReasons", "onJobFailureMessagePatterns"}
    for rule in policy["rules"]:
        assert {"name", "action"} <= set(rule) <= {"name", "action"} | on
    for replicated in spec["replicatedJobs"]:
        assert {"name", "template"} <= set(replicated) <= {"name", "template", "replicas"}
        job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
        kubernetes_validate.validate(job, "1.31", strict=True)  # no field that it does not know
        for container in job["spec"]["template"]["spec"]["containers"]:
            if not BY_DIGEST.fullmatch(container["image"]):
                raise ValueError(f"{container['image']}: not an image by its digest")


def test_the_jobset_is_valid_once_its_image_is_put_in() -> None:
    text = (LAUNCH / "kubernetes.yaml").read_text()
    with pytest.raises(ValueError, match="PUT-THE-DIGEST-HERE: not an image by its digest"):
        validate(yaml.safe_load(text))
    placeholder = "REGISTRY/deepsc_jax@sha256:PUT-THE-DIGEST-HERE"
    assert text.count(placeholder) == 1
    filled = text.replace(placeholder, f"registry.example/deepsc_jax@sha256:{'0af9' * 16}")
    validate(yaml.safe_load(filled))
    misspelt = filled.replace("parallelism: 8", "paralelism: 8")
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        validate(yaml.safe_load(misspelt))


def test_what_the_jobset_leaves_to_the_cluster_is_valid_too() -> None:
    text = (LAUNCH / "kubernetes.yaml").read_text()
    image = f"registry.example/deepsc_jax@sha256:{'0af9' * 16}"
    text = re.sub(r"image: .*", f"image: {image}", text)
    kept = re.compile(r"# ((hostNetwork|dnsPolicy|rdma/\w+|add|- name|  value)\b.*)")
    lines = text.splitlines()
    uncommented = [kept.sub(r"\1", line) for line in lines]
    assert sum(a != b for a, b in zip(lines, uncommented, strict=True)) >= 14
    validate(yaml.safe_load("\n".join(uncommented)))


def test_pods_keep_what_was_compiled_and_run_with_few_rights() -> None:
    jobset: dict[str, Any] = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {one["name"]: one["value"] for one in container["env"]}
    (shared,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "shared")
    assert env["JAX_COMPILATION_CACHE_DIR"].startswith(f"{shared}/")
    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False


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


def test_the_jobset_starts_again_what_the_table_of_codes_does() -> None:
    spec = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0  # one lost pod fails the job: JobSet starts all of them again
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy demands
    assert pod["terminationGracePeriodSeconds"] == 120
    ended, preempted, disrupted = job["podFailurePolicy"]["rules"]
    for rule in (ended, preempted):
        assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
        assert rule["onExitCodes"]["operator"] == "In"
    codes = {code for name, code in vars(exit_codes).items() if isinstance(code, int)}
    codes -= {exit_codes.DONE, exit_codes.MOST_RESTARTS}
    again = {*exit_codes.REQUEUED_ALWAYS, *exit_codes.REQUEUED_AT_MOST}
    assert set(ended["onExitCodes"]["values"]) == codes - again
    assert set(preempted["onExitCodes"]["values"]) == set(exit_codes.REQUEUED_ALWAYS)
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in (ended, preempted, disrupted)} == {"FailJob"}
    policy = spec["failurePolicy"]
    assert policy["maxRestarts"] == exit_codes.MOST_RESTARTS
    # What Kubernetes says of a job that a rule failed ends so, with the rule's place.
    said = [f"... with exit code 1 matching FailJob rule at index {i}" for i in range(3)]
    found = {
        rule["action"]: [
            i
            for i, message in enumerate(said)
            if any(re.search(p, message) for p in rule["onJobFailureMessagePatterns"])
        ]
        for rule in policy["rules"]
    }
    assert found == {"FailJobSet": [0], "RestartJobSetAndIgnoreMaxRestarts": [1, 2]}


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
