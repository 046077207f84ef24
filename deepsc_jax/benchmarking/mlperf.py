"""`--work=unet3d`: the 3D U-Net that MLPerf Training had, timed by this project's own means.

The network, patches, loss and optimizer are MLPerf's, but for two classes of voxels in place of
three. The data are not: drawn scans of `train_segmentation`, phantoms in the `loop`.
"""

import importlib
import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from types import ModuleType

from deepsc_jax.benchmarking.report import Row
from deepsc_jax.config import Config
from deepsc_jax.config import flags as config_flags
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import own
from deepsc_jax.runtime.types import JsonObject

WORK = "unet3d"
FLAGS = ("--flagfile=configs/mlperf_unet3d.flags",)
WORKS = ("train_segmentation", "loop")  # synthetic data, and the real loader
NOTE = "unverified, benchmark retired, not comparable as an MLPerf result"


def expanded(argv: Sequence[str]) -> list[str]:
    """`argv` with what `--work=unet3d` stands for before the flags that are given."""
    if config_flags.last_value(config_flags.expanded(argv), "work") != WORK:
        return list(argv)
    return [argv[0], *FLAGS, *argv[1:]]


def sample_rates(row: Row) -> JsonObject:
    """Samples a second of one chip, and joules a sample; None where the machine does not tell."""
    scans = row["scans_per_s"] * row["ours_s"]
    joules = row["energy_j"]
    return {
        "samples_per_s_per_chip": row["scans_per_s"] / row["devices"],
        "joules_per_sample": None if joules is None else joules / scans,
        "note": NOTE,
    }


def table(rows: Sequence[Row]) -> str:
    """What MLPerf's readers look for, and what it is not."""
    lines = [f"{'sample = a patch':22}{'samples/s/chip':>15}{'J/sample':>10}"]
    for row in {row["work"]: row for row in rows}.values():
        joules = row["joules_per_sample"]
        shown = "-" if joules is None else f"{joules:.3g}"
        lines.append(f"{row['work']:22}{row['samples_per_s_per_chip']:15.3g}{shown:>10}")
    return "\n".join([*lines, NOTE])


def require_logging() -> None:
    """Refuse `--mlperf_log` where its package is missing.

    Raises:
      InputError: it is.
    """
    if importlib.util.find_spec("mlperf_logging") is None:
        raise InputError(
            "--mlperf_log: mlperf_logging was not found: pip install 'deepsc_jax[mlperf]'"
        )


def write_log(path: pathlib.Path, config: Config, stage: str, rows: Sequence[Row]) -> None:
    """Write the figures of ours as events of `mlperf-logging`, with what they are not."""
    mllog = importlib.import_module("mlperf_logging.mllog")
    constants = importlib.import_module("mlperf_logging.mllog.constants")
    with own(path) as partial:
        mllog.config(filename=str(partial), default_namespace="deepsc_jax")
        logger = mllog.get_mllogger()
        for key, value, metadata in _events(constants, config, stage, rows):
            logger.event(key=key, value=value, metadata=metadata)


def _events(
    constants: ModuleType, config: Config, name: str, rows: Sequence[Row]
) -> Iterator[tuple[str, object, JsonObject]]:
    """Key, value and metadata of each."""
    stage = config.stage(name)
    facts = {
        constants.SUBMISSION_BENCHMARK: WORK,
        constants.SUBMISSION_DIVISION: "open",
        constants.SUBMISSION_STATUS: NOTE,
        constants.GLOBAL_BATCH_SIZE: stage.batch,
        constants.OPT_NAME: config.train.optimizer,
        constants.OPT_BASE_LR: stage.learning_rate,
        constants.SEED: config.train.seed,
    }
    for key, value in facts.items():
        yield key, value, {}
    for row in {row["work"]: row for row in rows}.values():
        figures = {
            "throughput": row["scans_per_s"],
            "seconds_per_step": row["ours_s"],
            "compile_seconds": row["compile_s"],
            "mfu": row["share_of_peak"],
        }
        yield "tracked_stats", figures, {"step": 0, "work": row["work"]}
