"""Multi-task gain: joint training against each task alone, on the same budget (paper, V-D).

    deepsc gain --flagfile=configs/phantom.flags --data_dir=DIR --out=DIR --seeds=3

For every seed it trains the two-stage system, and each task alone for as many more steps as pass
the same number of tiles (segmentation) or of slice stacks (classification) through the network as
the joint stage does. All runs are evaluated on the test split. Prints both tasks' figures with
their spread over seeds and writes OUT/gain.json.
"""

from deepsc_jax.runtime import entry

if __name__ == "__main__":
    entry.import_jax()  # before the imports below, which need it

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from deepsc_jax.config import Config
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.scoring import evaluate
from deepsc_jax.evaluation.thresholds import settle_threshold
from deepsc_jax.inference import predictor
from deepsc_jax.models import registry
from deepsc_jax.runtime import device_mesh, failures
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, write_json, write_own_json
from deepsc_jax.runtime.lock import locked
from deepsc_jax.runtime.places import output_folder
from deepsc_jax.runtime.signals import signals
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.systems.building import build, stages_of
from deepsc_jax.systems.system import Stage
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

FIGURES = {
    "lesions": ("dsc", "sensitivity", "nsd"),
    "classes": ("accuracy", "f1", "auc"),
}


def alone(config: Config, stage: Stage, joint: Stage, tiles: int) -> Config:
    """The settings of a single-task run with the budget of the pre-training and the joint stage.

    Args:
      config: of the joint run.
      stage: a pre-training.
      joint: the stage that comes after it.
      tiles: of a scan, all of which the joint stage passes through the network.
    """
    passed = joint.steps * joint.batch
    if stage.reads.tiles == "drawn":
        extra = passed * tiles / (stage.batch * config.train.tiles_per_scan)
    else:
        extra = passed / stage.batch
    return config.with_stage(stage.name, steps=stage.steps + round(extra))


def train_and_score(
    config: Config, store: Store, workdir: pathlib.Path, names: Sequence[str]
) -> JsonObject:
    """Train the stages of these names in `workdir`, and score the last one on test.

    A run that was stopped goes on; one that is complete, of the same settings, is only read.
    """
    done = workdir / "metrics.json"
    with failures.below(workdir), locked(workdir, "training") as lock:
        workdirs.begin(workdir, config, store)
        if done.exists():
            return _read(done)
        system = build(config)
        stages = [system.stage(name) for name in names]
        if not loop.train(system, store, workdir, stages, require_held=lock.require):
            sys.exit(signals.code)
        with signals.during(f"the evaluation of {workdir}"):
            if "lesions" in stages[-1].learns:
                settle_threshold(workdir, stages[-1].name, store)
            metrics, _ = evaluate(predictor.load(workdir, stages[-1].name), store, "test")
        write_json(metrics, done)
        return metrics


def _read(path: pathlib.Path) -> JsonObject:
    """The metrics of a complete run.

    Raises:
      InputError: the file is damaged.
    """
    try:
        metrics = json.loads(path.read_text("utf-8"))
        if not isinstance(metrics, dict):
            raise TypeError(f"{type(metrics).__name__} found")
        for task, names in FIGURES.items():
            for name in names if task in metrics else ():
                float(metrics[task][name]["mean"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(
            f"{path}: not the metrics of a run ({error!r}): remove it to evaluate again"
        ) from error
    return metrics


def compare(joint: list[dict], single: dict[str, list[dict]]) -> JsonObject:
    """Mean and standard deviation over seeds of every figure, joint and alone, and of the gain.

    Args:
      joint: the metrics of each seed.
      single: the same of each task, `lesions` or `classes`, alone.
    """
    result: JsonObject = {}
    for task, names in FIGURES.items():
        for name in names:
            together = np.array([m[task][name]["mean"] for m in joint])
            apart = np.array([m[task][name]["mean"] for m in single[task]])
            rows = {"joint": together, "alone": apart, "gain": together - apart}
            result[f"{task} {name}"] = {
                key: {
                    "mean": float(values.mean()),
                    "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
                    "seeds": values.tolist(),
                }
                for key, values in rows.items()
            }
    return result


CONFIG = registry.config_flags()


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string("out", None, "Folder for runs and results.", required=True)
    flags.DEFINE_integer("seeds", 3, "Seeds to train with.", lower_bound=1)


def main() -> None:
    """Train and compare for every seed."""
    options, config = flags.FLAGS, CONFIG.config()
    data_dir = local_path("data_dir", options.data_dir)
    out = output_folder("out", options.out, "gain.json")
    stages = {stage.name: stage for stage in stages_of(config)}
    last = list(stages.values())[-1]
    if not last.after:
        raise InputError(f"--model={config.name}: it has no joint stage, which a gain is of")
    device_mesh.use_cpu_cores(config.platform, [stage.batch for stage in stages.values()])
    with locked(out, "comparison"):
        _compare(config, stages, out, data_dir)


def _compare(
    config: Config, stages: dict[str, Stage], out: pathlib.Path, data_dir: pathlib.Path
) -> None:
    options, last = flags.FLAGS, list(stages.values())[-1]
    folder, settings = data_dir / "store", config.train
    store = Store(folder, config.data, settings.cache_mib, fold=settings.folds)
    deepest = max(case.depth for case in store.cases("train"))
    tiles = int(np.prod(config.data.tile_counts(config.data.bucket(deepest))))
    joint: list[dict] = []
    single: dict[str, list[dict]] = {task: [] for task in FIGURES}
    for seed in range(options.seeds):
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        folder = out / f"seed{seed}"
        joint.append(train_and_score(seeded, store, folder / last.name, list(stages)))
        for name in last.after:
            longer = alone(seeded, stages[name], last, tiles)
            (task,) = stages[name].learns
            single[task].append(train_and_score(longer, store, folder / name, [name]))
    result = compare(joint, single)
    write_own_json(result, out / "gain.json")
    print(f"{'test split':28}{'joint':>16}{'alone':>16}{'gain':>16}   ({options.seeds} seeds)")
    for name, row in result.items():
        cells = [f"{v['mean']:.3f} ± {v['sd'] or 0:.3f}" for v in row.values()]
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"wrote {out / 'gain.json'}")


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, CONFIG.parse, trains=True)


if __name__ == "__main__":
    run()
