"""metrics.jsonl: no line lost, none double, whatever is in the file."""

import json
import os
import pathlib
import time

import pytest

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training import logs


def steps(workdir: pathlib.Path) -> list[tuple[str, int, bool]]:
    """Stage, step, and whether it is a validation, of every line."""
    text = (workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["stage"], line["step"], "validation_score" in line) for line in lines]


@pytest.fixture
def log(tmp_path: pathlib.Path) -> logs.MetricsLog:
    """Of a run that was killed at the fourth step."""
    log = logs.MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("joint", step, {"loss": 1.0})
    log.write("joint", 2, {"validation_score": 0.5})
    log.close()
    with log.path.open("a") as file:
        file.write('{"stage": "joint", "st')
    return log


def test_what_comes_after_the_checkpoint_and_what_is_cut_off_is_dropped(
    log: logs.MetricsLog, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    log.resume("joint", 2)
    assert steps(tmp_path) == [("joint", 1, False), ("joint", 2, False), ("joint", 2, True)]
    assert capsys.readouterr().out == ""
    log.resume("joint", 2, scored=False)
    assert steps(tmp_path) == [("joint", 1, False), ("joint", 2, False)]
    log.resume("segmentation", 0)
    assert len(steps(tmp_path)) == 2


def test_foreign_bytes_are_left_out_and_kept_in_a_copy(
    log: logs.MetricsLog, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    ours = log.path.read_bytes()
    first, rest = ours.split(b"\n", 1)
    foreign = [
        b"\xff\xfe\0",
        b"[]",
        b"3",
        b'{"step": 1}',
        b"[" * 100_000,
        b'{"stage": 1, "step": 2}',
    ]
    damaged = b"\n".join([first, *foreign, rest])
    log.path.write_bytes(damaged)
    log.resume("joint", 2)
    assert steps(tmp_path) == [("joint", 1, False), ("joint", 2, False), ("joint", 2, True)]
    said = capsys.readouterr().out
    assert f"{log.path}: 6 lines are not of this log, the first is line 2: left out" in said
    assert said.count("\n") == 1
    assert (tmp_path / "metrics-damaged.jsonl").read_bytes() == damaged
    log.path.write_bytes(damaged)
    log.resume("joint", 2)
    assert "kept as metrics-damaged2.jsonl" in capsys.readouterr().out


def test_a_clock_that_is_set_is_said_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    log = logs.MetricsLog(tmp_path)
    log.write("joint", 4, {"loss": 1.0})
    assert capsys.readouterr().out == ""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    log.write("joint", 5, {"loss": 1.0})
    log.write("joint", 6, {"loss": 1.0})
    log.close()
    said = capsys.readouterr().out
    assert said.startswith("the clock jumped by -3600 s: ")
    assert said.count("\n") == 1


def test_a_log_that_is_no_file_is_named_and_not_waited_for(tmp_path: pathlib.Path) -> None:
    log = logs.MetricsLog(tmp_path)
    os.mkfifo(log.path)
    with pytest.raises(InputError, match=r"metrics\.jsonl: expected a file"):
        log.resume("joint", 2)
