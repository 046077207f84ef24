"""Training, evaluation and prediction, end to end on a handful of phantoms."""

import dataclasses
import functools
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import handful
import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from handful import CONFIG

from deepsc_jax.config import CLASSES
from deepsc_jax.data import pipeline, preparation
from deepsc_jax.data.datasets import read_cases
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.curve import CURVE_THRESHOLDS
from deepsc_jax.evaluation.scoring import evaluate
from deepsc_jax.evaluation.thresholds import choose_threshold
from deepsc_jax.inference import predictor as inference
from deepsc_jax.inference.request import Request
from deepsc_jax.inference.results import predict_scan
from deepsc_jax.metrics.overlap import THRESHOLDS, best_threshold
from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems import joint, whole_scan
from deepsc_jax.systems.building import build
from deepsc_jax.systems.decoding import decode
from deepsc_jax.systems.system import Stage, initial
from deepsc_jax.training import checkpoint, loop
from deepsc_jax.training import workdir as workdirs

SYSTEM = build(CONFIG, "cpu")


def stages(*names: str) -> tuple[Stage, ...]:
    return tuple(SYSTEM.stage(name) for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return handful.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def store(folder: pathlib.Path) -> Store:
    return Store(folder / "store", CONFIG.data)


@pytest.fixture(scope="module")
def trained(store: Store, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of all stages."""
    workdir = tmp_path_factory.mktemp("run")
    workdirs.begin(workdir, CONFIG, store)
    loop.train(SYSTEM, store, workdir, SYSTEM.stages)
    return workdir


def _params(workdir: pathlib.Path, stage: str) -> dict:
    like = inference.abstract_state(SYSTEM, SYSTEM.stage(stage))
    checkpoints = checkpoint.Checkpoints(workdir / stage)
    step = checkpoints.latest_step()
    assert step is not None
    params = checkpoints.load(like, step)["state"].params
    checkpoints.close()
    return params


def _equal(one: dict, other: dict) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, other)))


def test_every_stage_logs_its_losses_and_validation(trained: pathlib.Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    terms = {
        "segmentation": {"dice", "focal"},
        "classification": {"cross_entropy"},
        "joint": {"dice", "focal", "cross_entropy", "task_aware"},
    }
    for stage, expected in terms.items():
        steps = [line for line in lines if line["stage"] == stage and "loss" in line]
        assert [line["step"] for line in steps] == [1, 2, 3, 4]
        assert expected | {"learning_rate", "gradient_norm"} <= steps[0].keys()
        validations = [line for line in lines if line["stage"] == stage and "loss" not in line]
        assert [line["step"] for line in validations] == [2, 4]
    assert list((trained / "tensorboard" / "joint").glob("events*"))


def test_a_single_task_stage_leaves_the_other_task_alone(trained: pathlib.Path) -> None:
    fresh = initial(SYSTEM)["params"]
    for stage, other in itertools.permutations(joint.PARTS):
        params = _params(trained, stage)
        for name in joint.PARTS[other]:
            assert _equal(params[name], fresh[name])
        for name in joint.PARTS[stage]:
            assert not _equal(params[name], fresh[name])


def test_joint_stage_starts_from_both_best_checkpoints() -> None:
    fresh = initial(SYSTEM)
    ones = jax.tree.map(jnp.ones_like, fresh)
    twos = jax.tree.map(lambda x: jnp.full_like(x, 2), fresh)
    trained = {"segmentation": ones, "classification": twos}
    joined = SYSTEM.start(SYSTEM.stage("joint"), fresh, trained)["params"]
    assert joined.keys() == fresh["params"].keys()
    for stage, names in joint.PARTS.items():
        for name in names:
            assert _equal(joined[name], trained[stage]["params"][name])


def test_a_stopped_run_resumes_to_bit_identical_parameters(
    store: Store,
    trained: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """StoppedError after step 3, with a checkpoint at 2: step 3 is taken again."""

    class StoppedError(Exception):
        pass

    def stop(self: loop.Progress, step: int, **_: float) -> None:
        if step == 3:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(loop.Progress, "show", stop)
        with pytest.raises(StoppedError):
            loop.train(SYSTEM, store, tmp_path, stages("classification"))
    loop.train(SYSTEM, store, tmp_path, stages("classification"))
    assert _equal(_params(tmp_path, "classification"), _params(trained, "classification"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]


def test_the_joint_stage_wants_both_pretrainings_complete(
    trained: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    workdirs.begin(tmp_path, CONFIG, store)
    shutil.copytree(trained / "segmentation", tmp_path / "segmentation")
    with pytest.raises(InputError, match=r"classification: trained for 0 steps, 4 expected"):
        loop.train(SYSTEM, store, tmp_path, stages("joint"))
    assert inference.load(tmp_path).stage.name == "segmentation"  # an empty joint/ is no checkpoint


@pytest.mark.parametrize("trained_with", [{"conv_form": "sliced"}, {"space": 2}])
def test_a_trained_network_is_written_as_this_device_likes_it(
    trained_with: dict[str, Any],
    trained: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(trained / "segmentation", tmp_path / "segmentation")
    elsewhere = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, tile=(16, 24, 32), depth_bucket=16, slices=16),
        platform=dataclasses.replace(CONFIG.platform, **trained_with),
    )
    workdirs.write(tmp_path, workdirs.Record(elsewhere, "phantoms", "", {}))
    assert inference.load(tmp_path)._system.layout.form == "folded"
    monkeypatch.setattr(compiler, "has_onednn", lambda: False)
    with pytest.raises(InputError, match=r"--conv_form=direct: JAX .* has no oneDNN here"):
        inference.load(tmp_path, form="direct")
    monkeypatch.setattr(compiler, "has_onednn", lambda: True)
    assert inference.load(tmp_path, form="direct")._system.layout.form == "direct"


@pytest.mark.slow
def test_without_a_validation_split_the_last_checkpoint_counts(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    cases = [c for c in read_cases(folder / "cases.csv") if c.split != "validation"]
    assert preparation.prepare(cases, tmp_path, CONFIG.data, workers=1) == []
    store = Store(tmp_path / "store", CONFIG.data)
    workdirs.begin(tmp_path, CONFIG, store)
    loop.train(SYSTEM, store, tmp_path, stages("segmentation"))
    checkpoints = checkpoint.Checkpoints(tmp_path / "segmentation")
    assert checkpoints.best_step() == checkpoints.latest_step() == 4
    checkpoints.close()
    predictor = inference.load(tmp_path)
    assert predictor.threshold == 0.5
    assert _equal(predictor.variables["params"], _params(tmp_path, "segmentation"))


def test_evaluation_counts_every_scan(trained: pathlib.Path, store: Store) -> None:
    metrics, rows = evaluate(inference.load(trained), store, "test")
    assert [row["label"] for row in rows] == list(CLASSES)
    assert metrics["lesions"]["dsc"]["n"] == 2
    assert metrics["lesions"]["lesion_free"]["n"] == 1
    assert metrics["classes"]["accuracy"]["n"] == 3
    assert metrics["classes"]["accuracy"]["sd"] is None
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert metrics["curve"]["n"] == {"with_lesions": 2, "lesion_free": 1}
    assert list(metrics["evidence"]) == ["evidence_1", "evidence_2", "evidence_3"]
    for name, figures in metrics["evidence"].items():
        of_scans = [row["evidence"][name]["auc"] for row in rows if "evidence" in row]
        assert figures["auc"]["mean"] == pytest.approx(np.mean(of_scans))
        assert [figures[key]["n"] for key in ("auc", "energy", "hit")] == [2, 2, 2]


def test_prediction_is_on_the_source_grid(
    trained: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    scan = next((folder / "scans").glob("phantom-test-0000.nii.gz"))
    predictor = inference.load(trained)
    request = Request("out", scan)
    result = predict_scan(request, tmp_path / "out", predictor.network, predictor)
    source = nib.Nifti1Image.from_filename(scan)
    names = ["lesion_mask", "lesion_probability", *(f"evidence_{i}" for i in (1, 2, 3))]
    for name in names:
        image = nib.Nifti1Image.from_filename(tmp_path / "out" / f"{name}.nii.gz")
        assert image.shape == source.shape
        np.testing.assert_array_equal(image.affine, source.affine)
    mask = nib.Nifti1Image.from_filename(tmp_path / "out" / "lesion_mask.nii.gz")
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1}
    assert result["class"] in CLASSES
    assert result["trained_on"] == "phantoms"
    shares = result["evidence_share_in_lung"]
    assert len(shares) == 3
    assert all(0 <= share <= 1 for share in shares)
    written = {path.name for path in (tmp_path / "out").iterdir()} - {"report.html"}
    assert written == {"picture.png", "result.json", *(f"{name}.nii.gz" for name in names)}


def test_a_folder_that_is_no_result_is_left_alone(
    trained: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    scan = folder / "scans" / "phantom-test-0000.nii.gz"
    out = tmp_path / "series"
    out.mkdir()
    (out / "slice1.dcm").write_text("precious")
    predictor = inference.load(trained)
    with pytest.raises(InputError, match="series: exists and holds no earlier result"):
        predict_scan(Request("series", scan), out, predictor.network, predictor)
    assert (out / "slice1.dcm").read_text() == "precious"


def test_a_bad_scan_between_two_good_ones(
    trained: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    good = [folder / "scans" / f"phantom-test-000{i}.nii.gz" for i in (0, 1)]
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(good[0].read_bytes()[:5000])
    command = [sys.executable, "-m", "deepsc_jax.predict", f"--checkpoint={trained}"]
    command += [f"--out={tmp_path / 'out'}"]
    command += [f"--scan={scan}" for scan in (good[0], bad, good[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert str(bad) in errors[0]
    assert "1 of 3 scans could not be predicted" in done.stderr
    assert done.stdout.count("by a network trained on phantoms") == 2
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"phantom-test-0000", "phantom-test-0001"}


def test_nothing_outside_of_the_lungs_is_a_lesion(
    trained: pathlib.Path, folder: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    predictor = inference.load(trained)
    predictor.threshold = 1e-9  # whatever the network sees is a lesion to it
    _, rows = evaluate(predictor, store, "test")
    for row in rows:
        assert row["specificity"] < 0.1
        assert row["specificity_scan"] > 0.5
    scan = folder / "scans" / "phantom-test-0000.nii.gz"
    lung_path = folder / "scans" / "phantom-test-0000-lung.nii.gz"
    request = Request("out", scan, lung_path)
    predict_scan(request, tmp_path / "out", predictor.network, predictor)
    lung = np.asarray(nib.Nifti1Image.from_filename(lung_path).dataobj) > 0
    for name in ("lesion_mask", "lesion_probability"):
        values = nib.Nifti1Image.from_filename(tmp_path / "out" / f"{name}.nii.gz").get_fdata()
        assert not values[~lung].any()
        assert (values[lung] > 0).mean() > 0.9


def test_inference_in_chunks_equals_the_whole_network(
    trained: pathlib.Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = inference.load(trained)
    case = store.cases("test")[0]
    volume = store.read(case.name, "volume")
    monkeypatch.setattr(whole_scan, "CHUNK_VOXELS", 2 * int(np.prod(CONFIG.data.tile)))
    prediction = predictor(volume)
    stage = SYSTEM.stage("joint")
    batches = pipeline.batches(
        store, "test", stage.reads, CONFIG, seed=0, batch_size=1, train=False
    )
    inputs = decode(next(iter(batches)), stage.reads, CONFIG.data, CONFIG.train)
    out = jax.jit(functools.partial(SYSTEM.outputs, stage))(predictor.variables, inputs)
    assert prediction.classes is not None
    assert prediction.lesion is not None
    np.testing.assert_allclose(prediction.classes, jax.nn.softmax(out["logits"][0]), atol=1e-5)
    whole = np.concatenate(list(np.asarray(out["lesion"][0, ..., 0])))[: case.depth]
    np.testing.assert_allclose(prediction.lesion, whole, atol=1e-5)


def test_the_threshold_is_the_best_of_validation_on_the_sources_grids(
    trained: pathlib.Path, store: Store
) -> None:
    predictor = inference.load(trained)
    chosen = choose_threshold(predictor, store)
    means = []
    for threshold in THRESHOLDS:
        predictor.threshold = threshold
        metrics, rows = evaluate(predictor, store, "validation")
        means.append(np.mean([row["dsc"] for row in rows if row["dsc"] is not None]))
        if threshold in CURVE_THRESHOLDS:
            at = CURVE_THRESHOLDS.index(threshold)
            assert metrics["curve"]["dsc"][at] == pytest.approx(means[-1])
            free = metrics["lesions"]["lesion_free"]["false_positive_ml"]["mean"]
            assert metrics["curve"]["false_ml"][at] == pytest.approx(free)
    assert chosen == THRESHOLDS[best_threshold(np.array(means))]
    workdirs.save_threshold(trained, "joint", 0.35)
    workdirs.save_threshold(trained, "segmentation", 0.15)
    assert inference.load(trained).threshold == 0.35
    assert inference.load(trained, "segmentation").threshold == 0.15
