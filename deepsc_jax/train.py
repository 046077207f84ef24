"""Train DeepSC-COVID: `python -m deepsc_jax.train --flagfile=... --data_dir=DIR --workdir=DIR`."""

import pathlib

import jax
from absl import flags

from deepsc_jax import parallel, program
from deepsc_jax import workdir as workdirs
from deepsc_jax.config import STAGES, Stage
from deepsc_jax.data.store import Store
from deepsc_jax.evaluate import settle_threshold
from deepsc_jax.training import loop

program.define_config_flags()
DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints and logs go; a stopped run resumes from it.", required=True
)
STAGE = flags.DEFINE_enum("stage", "all", ["all", *STAGES], "Stage to run; all runs them in order.")


def main() -> None:
    """Run the stages that the flags name."""
    settings = program.config_from_flags()
    workdir = pathlib.Path(WORKDIR.value)
    stages: tuple[Stage, ...] = tuple(stage for stage in STAGES if STAGE.value in ("all", stage))
    parallel.use_cpu_cores(settings, stages)
    store = Store(pathlib.Path(DATA_DIR.value) / "store", settings.data, settings.train.cache_mib)
    workdirs.begin(workdir, settings, store)
    loop.train(settings, store, workdir, stages)
    if stages[-1] != "classification" and jax.process_index() == 0:
        threshold = settle_threshold(workdir, stages[-1], store)
        if threshold is not None:
            print(f"lesion threshold {threshold:g}: best on validation, on the scans' own grids")
    print(f"trained: checkpoints in {workdir}, curves in {workdir / 'metrics.jsonl'}")


if __name__ == "__main__":
    program.run(main, trains=True)
