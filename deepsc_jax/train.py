"""Train DeepSC-COVID: `python -m deepsc_jax.train --flagfile=... --data_dir=DIR --workdir=DIR`.

On many hosts, started once per process (launch/ has scripts): the folders are on a disk that all of
them see, process 0 writes and prints, and where one process dies all end. On SIGTERM the job saves
at a step that all processes agree on and exits with 75 (`program.PREEMPTED`). However it ended, the
same command goes on from the last checkpoint, to the same parameters bit by bit, or on another
number of devices or processes from the same step (see `data/pipeline.py` for the data's order).
"""

import pathlib

from absl import flags

from deepsc_jax.config import STAGES, Config, Stage
from deepsc_jax.data.store import Store
from deepsc_jax.evaluate import settle_threshold
from deepsc_jax.runtime import cluster, device_mesh, entry
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

entry.define_config_flags()
entry.define_cluster_flags()
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and logs go; a stopped run resumes from it.", required=True
)
STAGE = flags.DEFINE_enum("stage", "all", ["all", *STAGES], "Stage to run; all runs them in order.")


def main() -> int:
    """Run the stages that the flags name."""
    options = flags.FLAGS
    settings = entry.config_from_flags()
    stages: tuple[Stage, ...] = tuple(stage for stage in STAGES if STAGE.value in ("all", stage))
    if options.coordinator is None and cluster.launched() == 1:
        device_mesh.use_cpu_cores(settings, stages)
    with cluster.job(options.coordinator, options.num_processes, options.process_id):
        return train(settings, stages)


def train(settings: Config, stages: tuple[Stage, ...]) -> int:
    """Run `stages`, as one of the processes of the job."""
    workdir = pathlib.Path(WORKDIR.value)
    store = Store(pathlib.Path(DATA_DIR.value) / "store", settings.data, settings.train.cache_mib)
    writer = cluster.is_writer()
    workdirs.begin(workdir, settings, store, writer=writer)
    if not loop.train(settings, store, workdir, stages):
        return entry.PREEMPTED
    for stage in stages:
        threshold = settle_threshold(workdir, stage, store) if stage != "classification" else None
        if threshold is not None and writer:
            print(
                f"{stage}: lesion threshold {threshold:g}: best on validation, on the scans' own "
                "grids"
            )
    if writer:
        print(f"trained: checkpoints in {workdir}, curves in {workdir / 'metrics.jsonl'}")
    return 0


if __name__ == "__main__":
    entry.run(main, trains=True)
