"""Train a network: `python -m deepsc_jax.train --flagfile=... --data_dir=DIR --workdir=DIR`.

On many hosts, started once per process (launch/ has scripts): the folders are on a disk that all of
them see, process 0 writes and prints, and where one process dies all end. On SIGTERM the job saves
at a step that all processes agree on and exits with 75 (`entry.PREEMPTED`). However it ended, the
same command goes on from the last checkpoint, to the same parameters bit by bit, or on another
number of devices or processes from the same step (see `data/pipeline.py` for the data's order).
"""

import pathlib

from absl import flags

from deepsc_jax.config import Config
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.thresholds import settle_threshold
from deepsc_jax.models import registry
from deepsc_jax.runtime import cluster, device_mesh, entry
from deepsc_jax.systems.building import build, stages_of
from deepsc_jax.systems.system import Stage
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

CONFIG = registry.config_flags()


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    cluster.define_flags()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string(
        "workdir", None, "Where checkpoints and logs go; a stopped run goes on.", required=True
    )
    flags.DEFINE_string("stage", "all", "Stage to run, by name; all runs them in order.")


def main() -> int:
    """Run the stages that the flags name."""
    options, config = flags.FLAGS, CONFIG.config()
    stages = stages_of(config, options.stage)
    if options.coordinator is None and cluster.launched() == 1:
        device_mesh.use_cpu_cores(config.platform, [stage.batch for stage in stages])
    with cluster.job(options.coordinator, options.num_processes, options.process_id):
        return train(config, stages)


def train(config: Config, stages: tuple[Stage, ...]) -> int:
    """Run `stages`, as one of the processes of the job."""
    workdir = pathlib.Path(flags.FLAGS.workdir)
    store = Store(pathlib.Path(flags.FLAGS.data_dir) / "store", config.data, config.train.cache_mib)
    writer = cluster.is_writer()
    workdirs.begin(workdir, config, store, writer=writer)
    if not loop.train(build(config), store, workdir, stages):
        return entry.PREEMPTED
    for stage in stages:
        segments = "lesions" in stage.learns
        threshold = settle_threshold(workdir, stage.name, store) if segments else None
        if threshold is not None and writer:
            print(
                f"{stage.name}: lesion threshold {threshold:g}: best on validation, on the scans' "
                "own grids"
            )
    if writer:
        print(f"trained: checkpoints in {workdir}, curves in {workdir / 'metrics.jsonl'}")
    return 0


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, CONFIG.parse, trains=True)


if __name__ == "__main__":
    run()
