"""A stage that starts from the pre-trainings of another run."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest
import stored
from stored import Scan

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data.store import Store
from deepsc_jax.models import registry
from deepsc_jax.models.deepsc.config import JointTraining, PreTraining
from deepsc_jax.runtime.device_mesh import make_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.watchdog import Watchdog
from deepsc_jax.systems.building import build
from deepsc_jax.systems.joint import PARTS
from deepsc_jax.systems.system import initial
from deepsc_jax.training import job
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints
from deepsc_jax.training.logs import MetricsLog
from deepsc_jax.training.preemption import Preemption
from deepsc_jax.training.stage import Run, prepare_stage

DATA = DataConfig(working_size=(16, 16), tile=(8, 16, 16), depth_bucket=8, slices=8)
CONFIG = Config(
    dataclasses.replace(
        smallest.MODEL,
        segmentation=PreTraining(steps=6, batch=2),
        classification=PreTraining(steps=4, batch=2),
        joint=JointTraining(steps=4, batch=2),
    ),
    DATA,
    platform=PlatformConfig(data_devices=1),
)
# Of another optimizer: its state is another tree.
THEIRS = dataclasses.replace(CONFIG, train=TrainConfig(clip_norm=1.0, average_decay=0.5))
SHAPES = jax.eval_shape(lambda: initial(build(CONFIG, "cpu")))


def drawn_state(config: Config, stage: str, seed: int) -> states.State:
    system = build(config, "cpu")
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), SHAPES)
    state = states.create(system, system.stage(stage), params)
    average = jax.tree.map(lambda x: x + 1, state.params) if state.average else {}
    return dataclasses.replace(state, average=average)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    scans = [Scan("train", label, 8) for label in (0, 1, 2, 0)] + [Scan("validation", 0, 8)]
    return stored.write(tmp_path_factory.mktemp("store"), DATA, scans)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory, store: Store) -> pathlib.Path:
    """A run whose segmentation was best at step 3 of 6, and whose classification had no scores."""
    run = tmp_path_factory.mktemp("pretrained")
    workdirs.begin(run, THEIRS, store)
    for seed, (stage, step, score) in enumerate(
        [("segmentation", 3, 0.9), ("segmentation", 6, 0.4), ("classification", 4, None)]
    ):
        state = drawn_state(THEIRS, stage, seed)
        checkpoints = Checkpoints(run / stage, writer=True)
        checkpoints.save(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)), {"n": step})
        if score is not None:
            checkpoints.add_record(step, {"score": score})
        checkpoints.close()
    return run


@pytest.fixture
def run(complete: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(complete, tmp_path / "run")
    return tmp_path / "run"


def of_joint(workdir: pathlib.Path, store: Store, record: workdirs.Record) -> Run:
    mesh = make_mesh(CONFIG.platform)
    watchdog = Watchdog(0, workdir, 0)
    log = MetricsLog(workdir)
    system, taken = build(CONFIG, "cpu"), record.init_from
    return Run(system, store, workdir, mesh, log, Preemption(mesh), watchdog, lambda: None, taken)


def test_the_joint_stage_starts_from_the_best_checkpoints_of_another_run(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "new"
    record = workdirs.begin(workdir, CONFIG, store, init_from=(run,))
    assert workdirs.read(workdir) == record
    found = {stage: (of.run, of.step) for stage, of in record.init_from.items()}
    assert found == {"segmentation": (str(run), 3), "classification": (str(run), 4)}
    of = of_joint(workdir, store, record)
    checkpoints = Checkpoints(workdir / "joint", writer=True)
    ready = prepare_stage(of, of.system.stage("joint"), checkpoints)
    ready.batches.close()
    checkpoints.close()
    for stage, seed in (("segmentation", 0), ("classification", 2)):
        # The average is what that run predicts with.
        expected = drawn_state(THEIRS, stage, seed).variables["params"]
        for part in PARTS[stage]:
            jax.tree.map(np.testing.assert_array_equal, ready.state.params[part], expected[part])
    np.testing.assert_array_equal(
        ready.state.params["cross_stitch"]["weights"],
        np.asarray([[0.9, 0.1], [0.1, 0.9]], np.float32),
    )


def model(**changes: Any) -> Config:
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes))


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (model(encoder_channels=(4, 4, 8)), r"--deepsc\.encoder_channels: \(4, 4, 4\) then"),
        (
            dataclasses.replace(CONFIG, data=dataclasses.replace(DATA, hu_window=(-1000.0, 200.0))),
            "--hu_window: ",
        ),
        (
            dataclasses.replace(CONFIG, train=TrainConfig(fold="0/2")),
            "--fold: ",
        ),
    ],
)
def test_a_run_of_another_network_preprocessing_or_fold_is_refused_by_the_flag(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path, config: Config, flag: str
) -> None:
    with pytest.raises(InputError, match=rf"--init_from=.*run: .* other settings \({flag}") as said:
        workdirs.begin(tmp_path / "new", config, store, init_from=(run,))
    assert ";" not in str(said.value)  # no flag beside it: not the optimizer's
    assert "\n" not in str(said.value)
    assert not (tmp_path / "new").exists()


def test_losses_rates_and_steps_may_be_others(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    config = model(task_aware_weight=0.0, focal_alpha=0.5).with_stage("segmentation", steps=99)
    record = workdirs.begin(tmp_path / "new", config, store, init_from=(run,))
    assert record.init_from["segmentation"].step == 3


def test_a_run_of_another_model_and_a_model_of_one_stage_are_refused(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    data = dataclasses.replace(DATA, slices=3)
    other = Config(registry.options("cnncf")(), data)
    with pytest.raises(InputError, match="a run of --model=deepsc, and --model=cnncf was asked"):
        workdirs.begin(tmp_path / "new", other, store, init_from=(run,))
    workdirs.begin(tmp_path / "cnncf", other, store)
    with pytest.raises(InputError, match="--model=cnncf has no stage that starts from another"):
        workdirs.begin(tmp_path / "new", other, store, init_from=(tmp_path / "cnncf",))
    with pytest.raises(InputError, match=r"--init_from=.*nothing: no config\.json found"):
        workdirs.begin(tmp_path / "new", CONFIG, store, init_from=(tmp_path / "nothing",))


def test_a_pretraining_that_is_not_complete_is_refused(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    shutil.rmtree(run / "classification" / "4")
    with pytest.raises(InputError, match="classification was trained for 0 of 4 steps: train it"):
        workdirs.begin(tmp_path / "new", CONFIG, store, init_from=(run,))


def test_what_was_taken_never_changes(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "new"
    record = workdirs.begin(workdir, CONFIG, store, init_from=(run,))
    checkpoints = Checkpoints(run / "segmentation", writer=True)
    checkpoints.add_record(6, {"score": 0.95})  # the best is another now
    checkpoints.close()
    assert workdirs.begin(workdir, CONFIG, store, init_from=(run,)) == record
    for other in ((), (tmp_path / "elsewhere",)):
        with pytest.raises(InputError, match=r"run\.json: .* begun with --init_from=.*run: give"):
            workdirs.begin(workdir, CONFIG, store, init_from=other)
    workdirs.begin(tmp_path / "own", CONFIG, store)
    with pytest.raises(InputError, match=r"run\.json: .* begun without --init_from: give"):
        workdirs.begin(tmp_path / "own", CONFIG, store, init_from=(run,))
    shutil.move(run / "segmentation" / "6", run / "segmentation" / "3-was")
    shutil.rmtree(run / "segmentation" / "3", ignore_errors=True)
    shutil.move(run / "segmentation" / "3-was", run / "segmentation" / "3")
    of = of_joint(workdir, store, record)
    checkpoints = Checkpoints(workdir / "joint", writer=True)
    with pytest.raises(InputError, match="segmentation/3: not the checkpoint that this run was"):
        prepare_stage(of, of.system.stage("joint"), checkpoints)
    checkpoints.close()


def test_results_say_what_the_pretraining_was_of(
    run: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"trained_on": "phantoms", "store": "b2"}))
    record = workdirs.begin(tmp_path / "new", CONFIG, store, init_from=(run,))
    assert record.trained_on == "scans, pre-trained on phantoms"
    facts = json.loads((tmp_path / "new" / "run.json").read_text())
    assert facts["init_from"]["segmentation"]["store"] == "b2"
    facts["init_from"]["segmentation"]["step"] = "3"
    (tmp_path / "new" / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"run\.json: not the record of a run"):
        workdirs.read(tmp_path / "new")


def test_stages_that_are_taken_are_not_trained(
    run: pathlib.Path,
    store: Store,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    trained: list[str] = []

    def train(*arguments: Any) -> bool:
        trained.extend(stage.name for stage in arguments[3])
        assert arguments[6].keys() == {"segmentation", "classification"}
        return False  # as if it was stopped

    monkeypatch.setattr(job.loop, "train", train)
    folder = pathlib.Path(store.path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "store").symlink_to(folder, target_is_directory=True)

    def asked(stage: str) -> job.Asked:
        data, workdir = tmp_path / "data", tmp_path / "new"
        return job.Asked(CONFIG, [], stage, data, workdir, 0, init_from=(run,))

    stages = build(CONFIG, "cpu").stages
    assert job.train(asked("all"), stages) == 75
    assert trained == ["joint"]
    said = capsys.readouterr().out
    assert f"segmentation: taken from {run}, step 3\n" in said
    with pytest.raises(InputError, match="--stage=segmentation: that stage is taken from"):
        job.train(asked("segmentation"), stages[:1])
