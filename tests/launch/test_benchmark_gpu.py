"""The script of the GPU table: its order, its budget, what it names, and a row for real."""

import json
import pathlib
import subprocess
import sys

import pytest
from stand_ins import LAUNCH, calls, stand_in, start

ROWS = (
    *("unet3d_compiled", "joint_compiled", "inference_eager", "segmentation", "unet3d_dynunet"),
    *("forms", "joint_checkpointed", "unet3d_max_autotune", "joint_max_autotune"),
)


def run(folder: pathlib.Path, *arguments: str, body: str = "") -> tuple[int, str, str]:
    stand_in(folder, "python", body)
    started = start(folder, "benchmark_gpu.sh", *arguments)
    out, err = started.communicate(timeout=60)
    return started.returncode, out, err


def names(folder: pathlib.Path) -> list[str]:
    """The rows that were begun, in order."""
    return [pathlib.PurePath(line.rpartition("--json=")[2]).stem for line in calls(folder)]


def test_ours_and_the_best_known_peer_come_first_and_max_autotune_last(tmp_path: pathlib.Path):
    code, out, err = run(tmp_path, "--budget_s=600", f"--out={tmp_path / 'out'}", "--small")
    assert (code, err) == (0, "")
    assert tuple(names(tmp_path)) == ROWS
    first = calls(tmp_path)[0]
    assert "-m deepsc_jax.benchmark --repeats=5 --work=unet3d" in first
    assert "--peer=torch --variants=compiled_channels_last" in first
    assert "plan: left out" in out
    assert "not reached" not in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{name}.log" for name in ROWS
    )


def test_what_the_budget_does_not_reach_is_ended_and_named(tmp_path: pathlib.Path):
    code, out, _ = run(tmp_path, "--budget_s=1", f"--out={tmp_path / 'out'}", body="exec sleep 30")
    assert code == 0
    assert names(tmp_path) == ["unet3d_compiled"]
    said = [line for line in out.splitlines() if line.startswith("not reached: ")]
    assert said[0].startswith("not reached: unet3d_compiled, cut off after ")
    assert said[1:] == [f"not reached: {name}" for name in ROWS[1:7]] + [
        "not reached: unet3d_max_autotune",
        "not reached: joint_max_autotune",
    ]


def test_a_row_that_fails_is_said_and_the_others_go_on(tmp_path: pathlib.Path):
    body = '[[ "$*" == *dynunet* ]] && { echo no memory >&2; exit 1; }; exit 0'
    code, out, err = run(tmp_path, "--budget_s=600", f"--out={tmp_path / 'out'}", body=body)
    assert code == 1
    assert err == "error: unet3d_dynunet ended with 1: no memory\n"
    assert len(names(tmp_path)) == len(ROWS)
    assert "unet3d_dynunet" not in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["--budget_s=0", "--out=x"], ["--budget_s=9"], ["--budget_s=9", "--out=x", "-x"]],
)
def test_bad_flags_are_one_line(arguments: list[str], tmp_path: pathlib.Path):
    code, out, err = run(tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: launch/benchmark_gpu.sh --budget_s=SECONDS --out=FOLDER")
    assert not calls(tmp_path)


@pytest.mark.slow
def test_tiny_rows_for_real(tmp_path: pathlib.Path):
    done = subprocess.run(
        [
            "bash",
            str(LAUNCH / "benchmark_gpu.sh"),
            "--budget_s=240",
            f"--out={tmp_path}",
            "--small",
        ],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "unet3d_compiled.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["train_segmentation", "loop"]
    assert rows[0]["note"].startswith("unverified, benchmark retired")
    assert rows[0]["samples_per_s_per_chip"] > 0
