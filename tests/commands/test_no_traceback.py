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
from deepsc_jax.runtime.lock import locked

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
    (folder / "missing.csv").write_text(
        "case_id,patient_id,scan,lesion_mask,lung_mask,label,split\na,p,no.nii.gz,,,covid-19,train\n"
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
WRONG = [
    ("prepare",),
    ("prepare", "--out=o", "--cases=none.csv"),
    ("prepare", "--out=o", "--cases=empty"),
    ("prepare", "--out=o", "--cases=empty.csv"),
    ("prepare", "--out=o", "--cases=bytes.csv"),
    ("prepare", "--out=o", "--cases=columns.csv"),
    ("prepare", "--out=o", "--cases=missing.csv"),
    ("prepare", "--out=o", "--phantoms=a,b,c"),
    ("prepare", "--out=o", "--phantoms=1"),
    ("prepare", "--out=o", "--phantoms=-1,0,0"),
    ("prepare", "--out=file", "--phantoms=1,0,0"),
    ("prepare", "--out=file/below", "--phantoms=1,0,0"),
    ("prepare", "--out=/proc/none", "--phantoms=1,0,0"),
    ("prepare", "--out=o", "--phantoms=1,0,0", "--tile=8,8"),
    ("prepare", "--out=o", "--phantoms=1,0,0", "--workers=x"),
    ("prepare", "--out=o", "--no_such_flag=1"),
    ("prepare", "--flagfile=none.flags"),
    ("prepare", "--flagfile=bytes.csv"),
    ("prepare", "--out=o", "word"),
    ("prepare", "--out=empty", "--verify"),
    ("train",),
    ("train", TINY, "--data_dir=none", "--workdir=run"),
    ("train", TINY, "--data_dir=empty", "--workdir=run"),
    ("train", TINY, "--data_dir=file", "--workdir=run"),
    (*TRAIN, "--workdir=file"),
    (*TRAIN, "--workdir=file/below"),
    (*TRAIN, "--workdir=/proc/none"),
    (*TRAIN, "--workdir=edited"),
    (*TRAIN, "--workdir=bytes"),
    (*TRAIN, "--workdir=run", "--stage=none"),
    (*TRAIN, "--workdir=run", "--model=none"),
    (*TRAIN, "--workdir=run", "--tile=16,24,32"),
    (*TRAIN, "--workdir=run", "--data_devices=64"),
    (*TRAIN, "--workdir=run", "--deepsc.joint.batch=0"),
    (*TRAIN, "--workdir=run", "--adam_b1=x"),
    (*TRAIN, "--workdir=run", "--step_timeout=-1"),
    (*TRAIN, "--workdir=run", "--coordinator=localhost:1"),
    ("evaluate",),
    ("evaluate", "--checkpoint=none", "--data_dir=data"),
    ("evaluate", "--checkpoint=edited", "--data_dir=data"),
    ("evaluate", "--checkpoint=bytes", "--data_dir=data"),
    ("evaluate", "--checkpoint=empty", "--data_dir=none"),
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=foreign"),
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=file"),
    ("evaluate", "--checkpoint=empty", "--data_dir=data", "--out=gs://bucket/o"),
    ("predict", "--checkpoint=empty", "--scans=tables", "--out=o"),
    ("predict",),
    ("predict", "--checkpoint=none", "--scan=text.nii", "--out=o"),
    ("predict", "--checkpoint=edited", "--scan=text.nii", "--out=o"),
    ("predict", "--checkpoint=bytes", "--scans=empty", "--out=o"),
    ("predict", "--checkpoint=bytes", "--scan=a.nii", "--scans=empty", "--out=o"),
    ("predict", "--checkpoint=bytes", "--scan=text.nii", "--out=file"),
    ("predict", "--checkpoint=bytes", "--scans=none", "--out=o"),
    ("predict", "--checkpoint=bytes", "--scans=empty", "--out=o", "--share=3/2"),
    ("plan", TINY, "--platform=none"),
    ("plan", TINY, "--devices=-1"),
    ("plan", TINY, "--stage=none"),
    ("plan", "--flagfile=none.flags"),
    ("benchmark", TINY, "--work=none"),
    ("benchmark", TINY, "--peer=none"),
    ("benchmark", TINY, "--repeats=0"),
    ("demo", "--scan=text.nii", "--out=o"),
    ("demo", "--scan=none.nii", "--out=o"),
    ("demo", "--scan=cut.nii.gz", "--out=o"),
    ("gain", TINY, "--data_dir=none", "--out=o"),
    ("gain", TINY, "--data_dir=data", "--out=o", "--seeds=x"),
    ("parity", "--json=file/below.json"),
]


# Every fifth; all of them take minutes.
CALLS = [
    call if i % 5 == 0 else pytest.param(call, marks=pytest.mark.slow)
    for i, call in enumerate(WRONG)
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call)[-70:])
def test_what_is_wrong_is_one_line(commands: Commands, call: tuple[str, ...]) -> None:
    code, said = commands.run(*call)
    assert "Traceback" not in said
    assert code in (exit_codes.BAD_INPUT, exit_codes.BAD_FLAG), said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said


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
