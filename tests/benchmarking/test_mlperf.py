"""`--work=unet3d`: what it stands for, what it says, and a real run of a small one."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from measured import CONFIG, measured

from deepsc_jax.benchmarking import mlperf, report
from deepsc_jax.benchmarking.measure import Times
from deepsc_jax.runtime.errors import InputError

REPOSITORY = pathlib.Path(__file__).parents[2]
SMALL = (
    *("--work=unet3d", "--tile=16,16,16", "--working_size=16,16", "--depth_bucket=16"),
    *("--working_spacing_mm=20,20,20", "--unet3d.widths=4,8,8", "--unet3d.segmentation.batch=2"),
)


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deepsc_jax.benchmark", *SMALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


def test_flags_that_are_given_come_after_what_the_work_stands_for():
    argv = ["benchmark", "--tile=64,64,64", "--work=unet3d"]
    assert mlperf.expanded(argv) == ["benchmark", *mlperf.FLAGS, *argv[1:]]
    for other in (
        ["benchmark"],
        ["benchmark", "--work=train"],
        ["benchmark", "--work=unet3d,loop"],
    ):
        assert mlperf.expanded(other) == other


def test_percentiles_are_of_calls():
    times = Times.of([2.0, 3.0], [float(i) for i in range(200, 0, -1)])
    assert [times.percentile(p) for p in (50, 90, 99)] == [100, 180, 198]
    assert Times.of([2.0, 3.0, 1.0]).percentile(99) == 3.0


def test_samples_are_of_one_chip_and_joules_of_one_sample():
    (row,) = report.rows([measured(joules=6.0)], 5)
    # 4 scans in 2 s on 2 chips.
    found = row | mlperf.sample_rates(row)
    assert found["samples_per_s_per_chip"] == 1
    assert found["joules_per_sample"] == 1.5
    text = mlperf.table([found])
    assert text.splitlines()[-1] == (
        "unverified, benchmark retired, not comparable as an MLPerf result"
    )
    (row,) = report.rows([measured()], 5)
    assert mlperf.sample_rates(row)["joules_per_sample"] is None


def test_the_log_is_of_mlperf_logging(tmp_path: pathlib.Path):
    pytest.importorskip("mlperf_logging")
    (row,) = report.rows([measured()], 5)
    path = tmp_path / "log.txt"
    mlperf.write_log(path, CONFIG, "segmentation", [row])
    lines = path.read_text().splitlines()
    assert all(line.startswith(":::MLLOG ") for line in lines)
    events = {e["key"]: e["value"] for e in (json.loads(x.split(" ", 1)[1]) for x in lines)}
    assert events["submission_status"] == mlperf.NOTE
    assert events["global_batch_size"] == 4
    assert events["tracked_stats"]["seconds_per_step"] == 2


def test_a_log_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"^--mlperf_log: .*pip install 'deepsc_jax\[mlperf\]'"):
        mlperf.require_logging()


@pytest.mark.slow
def test_synthetic_data_and_the_loader_apart(tmp_path: pathlib.Path):
    file = tmp_path / "rows.json"
    peers = ("--peer=torch,dynunet", "--variants=eager")
    done = benchmark(*peers, f"--json={file}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["work"], row["peer"]) for row in rows] == [
        ("train_segmentation", "torch eager"),
        ("train_segmentation", "dynunet eager"),
        ("loop", None),
    ]
    for row in rows:
        assert row["ours_p50_s"] <= row["ours_p90_s"] <= row["ours_p99_s"]
        assert row["flops"] > 0
        assert row["samples_per_s_per_chip"] > 0
    assert mlperf.NOTE in done.stdout
