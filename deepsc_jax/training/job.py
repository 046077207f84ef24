"""A training as one job of one or many processes: what comes before the loop, and after it."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from deepsc_jax.config import Config
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.thresholds import settle_threshold
from deepsc_jax.runtime import cluster, device_mesh, failures
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import require_writable
from deepsc_jax.runtime.lock import Lock, is_seen, locked
from deepsc_jax.runtime.output import tell
from deepsc_jax.runtime.signals import signals
from deepsc_jax.systems.building import build, stages_of
from deepsc_jax.systems.system import Stage
from deepsc_jax.training import loop, soft_labels
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.pretrained import Taken


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a job is asked for.

    Attributes:
      config: of the run.
      flags: that describe it, as a command takes them.
      stage: which stages to run: `all`, or one by name.
      data_dir: where the store is.
      workdir: where checkpoints and logs go.
      step_timeout: the seconds after which a step that has not ended hangs; 0 for ever.
      init_from: the folders of runs whose pre-trainings take the place of this one's.
      profile: the first and the last step of each stage that are traced.
    """

    config: Config
    flags: Sequence[str]
    stage: str
    data_dir: pathlib.Path
    workdir: pathlib.Path
    step_timeout: float
    init_from: tuple[pathlib.Path, ...] = ()
    profile: tuple[int, int] | None = None


def run(
    asked: Asked, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> int:
    """Be a process of the job that `cluster.job` joins; returns the exit code."""
    stages = stages_of(asked.config, asked.stage)
    if coordinator is None and cluster.launched() == 1:
        device_mesh.use_cpu_cores(asked.config.platform, [stage.batch for stage in stages])
    with cluster.job(coordinator, num_processes, process_id):
        return train(asked, stages)


def train(asked: Asked, stages: tuple[Stage, ...]) -> int:
    """Run `stages`, as one of the processes of the job."""
    config, workdir = asked.config, asked.workdir
    writer = cluster.is_writer()
    locks: list[Lock] = []  # of the writer
    with failures.below(workdir), contextlib.ExitStack() as held:

        def begin() -> Store:
            if writer:
                require_writable("workdir", workdir)
                locks.append(held.enter_context(locked(workdir, "training")))
            settings = config.train
            folder = asked.data_dir / "store"
            return Store(folder, config.data, settings.cache_mib, fold=settings.folds)

        store = cluster.together(begin)
        cluster.require_same(_digests(asked, store))
        _require_one_folder(workdir, locks)
        record = cluster.together(
            lambda: workdirs.begin(
                workdir, config, store, writer=writer, longer=True, init_from=asked.init_from
            )
        )
        return _train(asked, store, _own(asked, stages, record), locks, record.init_from)


def _own(asked: Asked, stages: tuple[Stage, ...], record: workdirs.Record) -> tuple[Stage, ...]:
    """Those of `stages` that are trained here, and a line of each that is another run's.

    Raises:
      InputError: none is.
    """
    taken = record.init_from
    own = tuple(stage for stage in stages if stage.name not in taken)
    if not own:
        raise InputError(
            f"--stage={asked.stage}: that stage is taken from --init_from={_names(asked)}, and "
            "is not trained: give the one that starts from it, or all"
        )
    for name, of in taken.items() if cluster.is_writer() else ():
        where = "" if of.store == record.store else ", trained on another store"
        tell(f"{name}: taken from {of.run}, step {of.step}{where}")
    return own


def _names(asked: Asked) -> str:
    """The folders of `--init_from`, as the flag has them."""
    return ",".join(map(str, asked.init_from))


def _require_one_folder(workdir: pathlib.Path, locks: list[Lock]) -> None:
    """Refuse a `--workdir` that is not the same folder for all processes of the job.

    Raises:
      InputError: in all of them.
    """
    said = hashlib.sha256(b"".join(lock.content for lock in locks)).digest()
    expected = cluster.by_process(np.frombuffer(said, np.uint8)).reshape(-1, len(said))[0].tobytes()

    def look() -> None:
        if not (locks or is_seen(workdir, expected)):
            raise InputError(
                f"--workdir: {workdir} is not the folder that process 0 writes to: give all "
                "processes one folder, on a disk that all of them see"
            )

    cluster.together(look)


def _digests(asked: Asked, store: Store) -> dict[str, str]:
    """What must be the same in all processes of a job, by flag or name, as SHA-256."""
    given = dict(flag.split("=", 1) for flag in asked.flags)
    given |= {name: importlib.metadata.version(name) for name in ("deepsc_jax", "jax", "jaxlib")}
    given |= cluster.numerics()
    given |= {"--stage": asked.stage, "--data_dir's store": store.digest}
    given |= {"--init_from": _names(asked)}
    given |= {soft_labels.NAME: soft_labels.digest(asked.workdir / soft_labels.NAME)}
    return {name: cluster.digest(value) for name, value in given.items()}


def _train(
    asked: Asked,
    store: Store,
    stages: tuple[Stage, ...],
    locks: Sequence[Lock],
    taken: Mapping[str, Taken],
) -> int:
    workdir = asked.workdir
    writer = cluster.is_writer()

    def require_held() -> None:
        for lock in locks:
            lock.require()

    system, timeout = build(asked.config), asked.step_timeout
    if not loop.train(system, store, workdir, stages, timeout, require_held, taken, asked.profile):
        return signals.code
    for stage in stages:
        if "lesions" not in stage.learns:
            continue
        require_held()
        with signals.during(f"the choice of a threshold for {stage.name}"):
            threshold = settle_threshold(workdir, stage.name, store)
        if threshold is not None and writer:
            tell(
                f"{stage.name}: lesion threshold {threshold:g}: best on validation, on the scans' "
                "own grids"
            )
    if writer:
        tell(f"trained: checkpoints in {workdir}, curves in {workdir / 'metrics.jsonl'}")
    return 0
