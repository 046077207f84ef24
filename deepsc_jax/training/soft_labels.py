"""What a stage's teachers, stages before it, say of the training cases: its soft labels.

A teacher has a stage for each fold of the training split, and of each case the one answers that has
not seen it: by running statistics, of the image as it is, once. In a run's folder:

    soft_labels.json    digest of the store; by teacher's stage, that of the checkpoint that
                        answered; by case, a row of logits a teacher; and the sum of all that
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from deepsc_jax.data import pipeline
from deepsc_jax.runtime import cluster
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_json
from deepsc_jax.runtime.names import counted
from deepsc_jax.runtime.signals import signals
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.systems.system import Stage, Variables
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.stage import Run, kept, of_stage, trained
from deepsc_jax.training.step import make_eval_step
from deepsc_jax.training.validation import answers

NAME = "soft_labels.json"
REMOVE = "remove it, and the teachers are asked anew"
SoftLabels = Mapping[str, np.ndarray]


def settle(run: Run, stage: Stage) -> SoftLabels:
    """The logits (teacher, class) of every training case, from `NAME`, which is made if need be.

    In every process of a job alike. A stage that goes on gets what it was begun with.

    Raises:
      InputError: a teacher is not trained to its end, or the file is damaged, of another store or
        of other teachers, or another one than the stage was begun with.
    """
    path = run.workdir / NAME
    # Process 0 decides: another may look after it has been written.
    there = cluster.by_process(np.asarray(path.exists())).reshape(-1)[0]
    if not there:
        run.log.say(f"{stage.name}: asking its teachers for soft labels")
        with signals.during(f"the soft labels of {stage.name}"):
            document = _asked(run, stage)
        if cluster.is_writer():
            run.require_held()
            write_json(document, path)
        cluster.wait_for_all(f"soft labels of {stage.name} written")
    found, learnt = cluster.together(lambda: _read(path, run, stage))
    if cluster.is_writer():
        workdirs.save_soft_labels(run.workdir, stage.name, learnt)
    return found


def digest(path: pathlib.Path) -> str:
    """The SHA-256 of a file of soft labels; of nothing where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # who reads it says it
        return hashlib.sha256().hexdigest()


def _asked(run: Run, stage: Stage) -> JsonObject:
    """The document, by the teachers' checkpoints."""
    rows: dict[str, list[list[float]]] = {case.name: [] for case in run.store.cases("train")}
    digests = {}
    for teacher in stage.taught_by:
        for name in teacher:
            variables, checkpoint = trained(run, name), kept(run, name)
            assert checkpoint is not None
            digests[name] = checkpoint.digest
            for case, logits in _held_out(run, run.system.stage(name), variables).items():
                rows[case].append([float(x) for x in logits])
    document: JsonObject = {"store": run.store.digest, "teachers": digests, "logits": rows}
    return document | {"sha256": _sum(document)}


def _held_out(run: Run, stage: Stage, variables: Variables) -> dict[str, np.ndarray]:
    """The logits of the cases that a teacher's stage has not seen, by name."""
    assert stage.fold is not None
    of_teacher, store = of_stage(run, stage), run.store.of_fold(*stage.fold, held_out=True)
    system, count = of_teacher.system, jax.process_count()
    batches = pipeline.batches(
        store,
        "train",
        stage.reads,
        system.config,
        seed=0,  # nothing is drawn
        batch_size=stage.batch // count,
        train=False,
        process_index=jax.process_index(),
        process_count=count,
    )
    measure = run.programs.once(
        of_teacher, stage, "held out", lambda: make_eval_step(system, stage, run.mesh)
    )
    cases = store.cases("train")
    said: dict[str, np.ndarray] = {}
    for rows in answers(run.mesh, iter(batches), measure, variables):
        names = [cases[i].name for i in rows["case"]]
        said |= dict(zip(names, rows["logits"], strict=True))
    return said


def _read(path: pathlib.Path, run: Run, stage: Stage) -> tuple[SoftLabels, str]:
    """The logits of the file at `path`, checked, and their digest, whoever gave them."""
    try:
        document = json.loads(path.read_text("utf-8"))
        if document.pop("sha256") != _sum(document):
            raise ValueError("its sum is another")
        store, teachers = str(document["store"]), document["teachers"]
        teachers = {str(name): str(of) for name, of in teachers.items()}
        logits = document["logits"]
        found = {case: np.asarray(rows, np.float32) for case, rows in logits.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not soft labels as written ({error!r:.80}): {REMOVE}") from error
    if store != run.store.digest:
        raise InputError(
            f"{path}: soft labels of another store ({store:.12}) than {run.store.path} "
            f"({run.store.digest:.12}): {REMOVE}"
        )
    _require_teachers(path, run, stage, teachers)
    cases = {case.name for case in run.store.cases("train")}
    shape = (len(stage.taught_by), len(run.system.config.data.classes))
    wrong = {name for name in cases if name in found and found[name].shape != shape}
    if wrong or cases != found.keys():
        named = min(wrong or cases ^ found.keys())
        raise InputError(
            f"{path}: {counted(len(found), 'case')} found, and {named} is not one of the "
            f"{len(cases)} of training, of {shape[0]} x {shape[1]} logits each: {REMOVE}"
        )
    learnt = _sum(logits)
    begun_with = workdirs.read(run.workdir).soft_labels.get(stage.name, learnt)
    if begun_with != learnt:
        raise InputError(
            f"{path}: not the soft labels that {stage.name} was begun with, whose digest is "
            f"{begun_with:.12}: put them back, or begin another --workdir"
        )
    return found, learnt


def _require_teachers(
    path: pathlib.Path, run: Run, stage: Stage, teachers: Mapping[str, str]
) -> None:
    """Refuse what others said than the stage's teachers, as far as these are here."""
    names = [name for teacher in stage.taught_by for name in teacher]
    if set(names) != teachers.keys():
        raise InputError(
            f"{path}: of {counted(len(teachers), 'stage')} of teachers, and {stage.name} has "
            f"{len(names)}: {REMOVE}"
        )
    for name in names:
        checkpoint = kept(run, name)
        if checkpoint is not None and checkpoint.digest != teachers[name]:
            raise InputError(
                f"{path}: soft labels of another {name} ({teachers[name]:.12}) than the one in "
                f"{checkpoint.folder} ({checkpoint.digest:.12}): {REMOVE}"
            )


def _sum(document: JsonObject) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
