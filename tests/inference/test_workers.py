"""Many scans: the same results with and without workers, nothing done twice, nothing half done."""

import contextlib
import csv
import dataclasses
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import chests
import numpy as np
import pytest

from deepsc_jax.config import DataConfig
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference import requests, writing
from deepsc_jax.inference import results as prediction
from deepsc_jax.inference.network import Network
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.results import Outcome
from deepsc_jax.inference.workers import BatchInference
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.predict import summary, utilisation, write_table
from deepsc_jax.runtime.errors import InputError

DATA = DataConfig(
    working_spacing_mm=(8, 9, 9), working_size=(24, 32), tile=(8, 24, 32), depth_bucket=8, slices=8
)
NETWORK = Network(DATA, "joint", 0.5, "phantoms", "digest", chests.NETWORK.volumes)


class Computes:
    """Stands in for a network, which takes long to compile: what it says depends on the scan."""

    def __init__(self, network: Network = NETWORK, before: Callable[[int], None] | None = None):
        self.network, self.calls, self._before = network, 0, before

    def __call__(self, volume: np.ndarray, /) -> Prediction:
        self.calls += 1
        if self._before is not None:
            self._before(self.calls)
        return chests.compute(volume)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of two phantoms, p0/scan.nii.gz and p1/scan.nii.gz."""
    folder = tmp_path_factory.mktemp("phantoms")
    cases = write_phantoms((0, 0, 2), folder, seed=0, size=48, workers=1)
    for i, case in enumerate(cases):
        (folder / "in" / f"p{i}").mkdir(parents=True)
        case.scan.rename(folder / "in" / f"p{i}" / "scan.nii.gz")
    return folder / "in"


def run(
    predictor: Computes, scans: pathlib.Path, out: pathlib.Path, workers: int, **options: Any
) -> list[Outcome]:
    """What became of all scans, by name."""
    batch = BatchInference(
        predictor, out, workers=workers, overwrite=options.get("overwrite", False)
    )
    wanted = options.get("wanted") or requests.below(scans, out).requests
    return sorted(batch.outcomes(wanted), key=lambda outcome: outcome.request.name)


def contents(out: pathlib.Path) -> dict[str, bytes]:
    """Every file below a folder; of compressed ones what is in them."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def pixels(out: pathlib.Path) -> dict[str, Any]:
    import nibabel as nib

    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*.nii.gz")):
        image = nib.Nifti1Image.from_filename(path)
        found[str(path.relative_to(out))] = np.asarray(image.dataobj).tobytes()
    for path in sorted(out.rglob("result.json")):
        result = json.loads(path.read_text())
        found[str(path.relative_to(out))] = {
            k: v for k, v in result.items() if k not in ("files", "states", "sum")
        }
    return found


def test_workers_change_nothing_and_nothing_is_done_twice(
    scans: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    for out, workers in ((alone, 0), (beside, 2)):
        predictor = Computes()
        outcomes = run(predictor, scans, out, workers)
        assert [outcome.error for outcome in outcomes] == [None, None]
        assert [outcome.request.name for outcome in outcomes] == ["p0/scan", "p1/scan"]
        assert predictor.calls == 2
    expected = pixels(alone)
    assert len(expected) == 2 * 6
    assert expected["p0/scan/lesion_mask.nii.gz"] != expected["p1/scan/lesion_mask.nii.gz"]
    assert pixels(beside) == expected

    before, again = contents(beside), Computes()
    outcomes = run(again, scans, beside, 2)
    assert again.calls == 0
    assert all(outcome.skipped for outcome in outcomes)
    assert contents(beside) == before
    assert multiprocessing.active_children() == []

    (beside / "p1" / "scan" / "evidence_2.nii.gz").unlink()
    again = Computes()
    assert [o.skipped for o in run(again, scans, beside, 0)] == [True, False]
    assert pixels(beside) == expected


def test_what_was_made_from_something_else_is_made_again(
    scans: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    wanted = [Request("p0", scans / "p0" / "scan.nii.gz")]
    run(Computes(), scans, tmp_path, 0, wanted=wanted)
    for change in ({"digest": "retrained"}, {"threshold": 0.25}, {"trained_on": "scans"}):
        other = dataclasses.replace(NETWORK, **change)
        assert not run(Computes(other), scans, tmp_path, 0, wanted=wanted)[0].skipped
        assert run(Computes(other), scans, tmp_path, 0, wanted=wanted)[0].skipped
    assert not run(Computes(other), scans, tmp_path, 0, wanted=wanted, overwrite=True)[0].skipped
    os.utime(wanted[0].path)  # its content is what counts
    assert run(Computes(other), scans, tmp_path, 0, wanted=wanted)[0].skipped


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_scan_and_a_failing_network_cost_one_scan_each(
    scans: pathlib.Path, tmp_path: pathlib.Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes((scans / "p0" / "scan.nii.gz").read_bytes()[:5000])

    def fail(call: int) -> None:
        if call == 1:
            raise RuntimeError("out of memory")

    good = scans / "p1" / "scan.nii.gz"
    wanted = [Request("1", bad), Request("2", good), Request("3", good)]
    outcomes = run(Computes(before=fail), scans, tmp_path / "out", workers, wanted=wanted)
    assert [outcome.result is None for outcome in outcomes] == [True, True, False]
    assert f"{bad}: truncated or damaged" in str(outcomes[0].error)
    assert f"{good}: RuntimeError: out of memory" in str(outcomes[1].error)
    assert f"please report it with {tmp_path / 'out'}" in str(outcomes[1].error)
    (log,) = (tmp_path / "out").glob("error-*.log")
    assert "Traceback (most recent call last)" in log.read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"3", log.name}
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")

    write_table(outcomes, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["error"] == outcomes[0].error
    result = outcomes[2].result
    assert result is not None
    assert rows[2]["class"] == result["class"]
    assert float(rows[2]["covid-19"]) == result["probabilities"]["covid-19"]
    assert float(rows[2]["lesion_ml"]) == result["lesion_ml"]
    assert rows[2]["error"] == ""
    line = summary(outcomes, 3, seconds=10, busy=4)
    assert line == (
        "1 of 3 scans predicted, 2 failed, 1 with notes in 10 s: 360 scans/hour; the network took "
        "40% of the time and waited for scans 60%"
    )


def test_the_network_is_timed_without_the_first_scan_of_a_shape() -> None:
    line = utilisation(busy=10, first=4, voxels=12_000_000, peak=3 * 2**20)
    assert line == (
        "the network: 2e+06 voxels/s, 40% of its time on the first scan of a shape, compiling, "
        "at most 3 MiB"
    )
    alone = utilisation(busy=4, first=4, voxels=0, peak=2**20)
    assert alone.startswith("the network: 100% of its time on the first scan of a shape")


def test_a_killed_worker_costs_one_scan(scans: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def kill(call: int) -> None:
        if call == 1:
            (worker,) = multiprocessing.active_children()
            worker.kill()
            worker.join()

    first, second = run(Computes(before=kill), scans, tmp_path, 1)
    assert "the process that worked on it was killed" in str(first.error)
    assert second.result is not None
    assert [path.name for path in tmp_path.iterdir()] == ["p1"]


def test_stopping_finishes_what_the_device_has_begun_and_drops_the_rest(
    scans: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    wanted = [Request(str(i), scans / f"p{i % 2}" / "scan.nii.gz") for i in range(4)]
    batch: BatchInference
    predictor = Computes(before=lambda _: batch.stop())
    batch = BatchInference(predictor, tmp_path, workers=2, overwrite=False)
    (only,) = batch.outcomes(wanted)
    assert only.result is not None
    assert predictor.calls == 1
    assert [path.name for path in tmp_path.iterdir()] == [only.request.name]
    assert multiprocessing.active_children() == []


def test_leaving_early_ends_all_processes(scans: pathlib.Path, tmp_path: pathlib.Path) -> None:
    wanted = [Request(str(i), scans / "p0" / "scan.nii.gz") for i in range(6)]
    batch = BatchInference(Computes(), tmp_path, workers=2, overwrite=False)
    before = threading.active_count()
    with contextlib.closing(batch.outcomes(wanted)) as outcomes:
        next(outcomes)
        assert multiprocessing.active_children() != []
    assert multiprocessing.active_children() == []
    assert threading.active_count() == before


def test_two_processes_at_one_scan_leave_one_whole_result(
    scans: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, network = Request("p0", scans / "p0" / "scan.nii.gz"), Computes()
    killed = tmp_path / ".partial-01234567-p0"
    killed.mkdir()
    (killed / "lesion_mask.nii.gz").write_text("half")
    draw = writing.scan_picture

    def other_process_first(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(writing, "scan_picture", draw)
        prediction.predict_scan(request, tmp_path / "p0", NETWORK, network)
        draw(*arguments, **options)

    monkeypatch.setattr(writing, "scan_picture", other_process_first)
    outcome = prediction.attempt(request, tmp_path, NETWORK, network, overwrite=False)
    assert outcome.error is None
    assert network.calls == 2
    assert prediction.attempt(request, tmp_path, NETWORK, network, overwrite=False).skipped
    assert json.loads((tmp_path / "p0" / "result.json").read_text()) == outcome.result
    assert [path.name for path in tmp_path.iterdir()] == ["p0"]


def test_workers_do_without_jax() -> None:
    code = "import sys, deepsc_jax.predict; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_workers_that_do_not_come_up_are_told_of_once(
    scans: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    multiprocessing.set_executable("/bin/false")
    try:
        with pytest.raises(InputError, match="ended with code 1 before it began: try with fewer"):
            run(Computes(), scans, tmp_path, 2)
    finally:
        multiprocessing.set_executable(sys.executable)
