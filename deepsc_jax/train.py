"""Train a network: `python -m deepsc_jax.train --flagfile=... --data_dir=DIR --workdir=DIR`.

On many hosts, started once per process (launch/ has scripts): the folders are on a disk that all of
them see, process 0 writes and prints, and where one process dies all end. On SIGTERM or Ctrl-C the
job saves at a step that all processes agree on and exits with 75 or 130 (docs/exit-codes.md).
However it ended, the same command goes on from the last checkpoint, to the same parameters bit by
bit, or on another number of devices or processes from the same step (see `data/pipeline.py` for the
data's order).
"""

from deepsc_jax.runtime.signals import signals

if __name__ == "__main__":
    signals.listen()  # before the imports below, which take seconds

import contextlib
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from deepsc_jax.config import Config
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.thresholds import settle_threshold
from deepsc_jax.models import registry
from deepsc_jax.runtime import cluster, device_mesh, entry, failures
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, require_writable
from deepsc_jax.runtime.lock import Lock, is_seen, locked
from deepsc_jax.runtime.output import tell
from deepsc_jax.systems.building import build, stages_of
from deepsc_jax.systems.system import Stage
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

CONFIG = registry.config_flags()
MOST_SECONDS = 1e8


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    cluster.define_flags()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string(
        "workdir", None, "Where checkpoints and logs go; a stopped run goes on.", required=True
    )
    flags.DEFINE_string("stage", "all", "Stage to run, by name; all runs them in order.")
    flags.DEFINE_float(
        "step_timeout",
        3600.0,
        "Seconds after which a step that has not ended hangs: the job ends, to be started again; "
        "compiling and validating do not count. 0 waits for ever.",
    )
    flags.register_validator(
        "step_timeout",
        lambda seconds: 0 <= seconds <= MOST_SECONDS,  # and a number
        f"expected seconds, at most {MOST_SECONDS:g}; 0 waits for ever",
    )


def main() -> int:
    """Run the stages that the flags name."""
    options, config = flags.FLAGS, CONFIG.config()
    local_path("workdir", options.workdir)
    local_path("data_dir", options.data_dir)
    stages = stages_of(config, options.stage)
    if options.coordinator is None and cluster.launched() == 1:
        device_mesh.use_cpu_cores(config.platform, [stage.batch for stage in stages])
    with cluster.job(options.coordinator, options.num_processes, options.process_id):
        return train(config, stages)


def train(config: Config, stages: tuple[Stage, ...]) -> int:
    """Run `stages`, as one of the processes of the job."""
    workdir = local_path("workdir", flags.FLAGS.workdir)
    writer = cluster.is_writer()
    locks: list[Lock] = []  # of the writer
    with failures.below(workdir), contextlib.ExitStack() as held:

        def begin() -> Store:
            if writer:
                require_writable("workdir", workdir)
                locks.append(held.enter_context(locked(workdir, "training")))
            folder = local_path("data_dir", flags.FLAGS.data_dir) / "store"
            settings = config.train
            return Store(folder, config.data, settings.cache_mib, fold=settings.folds)

        store = cluster.together(begin)
        cluster.require_same(_digests(config, store))
        _require_one_folder(workdir, locks)
        cluster.together(lambda: workdirs.begin(workdir, config, store, writer=writer))
        return _train(config, store, workdir, stages, locks)


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


def _digests(config: Config, store: Store) -> dict[str, str]:
    """What must be the same in all processes of a job, by flag or name, as SHA-256."""
    given = dict(flag.split("=", 1) for flag in CONFIG.flags(config))
    given |= {name: importlib.metadata.version(name) for name in ("deepsc_jax", "jax", "jaxlib")}
    given |= cluster.numerics()
    given |= {"--stage": flags.FLAGS.stage, "--data_dir's store": store.digest}
    return {name: cluster.digest(value) for name, value in given.items()}


def _train(
    config: Config,
    store: Store,
    workdir: pathlib.Path,
    stages: tuple[Stage, ...],
    locks: Sequence[Lock],
) -> int:
    writer = cluster.is_writer()

    def require_held() -> None:
        for lock in locks:
            lock.require()

    timeout = flags.FLAGS.step_timeout
    if not loop.train(build(config), store, workdir, stages, timeout, require_held):
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


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, CONFIG.parse, trains=True)


if __name__ == "__main__":
    run()
