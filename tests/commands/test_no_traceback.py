"""Whatever a user can do wrong with any command is one line and a code, never a traceback."""

import gzip
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from deepsc_jax.runtime import exit_codes
from deepsc_jax.runtime.lock import NAME, locked

ROOT = pathlib.Path(__file__).parents[2]
TINY = f"--flagfile={ROOT / 'configs/tiny.flags'}"


class Commands:
    """The server, and a folder of files to give to commands."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self._server = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).with_name("commands_server.py"))],
            env=env,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def run(self, command: str, *arguments: str, **environment: str) -> tuple[int, str]:
        """The exit code of a command, and all that it printed."""
        request: dict[str, Any] = {"command": command, "arguments": arguments}
        request["environment"] = environment
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        return answer["code"], answer["said"]


def write_files(folder: pathlib.Path) -> None:
    """What a user might give by mistake."""
    (folder / "empty").mkdir()
    (folder / "file").write_text("no folder")
    (folder / "empty.csv").touch()
    (folder / "bytes.csv").write_bytes(bytes(range(256)))
    (folder / "columns.csv").write_text("name,value\na,1\n")
    whole = "data/scans/phantom-train-0000"  # without one, a second line says so
    (folder / "missing.csv").write_text(
        "case,patient,scan,lesion_mask,lung_mask,label,split\na,p,no.nii.gz,,,covid-19,train\n"
        f"b,q,{whole}.nii.gz,,{whole}-lung.nii.gz,covid-19,train\n"
    )
    (folder / "foreign").mkdir()
    (folder / "foreign" / "metrics.json").write_text("a user's own")
    (folder / "tables").mkdir()
    (folder / "tables" / "predictions.csv.nii").touch()
    (folder / "text.nii").write_text("not a scan")
    (folder / "cut.nii.gz").write_bytes(gzip.compress(bytes(4000))[:20])
    for name, config, run in (("edited", b'{"model": 3}', b"{}"), ("bytes", b"\xff\xfe", b"\0")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(config)
        (folder / name / "run.json").write_bytes(run)
    (folder / "scans").mkdir()
    (folder / "scans" / "text.nii").write_text("not a scan")
    for name in ("foreign.json", "foreign.pth"):
        (folder / name).write_text("a user's own")
    (folder / "link-to-itself").symlink_to("link-to-itself")
    (folder / "itself.flags").write_text("--flagfile=itself.flags")
    for name in ("lock-is-a-link", "lock-is-a-pipe", "no-config"):
        (folder / name).mkdir()
    (folder / "lock-is-a-link" / NAME).symlink_to(folder / "file")
    os.mkfifo(folder / "lock-is-a-pipe" / NAME)
    (folder / "no-config" / "joint" / "4").mkdir(parents=True)
    (folder / "no-config" / "joint" / "4" / "SHA256SUMS").touch()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("commands")
    write_files(folder)
    found = Commands(folder)
    code, said = found.run(
        "prepare", TINY, "--out=data", "--phantoms=2,2,1", "--phantom_size=48", "--workers=1"
    )
    assert code == 0, said
    yield found
    found.close()


TRAIN = ("train", TINY, "--data_dir=data")
# Each with what its line must name.
WRONG: dict[tuple[str, ...], str] = {
    ("prepare",): "--out",
    ("prepare", "--out=o", "--cases=none.csv"): "none.csv",
    ("prepare", "--out=o", "--cases=empty"): "empty",
    ("prepare", "--out=o", "--cases=empty.csv"): "empty.csv",
    ("prepare", "--out=o", "--cases=bytes.csv"): "bytes.csv",
    ("prepare", "--out=o", "--cases=columns.csv"): "columns.csv",
    ("prepare", TINY, "--out=m", "--cases=missing.csv"): "no.nii.gz",
    ("prepare", "--out=o", "--phantoms=a,b,c"): "--phantoms=a,b,c",
    ("prepare", "--out=o", "--phantoms=1"): "--phantoms=1:",
    ("prepare", "--out=o", "--phantoms=-1,0,0"): "--phantoms=-1,0,0",
    ("prepare", "--out=file", "--phantoms=1,0,0"): "--out: file",
    ("prepare", "--out=file/below", "--phantoms=1,0,0"): "--out: file/below",
    ("prepare", "--out=/proc/none", "--phantoms=1,0,0"): "--out: /proc/none",
    ("prepare", "--out=o", "--phantoms=1,0,0", "--tile=8,8"): "tile",
    ("prepare", "--out=o", "--phantoms=1,0,0", "--workers=x"): "workers",
    ("prepare", "--out=o", "--no_such_flag=1"): "no_such_flag",
    ("prepare", "--flagfile=none.flags"): "none.flags",
    ("prepare", "--flagfile=bytes.csv"): "bytes.csv",
    ("prepare", "--out=o", "word"): "'word'",
    ("prepare", "--out=empty", "--verify"): "empty/store",
    ("train",): "--data_dir",
    ("train", TINY, "--data_dir=none", "--workdir=run"): "none/store",
    ("train", TINY, "--data_dir=empty", "--workdir=run"): "empty/store",
    ("train", TINY, "--data_dir=file", "--workdir=run"): "file/store",
    (*TRAIN, "--workdir=file"): "--workdir: file",
    (*TRAIN, "--workdir=file/below"): "--workdir: file/below",
    (*TRAIN, "--workdir=/proc/none"): "--workdir: /proc/none",
    (*TRAIN, "--workdir=edited"): "edited/config.json",
    (*TRAIN, "--workdir=bytes"): "bytes/config.json",
    (*TRAIN, "--workdir=run", "--stage=none"): "--stage=none",
    (*TRAIN, "--workdir=run", "--model=none"): "none",
    (*TRAIN, "--workdir=run", "--tile=16,24,32"): "tile depth 16",
    (*TRAIN, "--workdir=run", "--data_devices=64"): "split over 64 devices",
    (*TRAIN, "--workdir=run", "--deepsc.joint.batch=0"): "batch",
    (*TRAIN, "--workdir=run", "--adam_b1=x"): "adam_b1",
    (*TRAIN, "--workdir=run", "--step_timeout=-1"): "step_timeout",
    (*TRAIN, "--workdir=run", "--coordinator=localhost:1"): "--coordinator",
    ("evaluate",): "--checkpoint",
    ("evaluate", "--checkpoint=none", "--data_dir=data", "--out=e"): "none: no config.json",
    ("evaluate", "--checkpoint=edited", "--data_dir=data", "--out=e"): "edited/config.json",
    ("evaluate", "--checkpoint=bytes", "--data_dir=data", "--out=e"): "bytes/config.json",
    ("evaluate", "--checkpoint=empty", "--data_dir=none", "--out=e"): "empty: no config.json",
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=foreign"): "foreign/metrics.json",
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=file"): "--out: file",
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=gs://bucket/o"): "gs://bucket/o",
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=e", "--against=empty"): (
        "--against=empty: neither"
    ),
    (
        "evaluate",
        "--checkpoint=empty",
        "--data_dir=data",
        "--out=e",
        "--evidence=x",
    ): "--evidence=x",
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=e", "--interval=x"): "interval",
    ("analyze",): "--data_dir",
    ("analyze", "--data_dir=none", "--out=o"): "none/store",
    ("analyze", "--data_dir=data", "--out=file"): "--out: file",
    ("analyze", "--data_dir=data", "--out=o", "--periphery=x"): "periphery",
    ("predict", "--checkpoint=empty", "--scans=tables", "--out=o"): "predictions.csv",
    ("predict",): "--checkpoint",
    ("predict", "--checkpoint=none", "--scan=text.nii", "--out=o"): "none: no config.json",
    ("predict", "--checkpoint=edited", "--scan=text.nii", "--out=o"): "edited/config.json",
    ("predict", "--checkpoint=bytes", "--scans=empty", "--out=o"): "empty",
    ("predict", "--checkpoint=bytes", "--scans=scans", "--out=o"): "bytes/config.json",
    ("predict", "--checkpoint=bytes", "--scan=a.nii", "--scans=empty", "--out=o"): "--scan",
    ("predict", "--checkpoint=bytes", "--scan=text.nii", "--out=file"): "--out: file",
    ("predict", "--checkpoint=bytes", "--scans=none", "--out=o"): "none",
    ("predict", "--checkpoint=bytes", "--scans=scans", "--out=o", "--share=3/2"): "--share=3/2",
    ("plan", TINY, "--platform=none"): "--platform=none",
    ("plan", TINY, "--devices=-1"): "--devices=-1",
    ("plan", TINY, "--stage=none"): "--stage=none",
    ("plan", "--flagfile=none.flags"): "none.flags",
    ("benchmark", TINY, "--work=none"): "--work=none",
    ("benchmark", TINY, "--peer=none"): "--peer=none",
    ("benchmark", TINY, "--repeats=0"): "repeats",
    ("demo", "--scan=text.nii", "--out=o"): "text.nii",
    ("demo", "--scan=none.nii", "--out=o"): "none.nii",
    ("demo", "--scan=cut.nii.gz", "--out=o"): "cut.nii.gz",
    ("gain", TINY, "--data_dir=none", "--out=o"): "none/store",
    ("gain", TINY, "--data_dir=data", "--out=o", "--seeds=x"): "seeds",
    ("parity", "--json=file/below.json"): "--json: file",
    (*TRAIN, "--workdir=gs://bucket/run"): "--workdir=gs://bucket/run",
    (*TRAIN, "--workdir="): "--workdir: is empty",
    (*TRAIN, "--workdir=link-to-itself/below"): "link-to-itself/below",
    ("train", TINY, "--data_dir=gs://bucket/data", "--workdir=run"): "--data_dir=gs://bucket/data",
    (*TRAIN, "--workdir=run", "--step_timeout=nan"): "step_timeout",
    (*TRAIN, "--workdir=run", "--step_timeout=inf"): "step_timeout",
    (*TRAIN, "--workdir=run", "--cache_mib=99999999999999999999"): "cache_mib",
    (*TRAIN, "--workdir=run", "--seed=99999999999999999999"): "seed",
    (*TRAIN, "--workdir=run", "--data_devices=2000000000"): "--data_devices=2000000000",
    (*TRAIN, "--workdir=run", "--space=2000000000"): "space = 2000000000",
    (*TRAIN, "--workdir=run", "--flagfile=itself.flags"): "itself.flags",
    (*TRAIN, "--workdir=run", "--model=unet3d"): "unet3d",
    (*TRAIN, "--workdir=lock-is-a-link"): "lock-is-a-link",
    (*TRAIN, "--workdir=lock-is-a-pipe"): "lock-is-a-pipe",
    (*TRAIN, "--workdir=no-config"): "no-config",
    (
        *TRAIN,
        "--workdir=run",
        "--coordinator=localhost:70000",
        "--num_processes=2",
        "--process_id=0",
    ): "70000",
    ("plan", TINY, "--json=file/below.json"): "--json: file",
    ("plan", TINY, "--json=empty"): "--json: empty",
    ("gain", TINY, "--data_dir=data", "--out=file"): "--out: file",
    ("gain", TINY, "--data_dir=data", "--out=gs://bucket/gain"): "--out=gs://bucket/gain",
    ("demo", "--out=gs://bucket/demo"): "--out=gs://bucket/demo",
    ("demo", "--out=file"): "--out: file",
    ("parity", "--json=empty"): "--json: empty",
    ("benchmark", TINY, "--json=empty"): "--json: empty",
    ("plan", TINY, "--json=foreign.json"): "foreign.json: was not written here",
    ("benchmark", TINY, "--json=foreign.json"): "foreign.json: was not written here",
    ("interop.torch", "--from=text.nii", "--to=gs://bucket/w.pth"): "--to=gs://bucket/w.pth",
    ("interop.torch", "--from=none.pth", "--to=foreign.pth"): "foreign.pth: was not written here",
    ("interop.torch", "--from=none.pth", "--to=w.pth"): "none.pth: cannot be read",
    ("interop.torch", "--from=empty", "--to=w.pth"): "empty: no config.json",
    ("interop.monai", TINY, "--data_dir=data", "--out=m", "--channels=a"): "--channels=a",
    ("interop.monai", "--model=resnet3d", "--data_dir=data", "--out=m"): "--model=resnet3d",
    ("interop.monai", TINY, "--data_dir=none", "--out=m"): "none/store",
    ("interop.monai", TINY, "--data_dir=data", "--out=gs://bucket/m"): "--out=gs://bucket/m",
}
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
ENVIRONMENTS: list[dict[str, str]] = [
    {"SLURM_STEP_NUM_TASKS": "x"},
    {"PMI_SIZE": "-1"},
    {"OMPI_COMM_WORLD_SIZE": "2.5"},
    STEP | {"SLURM_NTASKS": "x"},
    STEP | {"SLURM_JOB_ID": "12abc"},
    STEP | {"SLURM_PROCID": "2"},
    STEP | {"SLURM_LOCALID": "x"},
    STEP | {"JAX_COORDINATOR_PORT": "70000"},
]


# Every fifth; all of them take minutes.
CALLS = [
    call if i % 5 == 0 else pytest.param(call, marks=pytest.mark.slow)
    for i, call in enumerate(WRONG)
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call)[-70:])
def test_what_is_wrong_is_one_line(commands: Commands, call: tuple[str, ...]) -> None:
    for package in ("torch", "monai"):
        if call[0] == f"interop.{package}":
            pytest.importorskip(package)
    code, said = commands.run(*call)
    assert "Traceback" not in said
    assert code in (exit_codes.BAD_INPUT, exit_codes.BAD_FLAG), said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert WRONG[call] in errors[0]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_what_a_launcher_cannot_mean_is_one_line(
    commands: Commands, environment: dict[str, str]
) -> None:
    code, said = commands.run(*TRAIN, "--workdir=run", **environment)
    assert code == exit_codes.BAD_INPUT, said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_a_home_folder_is_found_where_no_shell_saw_it(commands: Commands) -> None:
    home = {"HOME": str(commands.folder / "home")}
    code, said = commands.run(*TRAIN, "--workdir=~/run", "--data_devices=64", **home)
    assert code == exit_codes.BAD_INPUT, said
    assert (commands.folder / "home" / "run" / "config.json").exists()
    assert not (commands.folder / "~").exists()


def test_a_folder_in_use_names_who_uses_it(commands: Commands) -> None:
    with locked(commands.folder / "held", "training"):
        code, said = commands.run(*TRAIN, "--workdir=held")
    assert code == exit_codes.BAD_INPUT
    assert said.startswith(f"error: held: training, process {os.getpid()} on ")
    assert len(said.splitlines()) == 1


def test_a_port_in_use_is_one_line(commands: Commands) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = (f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0")
        code, said = commands.run(*TRAIN, "--workdir=run", *job)
    assert code == exit_codes.BAD_INPUT
    assert f"port {port} cannot be listened at" in said
    assert len(said.splitlines()) == 1


def test_a_platform_that_is_not_there_is_one_line(commands: Commands) -> None:
    """In a process of its own: the server's has found its devices."""
    done = subprocess.run(
        [sys.executable, "-m", "deepsc_jax.train", *TRAIN[1:], "--workdir=run"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "abacus"},
        cwd=commands.folder,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == exit_codes.BAD_INPUT
    assert done.stderr.startswith("error: JAX_PLATFORMS=abacus: no such device was found")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_variable_that_jax_does_not_take_is_one_line(commands: Commands, command: str) -> None:
    """`plan` imports JAX before it reads its flags, `train` after."""
    arguments = [*TRAIN[1:], "--workdir=run"] if command == "train" else ["--model=deepsc"]
    done = subprocess.run(
        [sys.executable, "-m", f"deepsc_jax.{command}", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_X64": "maybe"},
        cwd=commands.folder,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == exit_codes.BAD_INPUT
    assert done.stderr.startswith("error: invalid truth value 'maybe'")
    assert "JAX_ENABLE_X64" in done.stderr
    assert len(done.stderr.splitlines()) == 1
