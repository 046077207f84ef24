"""Teachers on folds, their soft labels, and the student: one command, stopped anywhere."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored
from stored import Scan

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data.store import Store
from deepsc_jax.inference import predictor
from deepsc_jax.models.cnncf import config as cnncf
from deepsc_jax.models.cnncf import gate, network
from deepsc_jax.models.cnncf.residual import TEACHERS
from deepsc_jax.planning import compiled
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build, stages_of
from deepsc_jax.systems.system import System
from deepsc_jax.training import job, loop, soft_labels, stage
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints

DATA = DataConfig(
    working_size=(32, 32),
    tile=(8, 32, 32),
    depth_bucket=8,
    slices=1,
    classes=("covid-19", "cap"),
    lesion_free="",
    intensity_mean=0,
    intensity_sd=1,
)
STEPS = 4
CONFIG = Config(
    data=DATA,
    model=cnncf.Options(
        stem=2,
        stage1_widths=(2, 2, 4),
        stage2_widths=(2, 2, 2),
        published_widths=(2, 2, 2, 2),
        gate_window=1,
        gate_sensitivity=0,
        gate_count=1,
        teachers=2,
        teacher_folds=2,
        teacher=cnncf.TeacherTraining(steps=STEPS, batch=2, warmup_steps=1, decay_every=3),
        classification=cnncf.Training(steps=STEPS, batch=2, warmup_steps=1, decay_every=3),
    ),
    train=TrainConfig(log_every=1, evaluate_every=2, checkpoint_every=2, keep="last"),
    platform=PlatformConfig(data_devices=1),
)
TRAININGS = ["teacher1.fold1", "teacher1.fold2", "teacher2.fold1", "teacher2.fold2"]
STUDENT = "classification"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    scans = [Scan("train", label, 8) for label in (0, 1, 0, 1, 0, 1, 1)]
    scans += [Scan("validation", label, 8) for label in (0, 1)] + [Scan("test", 0, 8)]
    return stored.write(tmp_path_factory.mktemp("store"), DATA, scans)


def train(store: Store, workdir: pathlib.Path, names: tuple[str, ...] = (), **more: Any) -> None:
    """Every stage, or those of these names."""
    system = build(CONFIG, "cpu")
    record = workdirs.begin(workdir, CONFIG, store, **more)
    stages = [s for s in system.stages if s.name in names or not names]
    stages = [s for s in stages if s.name not in record.init_from]
    assert loop.train(system, store, workdir, stages, taken=record.init_from)


MADE: list[tuple[str, Any]] = []


@pytest.fixture(scope="module")
def complete(store: Store, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run that nothing stopped; `MADE` are its steps, as they were made."""
    make, workdir = stage.make_train_step, tmp_path_factory.mktemp("complete") / "run"

    def noted(system: System, of: Any, *rest: Any) -> Any:
        step = make(system, of, *rest)
        MADE.append((of.name, step))
        return step

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stage, "make_train_step", noted)
        train(store, workdir)
    return workdir


@pytest.fixture
def run(complete: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(complete, tmp_path / "run")
    return tmp_path / "run"


def state(workdir: pathlib.Path, name: str) -> list[bytes]:
    """All that the newest checkpoint of a stage holds."""
    base = build(CONFIG, "cpu")
    of_stage = base.stage(name)
    like = predictor.abstract_state(base.of(of_stage), of_stage)
    checkpoints = Checkpoints(workdir / name)
    assert checkpoints.latest_step() == STEPS
    found = checkpoints.load(like, STEPS)
    checkpoints.close()
    leaves = jax.tree.leaves((found["state"], found["data"]))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def said(workdir: pathlib.Path) -> dict[str, Any]:
    return json.loads((workdir / soft_labels.NAME).read_text())


def test_a_model_without_teachers_has_its_one_stage() -> None:
    alone = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, teachers=0))
    assert [s.name for s in stages_of(alone)] == [STUDENT]
    assert stages_of(alone)[0].reads.teachers == 0


def test_four_teachers_and_five_folds_are_twenty_trainings_and_the_student() -> None:
    full = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, teachers=4, teacher_folds=5)
    )
    stages = stages_of(full)
    assert [s.name for s in stages] == [
        *(f"teacher{k}.fold{i}" for k in range(1, 5) for i in range(1, 6)),
        STUDENT,
    ]
    assert stages[7].fold == (2, 5)
    assert stages_of(full, "teacher2.fold3") == (stages[7],)
    assert stages[-1].before == tuple(s.name for s in stages[:-1])
    system = build(full, "cpu")
    for k, shape in enumerate(TEACHERS):
        ours = {system.of(s) for s in stages[5 * k : 5 * k + 5]}  # one, and so one program
        (of_teacher,) = ours
        options: Any = of_teacher.config.model
        assert (options.variant, options.published_blocks) == ("published", shape.blocks)
        assert of_teacher.stages == stages
        assert (options.published_kernels == "bottleneck") == (k > 1)
    assert system.of(stages[-1]) is system
    assert len({system.seed(s) for s in stages}) == 21


def test_a_case_is_answered_by_the_teachers_that_have_not_seen_it(
    complete: pathlib.Path, store: Store
) -> None:
    document, base = said(complete), build(CONFIG, "cpu")
    assert document["store"] == store.digest
    assert list(document["teachers"]) == TRAININGS
    cases = store.cases("train")
    assert set(document["logits"]) == {case.name for case in cases}
    seen = []
    for k, group in enumerate((TRAININGS[:2], TRAININGS[2:])):
        for name in group:
            of_stage = base.stage(name)
            assert of_stage.fold is not None
            fold = store.of_fold(*of_stage.fold, held_out=True).cases("train")
            others = store.of_fold(*of_stage.fold, held_out=False).cases("train")
            assert {c.patient for c in fold}.isdisjoint(c.patient for c in others)
            assert len(fold) + len(others) == len(cases)
            system = base.of(of_stage)
            variables = predictor.load(complete, name).variables
            for case in fold:
                image = store.read(case.name, "volume")[:1]
                out = system.outputs(of_stage, variables, {"slices": jnp.asarray(image[None])})
                row = document["logits"][case.name][k]
                np.testing.assert_allclose(np.asarray(out["logits"])[0], row, rtol=1e-4, atol=1e-5)
                seen.append((k, case.name))
    assert sorted(seen) == sorted((k, case.name) for k in range(2) for case in cases)
    rows = np.asarray([document["logits"][case.name] for case in cases])
    assert len(np.unique(rows.reshape(len(cases), -1), axis=0)) == len(cases)  # a shift would show


@pytest.mark.parametrize("lost", [pytest.param("teacher", marks=pytest.mark.slow), "student"])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    complete: pathlib.Path, run: pathlib.Path, store: Store, lost: str
) -> None:
    """In a teacher's second fold, before there were soft labels; and within the student."""
    if lost == "teacher":
        shutil.rmtree(run / TRAININGS[1] / str(STEPS))
        shutil.rmtree(run / TRAININGS[2])
        shutil.rmtree(run / TRAININGS[3])
        (run / soft_labels.NAME).unlink()
        shutil.rmtree(run / STUDENT)
    else:
        shutil.rmtree(run / STUDENT / str(STEPS))
    train(store, run)
    for name in (*TRAININGS, STUDENT):
        assert state(run, name) == state(complete, name)
    assert said(run)["logits"] == said(complete)["logits"]


def test_each_teacher_architecture_is_compiled_once(complete: pathlib.Path) -> None:
    del complete
    assert [name for name, _ in MADE] == ["teacher1.fold1", "teacher2.fold1", STUDENT]
    assert [step.program._cache_size() for _, step in MADE] == [1, 1, 1]


def test_a_student_before_its_teachers_is_refused_by_the_one_that_lacks(
    complete: pathlib.Path, run: pathlib.Path, store: Store
) -> None:
    (run / soft_labels.NAME).unlink()
    shutil.rmtree(run / STUDENT)
    shutil.rmtree(run / TRAININGS[2] / str(STEPS))
    with pytest.raises(InputError) as refused:
        train(store, run, (STUDENT,))
    said = str(refused.value)
    assert "teacher2.fold1: trained for 2 steps, 4 expected before what comes after it" in said
    assert said.endswith("run --stage=teacher2.fold1 first, or --stage=all")
    assert not (run / soft_labels.NAME).exists()


def resummed(document: dict[str, Any]) -> dict[str, Any]:
    document.pop("sha256", None)
    return document | {"sha256": soft_labels._sum(document)}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"store": "0" * 64}, r"soft labels of another store \(000000000000\) than .*: remove it"),
        ({"teachers": {"teacher1.fold1": "a"}}, "of 1 stage of teachers, and classification has 4"),
        ({"logits": {}}, "0 cases found, and scan-0 is not one of the 7 of training"),
        ({"digest": "b"}, "soft labels of another teacher2.fold2 .*: remove it"),
        ({"damage": True}, r"not soft labels as written \(ValueError\('its sum is another'\)\)"),
    ],
)
def test_soft_labels_of_others_are_refused_in_one_line(
    run: pathlib.Path, store: Store, change: dict[str, Any], expected: str
) -> None:
    document = said(run)
    if "digest" in change:
        document["teachers"]["teacher2.fold2"] = "b" * 64
    elif "damage" not in change:
        document |= change
    document = resummed(document)
    if "damage" in change:
        document["logits"]["scan-0"][0][0] += 1
    (run / soft_labels.NAME).write_text(json.dumps(document))
    shutil.rmtree(run / STUDENT)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"soft_labels": {}}))
    with pytest.raises(InputError, match=expected) as refused:
        train(store, run)
    assert "\n" not in str(refused.value)


def test_a_student_goes_on_with_the_soft_labels_that_it_was_begun_with(
    run: pathlib.Path, store: Store
) -> None:
    document = said(run)
    document["logits"]["scan-0"][0][0] += 1
    (run / soft_labels.NAME).write_text(json.dumps(resummed(document)))
    shutil.rmtree(run / STUDENT / str(STEPS))
    with pytest.raises(InputError, match="not the soft labels that classification was begun with"):
        train(store, run)


def test_processes_of_a_job_must_see_the_same_soft_labels(run: pathlib.Path, store: Store) -> None:
    asked = job.Asked(CONFIG, [], "all", run, run, 0)
    before = job._digests(asked, store)
    (run / soft_labels.NAME).write_text("{}")
    after = job._digests(asked, store)
    assert [name for name in before if before[name] != after[name]] == [soft_labels.NAME]


@pytest.mark.slow
def test_teachers_of_several_runs_are_taken_together(
    complete: pathlib.Path, store: Store, tmp_path: pathlib.Path
) -> None:
    """As a cluster trains them, each in a folder of its own."""
    runs = []
    for name in TRAININGS:
        runs.append(tmp_path / name)
        for file in ("config.json", "run.json"):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(complete / file, tmp_path / name)
        shutil.copytree(complete / name, tmp_path / name / name)
    with pytest.raises(InputError, match=r"none of 2 runs has the stage teacher2\.fold1"):
        workdirs.begin(tmp_path / "none", CONFIG, store, init_from=runs[:2])
    train(store, tmp_path / "student", init_from=runs)
    assert not (tmp_path / "student" / TRAININGS[0]).exists()
    assert state(tmp_path / "student", STUDENT) == state(complete, STUDENT)
    assert said(tmp_path / "student") == said(complete)


def test_a_teacher_predicts_and_is_planned_as_its_own_network(complete: pathlib.Path) -> None:
    teacher, student = (predictor.load(complete, name) for name in (TRAININGS[2], None))
    assert "gate" not in teacher.variables
    assert "gate" in student.variables
    assert student.stage.name == STUDENT
    assert teacher.network.digest != student.network.digest
    volume = np.random.default_rng(0).uniform(size=(1, 32, 32)).astype(np.float32)
    assert teacher(volume).notes == ()
    assert student(volume).notes[0].startswith("gate: ")
    system = build(CONFIG, "cpu")
    mesh = device_mesh.make_mesh(CONFIG.platform, jax.devices()[:1])
    programs = [
        str(compiled.trace(system, name, mesh, 2, 1).jaxpr) for name in ("teacher1.fold2", STUDENT)
    ]
    assert programs[0] != programs[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"teachers": 5}, "teachers is 5: give 0 to 4"),
        ({"teacher_folds": 1}, "teacher_folds is 1: give 2 or more"),
        ({"distillation_weight": 1.5}, "distillation_weight is 1.5: it is a share"),
        ({"distillation_temperature": 0.0}, "distillation_temperature is 0: it must be above 0"),
        (
            {"teachers": 1, "published_widths": (8, 8), "published_blocks": (1, 1)},
            r"published_widths is \(8, 8\) and teachers is 1: their networks have 4 groups",
        ),
    ],
)
def test_impossible_distillation_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cnncf.Options(**options).check(DATA, PlatformConfig())


def test_more_folds_than_patients_are_refused(store: Store) -> None:
    with pytest.raises(InputError, match=r"fold 1 of 8: the training split has 7 patients: give"):
        store.of_fold(0, 8, held_out=False)


def test_a_student_without_its_weight_is_taught_nothing() -> None:
    """At a weight of 0 the loss is that of the hard labels."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32))
    label, weights = jnp.asarray([0, 1, 1, 0]), jnp.ones(2)
    assert isinstance(CONFIG.model, cnncf.Options)
    for weight, same in ((0.0, True), (0.5, False)):
        options = dataclasses.replace(CONFIG.model, variant="published", distillation_weight=weight)
        config = dataclasses.replace(CONFIG, model=options)
        out = {"logits": logits[0]}
        alone, _ = network.losses(config, out, {}, label, weights)
        taught, _ = network.losses(config, out, {}, label, weights, logits[1:].transpose(1, 0, 2))
        assert np.allclose(alone["loss"], taught["loss"]) == same
        for terms in (alone, taught):
            added = sum(network.weighted(options, terms).values())
            np.testing.assert_allclose(np.asarray(added), terms["loss"], rtol=1e-6)


@pytest.mark.parametrize("is_open", [False, True])
def test_what_the_terms_add_is_the_loss(is_open: bool) -> None:
    """Of the paper's variant: soft labels count while the gate is open."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 2)).astype(np.float32)
    out = {"stage1_logits": logits[0], "stage2_logits": logits[1], "open": np.asarray(is_open)}
    label, weights = jnp.asarray([0, 1, 1, 0]), jnp.ones(2)
    assert isinstance(CONFIG.model, cnncf.Options)
    carried = {gate.COLLECTION: gate.shut()}
    soft = jnp.asarray(rng.normal(size=(4, 2, 2)).astype(np.float32))
    terms, _ = network.losses(CONFIG, out, carried, label, weights, soft)
    assert (np.asarray(terms["distillation"]) > 0).all() == is_open
    added = sum(network.weighted(CONFIG.model, terms).values())
    np.testing.assert_allclose(np.asarray(added), terms["loss"], rtol=1e-6)
