"""The program, on a run as training leaves it: stopped, and gone on with by an array of tasks."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import smallest
from parity_network import draw

from deepsc_jax.benchmarking import cold_start
from deepsc_jax.config import Config, DataConfig
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = Config(
    data=DataConfig(
        working_spacing_mm=(12, 12, 12),
        working_size=(16, 24),
        tile=(8, 16, 24),
        slices=8,
        depth_bucket=8,
    ),
    model=smallest.MODEL,
)
SCANS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`run`: one stage, the fastest to compile, of parameters that are drawn; `in`: six scans."""
    folder = tmp_path_factory.mktemp("predict")
    workdirs.write(folder / "run", workdirs.Record(CONFIG, "phantoms", "", {"segmentation": 0.4}))
    system = build(CONFIG, "cpu")
    variables = {"params": jax.tree.map(jnp.asarray, draw(CONFIG))}
    checkpoints = Checkpoints(folder / "run" / "segmentation", writer=True)
    state = states.create(system, system.stage("segmentation"), variables)
    checkpoints.save(state, {"next_index": 0})
    checkpoints.close()
    cases = write_phantoms((0, 0, 2), folder, seed=0, size=48, workers=1)
    for i in range(SCANS):
        (folder / "in" / f"p{i}").mkdir(parents=True)
        (folder / "in" / f"p{i}" / "scan.nii.gz").symlink_to(cases[i % 2].scan)
    return folder


def environment(folder: pathlib.Path, **more: str) -> dict[str, str]:
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return os.environ | compiled | {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable} | more


def options(folder: pathlib.Path) -> list[str]:
    names = {"checkpoint": "run", "scans": "in", "out": "out"}
    return [f"--{flag}={folder / name}" for flag, name in names.items()]


def results(folder: pathlib.Path) -> dict[str, int]:
    """When each result was written, by its scan's folder."""
    found = (folder / "out").glob("*/scan/result.json")
    return {path.parent.parent.name: path.stat().st_mtime_ns for path in found}


@pytest.mark.slow
def test_stopped_and_gone_on_with_by_an_array_of_tasks(folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "deepsc_jax.predict", *options(folder), "--workers=2"]
    stopped = subprocess.Popen(
        command, cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    assert stopped.stdout is not None
    assert stopped.stdout.readline().startswith(f"1/{SCANS}  p")
    stopped.send_signal(signal.SIGTERM)
    said = stopped.stdout.read()
    assert stopped.wait() == 75, said
    first = results(folder)
    assert 0 < len(first) < SCANS
    assert f"SIGTERM: {SCANS - len(first)} scans left" in said

    programs = folder / "bin"
    programs.mkdir()
    (programs / "srun").write_text('#!/usr/bin/env bash\nshift\nexec "$@"\n')
    (programs / "srun").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    made = 0
    for task in ("3", "5"):
        slurm = {"ARRAY_TASK_ID": task, "ARRAY_TASK_MIN": "3", "ARRAY_TASK_STEP": "2"}
        slurm |= {"ARRAY_TASK_COUNT": "2", "ARRAY_JOB_ID": "17", "JOB_ID": "18"}
        env = environment(folder, PATH=path, **{f"SLURM_{k}": v for k, v in slurm.items()})
        script = ["bash", "launch/predict.sbatch", *options(folder)]
        done = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if "scans predicted" in line]
        made += int(line.split(" of ")[0])
    assert made == SCANS - len(first)
    last = results(folder)
    assert sorted(last) == [f"p{i}" for i in range(SCANS)]
    assert {name: last[name] for name in first} == first
    rows = []
    for share in (0, 1):
        with (folder / "out" / f"predictions-{share}-of-2.csv").open() as file:
            rows.append([row["name"] for row in csv.DictReader(file)])
    assert rows == [[f"p{i}/scan" for i in range(share, SCANS, 2)] for share in (0, 1)]
    done = subprocess.run(
        [*command, "--workers=0"], cwd=ROOT, env=environment(folder), capture_output=True, text=True
    )
    assert done.stdout.startswith(f"0 of {SCANS} scans predicted, {SCANS} already there"), done
    with (folder / "out" / "predictions.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [f"p{i}/scan" for i in range(SCANS)]
    for i in range(SCANS):
        result = json.loads((folder / "out" / f"p{i}" / "scan" / "result.json").read_text())
        twin = json.loads((folder / "out" / f"p{i % 2}" / "scan" / "result.json").read_text())
        assert result["lesion_ml"] == twin["lesion_ml"] > 0
        assert result["lesion_threshold"] == 0.4


def test_where_results_are_is_told_and_a_wrong_path_once_before_the_network(
    folder: pathlib.Path,
) -> None:
    command = [sys.executable, "-m", "deepsc_jax.predict", f"--checkpoint={folder / 'run'}"]
    command += [f"--out={folder / 'one'}"]
    scan = folder / "in" / "p0" / "scan.nii.gz"
    done = subprocess.run(
        [*command, f"--scan={scan}"],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    place, _, files = done.stdout.splitlines()[-1].removeprefix("results: ").partition(": ")
    written = {path.name for path in pathlib.Path(place).iterdir()}
    assert set(files.split(", ")) == written >= {"result.json", "picture.png"}
    command[3] = f"--checkpoint={folder / 'no-run'}"  # a network would be missed first
    done = subprocess.run(
        [*command, f"--scan={scan}.typo"],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"error: --scan={scan}.typo: No such file or directory: check the path"
    ]


@pytest.mark.slow
def test_a_first_prediction_in_phases_and_from_kept_programs(folder: pathlib.Path) -> None:
    found = cold_start.measure(str(folder / "in" / "p0" / "scan.nii.gz"), str(folder / "run"))
    assert found.keys() == {"cold", "warm"}
    for seconds in found.values():
        assert seconds.keys() == cold_start.PHASES.keys()
        assert min(seconds.values()) > 0
        parts = [seconds[k] for k in seconds if k not in ("total", "second_call")]
        assert sum(parts) == pytest.approx(seconds["total"])
    assert found["warm"]["first_call"] < found["cold"]["first_call"]
    assert found["cold"]["second_call"] < found["cold"]["first_call"] / 2
    with pytest.raises(InputError, match=r"--first_prediction: .*none\.nii: no such file"):
        cold_start.measure(str(folder / "none.nii"), str(folder / "run"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scan=a.nii"], "--scan and --scans: give one of them"),
        (["--lung_mask=a.nii"], "--lung_mask: goes with --scan"),
        (["--share=2/2"], "--share=2/2: expected I/N"),
    ],
)
def test_flags_that_do_not_go_together_are_told_in_a_line(
    folder: pathlib.Path, more: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "deepsc_jax.predict", *options(folder), *more]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_where_results_cannot_go_is_told_before_any_work(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "predictions.csv").write_text("a user's own")
    messages = {
        str(tmp_path / "file"): "cannot be written to (there is a file): name another folder",
        "gs://bucket/out": "is an address, expected a path on this machine",
        str(tmp_path / "foreign"): "predictions.csv: was not written here",
    }
    for out, message in messages.items():
        asked = [*options(folder), f"--out={out}", f"--checkpoint={tmp_path / 'absent'}"]
        done = subprocess.run(
            [sys.executable, "-m", "deepsc_jax.predict", *asked],
            cwd=ROOT,
            env=environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "foreign" / "predictions.csv").read_text() == "a user's own"


def test_any_name_is_printed_whatever_the_terminal_takes(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "in").mkdir()
    scan = (folder / "in" / "p0" / "scan.nii.gz").resolve()
    names = ("größe.nii.gz".encode("latin-1"), "病人.nii.gz".encode(), b"\x1b[2J\n.nii.gz")
    for name in names:
        (tmp_path / "in" / os.fsdecode(name)).symlink_to(scan)
    os.mkfifo(tmp_path / "in" / "x.nii")
    asked = [*options(folder), "--scans=~/in", "--out=~/out", "--workers=2"]
    env = environment(folder, HOME=str(tmp_path), PYTHONIOENCODING="ascii")
    done = subprocess.run(
        [sys.executable, "-m", "deepsc_jax.predict", *asked],
        cwd=ROOT,
        env=env,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, notes = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    # How many, how well it ran, and where the files are.
    assert len(said.splitlines()) == len(names) + 4
    for name in (r"gr\xf6\xdfe: ", r"\u75c5\u4eba: ", r"\x1b[2J\n: "):
        assert name in said
    assert f"{len(names)} of {len(names)} scans predicted, 1 left out in" in said
    first, second = notes.splitlines()
    assert first == f"note: {tmp_path}/in: 1 left out, not regular files: x.nii"
    assert second.startswith(f"note: {tmp_path}/in/")
    assert second.endswith(", and 1 more, have the same content")
    assert len(list((tmp_path / "out").glob("*/result.json"))) == len(names)


def test_convolutions_by_onednn_are_to_be_asked_for(folder: pathlib.Path) -> None:
    asked = [*options(folder), f"--out={folder / 'by_onednn'}", "--conv_form=direct"]
    done = subprocess.run(
        [sys.executable, "-m", "deepsc_jax.predict", *asked],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if compiler.has_onednn():
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("error: --conv_form=direct: JAX")
        assert len(done.stderr.splitlines()) == 1
