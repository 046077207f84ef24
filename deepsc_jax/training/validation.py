"""Validation on the working grid, which decides what checkpoint is the best."""

import collections
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.data.store import Store
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.system import Batch, Stage, System, Variables
from deepsc_jax.training.logs import MetricsLog
from deepsc_jax.training.step import WATCHED
from deepsc_jax.training.watch import strip

FACTS = ("valid", "case", "label")
SHOWN = 4  # scans of which pictures are kept, spread over the split
Record = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
      record: `System.record`, which decides what checkpoint is the best.
      figures: the means of what is watched besides.
      pictures: of some scans, what is shown of each, by the number of the case in the split.
    """

    record: Record
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    pictures: dict[int, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)


def validate(
    system: System,
    stage: Stage,
    mesh: Mesh,
    batches: Iterator[dict[str, np.ndarray]],
    measure: Callable[[Variables, Batch], Batch],
    variables: Variables,
    stop: Callable[[], bool],
    voxel_ml: np.ndarray | None = None,
) -> Validation | None:
    """What `System.record` says of all scans of `batches`, whichever process reads them.

    Args:
      system: whose record it is.
      stage: of the system.
      mesh: over which batches are split.
      batches: this process's share of an evaluation.
      measure: of `step.make_eval_step`.
      variables: the network's.
      stop: asked after every batch, by all processes; then there is no record.
      voxel_ml: of every case, where `measure` gives what is watched as well; else None.
    """
    shown = set() if voxel_ml is None else _spread(len(voxel_ml))
    pictures: dict[int, dict[str, np.ndarray]] = collections.defaultdict(dict)
    rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    if voxel_ml is not None:
        batches = (batch | {"voxel_ml": voxel_ml[batch["case"]]} for batch in batches)
    for measured in answers(mesh, batches, measure, variables):
        for name, values in measured.items():
            if not name.startswith(WATCHED) or values.ndim == 1:
                rows[name].append(values)
                continue
            for case, picture in zip(measured["case"], values, strict=True):
                if int(case) in shown:
                    pictures[int(case)][name.removeprefix(WATCHED)] = picture
        if stop():
            return None
    whole = {name: np.concatenate(values) for name, values in rows.items()}
    order = np.argsort(whole["case"])  # the processes' number must not move a sum's last digit
    ordered = {name: values[order] for name, values in whole.items()}
    watched = {name: ordered.pop(name) for name in list(ordered) if name.startswith(WATCHED)}
    figures = {
        name.removeprefix(WATCHED): float(np.nanmean(values))
        for name, values in watched.items()
        if not np.isnan(values).all()
    }
    return Validation(system.record(stage, ordered), figures, dict(pictures))


def _spread(count: int) -> set[int]:
    return {int(i) for i in np.linspace(0, count - 1, min(SHOWN, count)).round()}


def answers(
    mesh: Mesh,
    batches: Iterator[dict[str, np.ndarray]],
    measure: Callable[[Variables, Batch], Batch],
    variables: Variables,
) -> Iterator[dict[str, np.ndarray]]:
    """What `measure` gives of each batch's scans, whichever process reads them, and `FACTS`."""
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name not in ("valid", "case")}
        measured = jax.device_get(
            measure(variables, device_mesh.put_batch(inputs, mesh, DEPTH_AXES))
        )
        # The results are those of all processes' scans, and this process has read its own only.
        facts = {name: batch[name] for name in FACTS}
        measured |= device_mesh.whole_batch(facts, mesh)
        valid = measured["valid"]
        yield {name: values[valid] for name, values in measured.items()}


def check_split(store: Store, stage: Stage) -> None:
    """Refuse a validation split that cannot tell a better checkpoint of the stage from a worse.

    Raises:
      InputError: it has no scan with a lesion, or of one class only, where the stage learns these.
    """
    cases, lacking = store.cases("validation"), []
    if not cases:
        return
    if "lesions" in stage.learns and not any(c.lesions_known and c.lesion_voxels for c in cases):
        lacking.append("no scan with a lesion, at least 1")
    if "classes" in stage.learns and len({case.label for case in cases}) < 2:
        lacking.append("scans of one class, at least 2 classes")
    if lacking:
        raise InputError(
            f"{store.path}: split validation has {lacking[0]} expected to choose the best "
            f"checkpoint of the {stage.name} stage: add one, or leave validation empty"
        )


def log_validation(
    log: MetricsLog, store: Store, stage: Stage, step: int, found: Validation
) -> None:
    """Log a validation: its figures, its pictures, and a line."""
    known = {name: value for name, value in found.record.items() if value is not None}
    logged = found.figures | known
    log.write(stage.name, step, {f"validation_{k}": v for k, v in logged.items()})
    cases = store.cases("validation")
    pictures = {cases[i].name: strip(of_case) for i, of_case in found.pictures.items()}
    log.show(stage.name, step, pictures)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in known.items())
    log.say(f"{stage.name} {step}/{stage.steps}  validation  {shown}")
