"""The command around an evaluation: what it compares, tunes and writes, of stand-in networks."""

import dataclasses
import json
import pathlib
from typing import Any

import fresh_flags
import handful
import numpy as np
import pytest

from deepsc_jax import evaluate
from deepsc_jax.config import Config
from deepsc_jax.data import preparation
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.inference import ensemble
from deepsc_jax.inference.options import PredictionOptions
from deepsc_jax.phantoms.writing import write_phantoms
from deepsc_jax.runtime.errors import InputError


@dataclasses.dataclass
class Network:
    """Calls what is dense a lesion and points at it; its classes are as sure as it is told."""

    sureness: float = 0.5
    threshold: float = 0.5
    config: Config = handful.CONFIG
    options: PredictionOptions = dataclasses.field(default_factory=PredictionOptions)
    of_fold: tuple[int, int] | None = None

    def __call__(self, volume: np.ndarray) -> Prediction:
        dense = float(np.clip((volume > 0.5).mean() * 10, 0, 1)) * self.sureness
        classes = np.array([dense, 0.4 * (1 - dense), 0.6 * (1 - dense)], np.float32)
        return Prediction({"lesion": volume}, classes, {"evidence_1": volume})

    def fold(self, split: str) -> tuple[int, int] | None:
        return None if split == "test" else self.of_fold

    def facts(self) -> dict[str, Any]:
        return {"networks": 1, "trained_on": "phantoms", "lesion_threshold": self.threshold}

    def broken(self) -> dict[str, "Network"]:
        return {"blind": Network(0.0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data")
    cases = write_phantoms((0, 3, 6), folder, seed=0, size=48, workers=1)
    assert preparation.prepare(cases, folder, handful.CONFIG.data, workers=1) == []
    return folder


def run(data: pathlib.Path, out: pathlib.Path, networks: dict[str, Network], *flags: str) -> Any:
    """What metrics.json holds after the command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        values = fresh_flags.fresh(patch)
        evaluate.define_flags()
        given = (f"--data_dir={data}", f"--out={out}", "--resamples=20", *flags)
        values(["program", "--checkpoint=run", *given])
        patch.setattr(ensemble, "load", lambda paths, *_: networks[paths[0].name])
        evaluate.main()
    return json.loads((out / "metrics.json").read_text("utf-8"))


def test_two_networks_are_compared_and_evidence_is_measured(
    data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = {"run": Network(), "other": Network(0.9, threshold=0.3)}
    earlier = run(data, tmp_path / "earlier", {"run": networks["other"]})
    assert "against" not in earlier
    flags = ("--tune", "--evidence=curves,sanity", "--interval=bca")
    read = run(data, tmp_path / "a", networks, f"--against={tmp_path / 'earlier'}", *flags)
    assert read["intervals"]["method"] == "bca"
    assert read["tuned"]["evidence"].keys() == {"evidence_1"}
    assert {"evidence", "agreement", "perturbation", "sanity"} <= read.keys()
    said = capsys.readouterr().out
    assert "exact McNemar" in said
    assert "single lesions (of 6 scans)" in said
    dsc = read["against"]["rows"][0]
    assert dsc["one"] == pytest.approx(read["lesions"]["dsc"]["mean"])
    assert dsc["other"] == pytest.approx(earlier["lesions"]["dsc"]["mean"])
    page = (tmp_path / "a" / "report.html").read_text("utf-8")
    assert 'id="against"' in page
    # Another run, evaluated on the way, is the same as its evaluation read.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").touch()
    scored = run(data, tmp_path / "b", networks, f"--against={tmp_path / 'other'}", *flags)
    assert scored["against"]["rows"] == read["against"]["rows"]


def test_other_scans_and_other_folds_are_refused(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    networks = {"run": Network(), "other": Network(of_fold=(1, 3))}
    run(data, tmp_path / "test", networks)
    with pytest.raises(InputError, match=r"is of other scans, truth or labels \(6 scans, here 3\)"):
        run(data, tmp_path / "v", networks, "--split=validation", f"--against={tmp_path / 'test'}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").touch()
    against = f"--against={tmp_path / 'other'}"
    with pytest.raises(InputError, match="has other --folds"):
        run(data, tmp_path / "v", networks, "--split=validation", against)
    with pytest.raises(InputError, match="--tune: chooses on validation"):
        run(data, tmp_path / "v", networks, "--split=validation", "--tune")
    with pytest.raises(InputError, match="--evidence=both: expected some of curves,sanity"):
        run(data, tmp_path / "v", networks, "--evidence=both")
