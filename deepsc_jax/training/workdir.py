"""What a training run's folder says of itself.

WORKDIR is what `--workdir` names:

    WORKDIR/config.json    the configuration
    WORKDIR/run.json       what it is trained on, whose statistics normalised its batches, whether
                           scans were one tile each, the lesion thresholds of its stages, the
                           checkpoints of other runs that it started from, and digests of the soft
                           labels that stages learn
    WORKDIR/STAGE          the stage's checkpoints
    WORKDIR/soft_labels.json    what teachers say of the training cases (`soft_labels`)
    WORKDIR/metrics.jsonl  what was logged; tensorboard/ holds also what a resumed run took again
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from deepsc_jax.config import Config
from deepsc_jax.config.run import load, save
from deepsc_jax.data.buckets import tile_covers
from deepsc_jax.data.store import Store
from deepsc_jax.models import registry
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_json
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.training import checksums
from deepsc_jax.training.pretrained import Taken, take
from deepsc_jax.training.resuming import settle


@dataclasses.dataclass(frozen=True)
class Record:
    """A run's folder, read.

    Attributes:
      config: of the run.
      trained_on: `Store.contents`, or `unknown data` where the weights came from elsewhere;
        whatever it says of a scan, says so too.
      store: digest of the store it is trained on; empty where the weights came from elsewhere.
      thresholds: by stage, the lesion probability from which a voxel is lesion.
      batch_norm: whose statistics batch norms took in training.
      whole_scans: whether a tile held every training scan: a deeper scan is one deeper tile then.
      init_from: by stage, the checkpoints of another run that later stages start from.
      soft_labels: by stage, the digest of those that it learns.
    """

    config: Config
    trained_on: str
    store: str
    thresholds: dict[str, float]
    batch_norm: str = "global"
    whole_scans: bool = False
    init_from: dict[str, Taken] = dataclasses.field(default_factory=dict)
    soft_labels: dict[str, str] = dataclasses.field(default_factory=dict)


def begin(
    workdir: pathlib.Path,
    config: Config,
    store: Store,
    *,
    writer: bool = True,
    longer: bool = False,
    init_from: Sequence[pathlib.Path] = (),
) -> Record:
    """Note what a run computes, and on what; a run that was begun goes on if both are the same.

    Args:
      workdir: of the run.
      config: of the run; what may be another than before, `resuming.settle` says.
      store: the scans.
      writer: of the processes of a job one is; the others only look whether they may go on.
      longer: whether stages may have more steps than before.
      init_from: the folders of the runs whose pre-trainings are taken (`pretrained.take`): once,
        when a run is begun. They must be the same when it goes on.

    Returns:
      The run's record.

    Raises:
      InputError: the folder holds a run of another model, of other settings, or on another store,
        or checkpoints of a run that it does not say; one with local batch norms on another
        number of devices; or one from other pre-trainings.
    """
    norms = _norms(config)
    if (workdir / "config.json").exists():
        begun = read(workdir)
        if begun.config.name != config.name:
            raise InputError(
                f"{workdir / 'config.json'}: a run of --model={begun.config.name} is here, and "
                f"--model={config.name} was asked for: give another --workdir, or its flag file "
                "to go on"
            )
        lengthened = settle(workdir, begun.config, config, longer=longer, say=writer)
        if begun.store != store.digest:
            raise InputError(
                f"{workdir / 'run.json'}: the run was begun on another store than {store.path}: "
                "give another folder, or the same --data_dir to go on"
            )
        if begun.batch_norm != norms:
            raise InputError(
                f"{workdir / 'run.json'}: the run was begun with batch norms {begun.batch_norm}, "
                f"and here they would be {norms}: give --data_devices as then, or another folder"
            )
        _require_same_source(workdir, begun, init_from)
        # One of a stage that goes on is chosen anew at its end.
        thresholds = {k: v for k, v in begun.thresholds.items() if k not in lengthened}
        record = dataclasses.replace(begun, config=config, thresholds=thresholds)
    elif kept := _stages_saved(workdir):
        raise InputError(
            f"{workdir}: checkpoints of {', '.join(kept)}, and no config.json that says what they "
            "are of: copy the whole folder of their run, or name another folder"
        )
    else:
        whole = tile_covers(config.data, store.cases("train"))
        record = Record(config, store.contents, store.digest, {}, norms, whole)
        if init_from:
            record = _started(record, [run.resolve() for run in init_from])
    if writer:
        write(workdir, record)
    return record


def _started(record: Record, runs: Sequence[pathlib.Path]) -> Record:
    """The record of a run that starts from the pre-trainings of those in the folders `runs`."""
    for run in runs:
        if not (run / "config.json").is_file():
            raise InputError(
                f"--init_from={run}: no config.json found: give the --workdir of a training run"
            )
    records = {run: read(run) for run in runs}
    theirs = {run: (of.config, of.store) for run, of in records.items()}
    taken = take(theirs, record.config, record.store)
    trained_on = record.trained_on
    others = dict.fromkeys(of.trained_on for of in records.values())
    others.pop(trained_on, None)
    if others:
        trained_on = f"{trained_on}, pre-trained on {' and '.join(others)}"
    return dataclasses.replace(record, trained_on=trained_on, init_from=taken)


def _require_same_source(
    workdir: pathlib.Path, begun: Record, init_from: Sequence[pathlib.Path]
) -> None:
    then = sorted({taken.run for taken in begun.init_from.values()})
    if not set(then) <= {str(run.resolve()) for run in init_from} or bool(then) != bool(init_from):
        flag = f"with --init_from={','.join(then)}" if then else "without --init_from"
        raise InputError(
            f"{workdir / 'run.json'}: the run was begun {flag}: give the same to go on, or another "
            "--workdir"
        )


def _norms(config: Config) -> str:
    """What the record says of batch norms: with local ones a result depends on the devices."""
    if config.train.batch_norm == "global":
        return "global"
    devices, _ = device_mesh.make_mesh(config.platform).devices.shape
    return f"local, by the scans of each of {devices} device{'s' * (devices > 1)}"


def _stages_saved(workdir: pathlib.Path) -> list[str]:
    """The stages with complete checkpoints."""
    saved = [sums.parent for sums in workdir.glob(f"*/*/{checksums.SUMS}")]
    return sorted({step.parent.name for step in saved if step.name.isdecimal()})


def write(workdir: pathlib.Path, record: Record) -> None:
    """Write a run's record into its folder."""
    workdir.mkdir(parents=True, exist_ok=True)
    facts = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    del facts["config"]
    facts["init_from"] = {stage: dataclasses.asdict(of) for stage, of in record.init_from.items()}
    write_json(facts, workdir / "run.json")
    save(record.config, workdir / "config.json")


def read(workdir: pathlib.Path) -> Record:
    """The record of a run.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    if not (workdir / "config.json").is_file():
        raise InputError(
            f"{workdir}: no config.json found: give --checkpoint the --workdir of a training run"
        )
    config, path = load(workdir / "config.json", registry.options), workdir / "run.json"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no file of that name")
        facts: JsonObject = json.loads(path.read_text("utf-8"))
        thresholds = {stage: float(value) for stage, value in facts["thresholds"].items()}
        if not all(0 <= value <= 1 for value in thresholds.values()):
            raise ValueError(f"thresholds are probabilities, {thresholds} found")
        texts = {name: facts[name] for name in ("trained_on", "store", "batch_norm")}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(f"{name} is a text, {text!r} found")
        trained_on, digest, norms = texts.values()
        whole = facts["whole_scans"]
        if not isinstance(whole, bool):
            raise TypeError(f"whole_scans is true or false, {whole!r:.40} found")
        taken = {stage: Taken(**of_stage) for stage, of_stage in facts["init_from"].items()}
        labels = {stage: str(of_stage) for stage, of_stage in facts.get("soft_labels", {}).items()}
        return Record(config, trained_on, digest, thresholds, norms, whole, taken, labels)
    except (
        OSError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InputError(
            f"{path}: not the record of a run ({error!r}): copy the whole folder of the run"
        ) from error


def save_threshold(workdir: pathlib.Path, stage: str, threshold: float) -> None:
    """Note the lesion threshold of a stage."""
    record = read(workdir)
    thresholds = record.thresholds | {stage: threshold}
    write(workdir, dataclasses.replace(record, thresholds=thresholds))


def save_soft_labels(workdir: pathlib.Path, stage: str, digest: str) -> None:
    """Note which soft labels a stage learns."""
    record = read(workdir)
    if record.soft_labels.get(stage) != digest:
        labels = record.soft_labels | {stage: digest}
        write(workdir, dataclasses.replace(record, soft_labels=labels))
