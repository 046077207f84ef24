"""Validation on the working grid, which decides what checkpoint is the best."""

import collections
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.data.store import Store
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.system import Batch, Stage, System, Variables

FACTS = ("valid", "case", "label")
Record = dict[str, float | None]


def validate(
    system: System,
    stage: Stage,
    mesh: Mesh,
    batches: Iterator[dict[str, np.ndarray]],
    measure: Callable[[Variables, Batch], Batch],
    variables: Variables,
    stop: Callable[[], bool],
) -> Record | None:
    """What `System.record` says of all scans of `batches`, whichever process reads them.

    Args:
      system: whose record it is.
      stage: of the system.
      mesh: over which batches are split.
      batches: this process's share of an evaluation.
      measure: of `step.make_eval_step`.
      variables: the network's.
      stop: asked after every batch, by all processes; then there is no record.
    """
    rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name not in ("valid", "case")}
        measured = jax.device_get(
            measure(variables, device_mesh.put_batch(inputs, mesh, DEPTH_AXES))
        )
        # The results are those of all processes' scans, and this process has read its own only.
        facts = {name: batch[name] for name in FACTS}
        measured |= device_mesh.whole_batch(facts, mesh)
        for name, values in measured.items():
            rows[name].append(values[measured["valid"]])
        if stop():
            return None
    whole = {name: np.concatenate(values) for name, values in rows.items()}
    order = np.argsort(whole["case"])  # the processes' number must not move a sum's last digit
    return system.record(stage, {name: values[order] for name, values in whole.items()})


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
