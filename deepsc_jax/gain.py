"""Multi-task gain: joint training against each task alone, on the same budget (paper, V-D).

    python -m deepsc_jax.gain --flagfile=configs/phantom.flags --data_dir=DIR --out=DIR --seeds=3

For every seed it trains the two-stage system, and each task alone for as many more steps as pass
the same number of tiles (segmentation) or of slice stacks (classification) through the network as
the joint stage does. All runs are evaluated on the test split. Prints both tasks' figures with
their spread over seeds and writes OUT/gain.json.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags

from deepsc_jax.config import STAGES, Config, Stage
from deepsc_jax.data.store import Store
from deepsc_jax.evaluate import evaluate, settle_threshold
from deepsc_jax.inference import predictor as inference
from deepsc_jax.runtime import device_mesh, entry
from deepsc_jax.runtime.files import write_json
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs

FIGURES = {
    "segmentation": ("dsc", "sensitivity", "nsd"),
    "classification": ("accuracy", "f1", "auc"),
}


def alone(settings: Config, stage: Stage, tiles: int) -> Config:
    """The settings of a single-task run with the budget of the pre-training and the joint stage.

    Args:
      settings: of the joint run.
      stage: `segmentation` or `classification`.
      tiles: of a scan, all of which the joint stage passes through the network.
    """
    train = settings.train
    passed = train.joint_steps * train.joint_batch
    if stage == "segmentation":
        extra = passed * tiles / (train.segmentation_batch * train.tiles_per_scan)
        longer = {"segmentation_steps": train.segmentation_steps + round(extra)}
    else:
        extra = passed / train.classification_batch
        longer = {"classification_steps": train.classification_steps + round(extra)}
    return dataclasses.replace(settings, train=dataclasses.replace(train, **longer))


def run(settings: Config, store: Store, workdir: pathlib.Path, stages: tuple[Stage, ...]) -> dict:
    """Train `stages` in `workdir`, evaluate the last one on test, and return the summary.

    A run that was stopped goes on; one that is complete, of the same settings, is only read.
    """
    done = workdir / "metrics.json"
    workdirs.begin(workdir, settings, store)
    if done.exists():
        return json.loads(done.read_text())
    if not loop.train(settings, store, workdir, stages):
        sys.exit(entry.PREEMPTED)
    if stages[-1] != "classification":
        settle_threshold(workdir, stages[-1], store)
    metrics, _ = evaluate(inference.load(workdir, stages[-1]), store, "test")
    write_json(metrics, done)
    return metrics


def compare(joint: list[dict], single: dict[str, list[dict]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every figure, joint and alone, and of the gain."""
    result: dict[str, Any] = {}
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


def main() -> None:
    """Train and compare for every seed."""
    options, settings = flags.FLAGS, entry.config_from_flags()
    data_dir, out = pathlib.Path(options.data_dir), pathlib.Path(options.out)
    device_mesh.use_cpu_cores(settings, STAGES)
    store = Store(data_dir / "store", settings.data, settings.train.cache_mib)
    deepest = max(case.depth for case in store.cases("train"))
    tiles = int(np.prod(settings.data.tile_counts(settings.data.bucket(deepest))))
    joint, single = [], {stage: [] for stage in STAGES[:2]}
    for seed in range(options.seeds):
        seeded = dataclasses.replace(settings, train=dataclasses.replace(settings.train, seed=seed))
        joint.append(run(seeded, store, out / f"seed{seed}" / "joint", STAGES))
        for stage in STAGES[:2]:
            workdir = out / f"seed{seed}" / stage
            single[stage].append(run(alone(seeded, stage, tiles), store, workdir, (stage,)))
    result = compare(joint, single)
    write_json(result, out / "gain.json")
    print(f"{'test split':28}{'joint':>16}{'alone':>16}{'gain':>16}   ({options.seeds} seeds)")
    for name, row in result.items():
        cells = [f"{v['mean']:.3f} ± {v['sd'] or 0:.3f}" for v in row.values()]
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"wrote {out / 'gain.json'}")


if __name__ == "__main__":
    entry.define_config_flags()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string("out", None, "Folder for runs and results.", required=True)
    flags.DEFINE_integer("seeds", 3, "Seeds to train with.", lower_bound=1)
    entry.run(main, trains=True)
