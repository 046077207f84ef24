"""Stand-ins for the programs of a cluster, and how a script of launch/ is started among them."""

import os
import pathlib
import signal
import subprocess
import time

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


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
