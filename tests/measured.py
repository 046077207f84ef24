"""Jobs and figures made by hand, for the tests of the benchmark."""

import pathlib
from typing import Any

from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.measure import Measured, Times
from deepsc_jax.config import Config, DataConfig, TrainConfig
from deepsc_jax.models.deepsc.config import JointTraining, Options, PreTraining
from deepsc_jax.systems.building import stages_of

CONFIG = Config(
    data=DataConfig(working_size=(32, 48), tile=(8, 16, 16), slices=12, depth_bucket=16),
    model=Options(
        norm_groups=4,
        segmentation=PreTraining(batch=4),
        joint=JointTraining(batch=2),
    ),
    train=TrainConfig(tiles_per_scan=3),
)


def job(
    work: Any = "train",
    side: str = "ours",
    variant: str = "",
    stage: str = "segmentation",
    **more: Any,
) -> Job:
    given = {"config": CONFIG, "scan_size": (20, 32, 48)} | more
    reads = stages_of(given["config"], stage)[0].reads
    size, place = given["scan_size"], pathlib.Path()
    return Job(work, given["config"], size, stage, reads, side, variant, place)


def measured(
    side: str = "ours", variant: str = "", seconds: tuple[float, ...] = (2, 1, 4), **more: Any
) -> Measured:
    end = {"peak_bytes": 2**21, "idle_bytes": 2**20, "device_bytes": None, "rates_from": "here"}
    end |= {"rates": {"float32": 1e9, "bfloat16": 4e9}, "depths": (), "settings": {}}
    end |= {"flops": more.pop("flops", {"float32": 5e8, "bfloat16": 2e9})}
    given: dict[str, Any] = {
        "summary": {"loss": 1.0},
        "environment": {
            "platform": "gpu",
            "device": "H100",
            "devices": 2,
            "compute_dtype": "float32",
        },
        "joules": None,
        "end": end,
    }
    given |= more
    return Measured(job(side=side, variant=variant), Times.of(seconds), compile_s=3.0, **given)
