"""The two-stage training: pre-train both tasks apart, then all three subnets together."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepsc_jax.config import CLASSES, STAGES, Config, Stage
from deepsc_jax.data import pipeline
from deepsc_jax.data.store import Store
from deepsc_jax.metrics.classification import macro_auc
from deepsc_jax.models.deepsc import losses
from deepsc_jax.models.deepsc import network as deepsc
from deepsc_jax.runtime import cluster, compiler, device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training import state as states
from deepsc_jax.training.checkpoint import Checkpoints, has_checkpoint, load_params
from deepsc_jax.training.logs import MetricsLog, Progress
from deepsc_jax.training.preemption import Preemption
from deepsc_jax.training.step import THRESHOLDS, make_eval_step, make_train_step

STAGE_SEEDS = {"segmentation": 1, "classification": 2, "joint": 3}


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a training run share."""

    config: Config
    store: Store
    workdir: pathlib.Path
    mesh: Mesh
    model: deepsc.DeepSC
    log: MetricsLog
    preemption: Preemption


def train(config: Config, store: Store, workdir: pathlib.Path, stages: tuple[Stage, ...]) -> bool:
    """Run `stages` in order, each from where it was stopped; in every process of a job alike.

    The joint stage starts from the best checkpoints of both pre-trainings in `workdir`. On SIGTERM
    the job saves at the next step that its processes agree on, and ends.

    Returns:
      Whether it got to the end; False after SIGTERM.

    Raises:
      InputError: the joint stage lacks a pre-training, validation cannot choose checkpoints,
        devices and batches do not fit, or the loss or its gradient is not finite.
    """
    mesh = device_mesh.make_mesh(config.platform)
    device_mesh.check_processes(mesh)
    device_mesh.connect(mesh)
    for stage in stages:
        device_mesh.check_batch(config, stage, mesh)
        _check_validation(store, stage)
    model = deepsc.build(config, jax.default_backend())
    log = MetricsLog(workdir, writer=cluster.is_writer())
    with Preemption(mesh) as preemption, contextlib.closing(log):
        run = Run(config, store, workdir, mesh, model, log, preemption)
        return all(run_stage(run, stage) for stage in stages)


def run_stage(run: Run, stage: Stage) -> bool:
    """Train one stage to its last step, validating and saving on the way.

    However it ends, what is being saved is finished first. False if it was preempted.
    """
    with contextlib.closing(Checkpoints(run.workdir / stage, writer=True)) as checkpoints:
        return _run_stage(run, stage, checkpoints)


def _run_stage(run: Run, stage: Stage, checkpoints: Checkpoints) -> bool:
    config, train_config = run.config, run.config.train
    total = train_config.steps(stage)
    reached = checkpoints.latest_step()
    if reached == total:
        run.log.say(f"{stage}: already trained for {total} steps")
        return True

    state = _first_state(run, stage, reached)
    where = states.sharding(config, state, run.mesh)
    state = jax.device_put(state, where)
    batches = iter(_batches(run, "train", stage, train=True))
    run.log.resume(stage, reached or 0)
    if reached is not None:
        contents = checkpoints.load(state, reached)
        state = contents["state"]
        batches.set_state(contents["data"])
        run.log.say(f"{stage}: resumed at step {reached}")
    labels = [case.label for case in pipeline.learnable(run.store.cases("train"), stage)]
    counts = np.bincount(labels, minlength=len(CLASSES))
    step_fn = make_train_step(
        config, stage, run.model, run.mesh, losses.class_weights(jnp.asarray(counts)), where
    )
    eval_fn = make_eval_step(stage, run.model, run.mesh)
    validated = bool(run.store.cases("validation"))
    if not validated:
        run.log.say(
            f"{stage}: no validation split: its last checkpoint counts, and lesion is p >= 0.5"
        )

    run.log.say(f"{stage}: the first step compiles its program, unless an earlier run has kept it")
    first = step = reached or 0
    progress = Progress(stage, total, step, quiet=not run.log.writer)
    begun, logged, since = time.monotonic(), step, []
    preempted = False
    while step < total and not preempted:
        batch = device_mesh.put_batch(next(batches), run.mesh)
        state, scalars = step_fn(state, batch)
        if step == first:  # it has just been compiled, which is no step's time
            compiler.give_back()
            begun = time.monotonic()
        since.append(scalars)
        step += 1
        preempted = run.preemption.agreed()
        evaluated = validated and (step % train_config.evaluate_every == 0 or step == total)
        saved = evaluated or preempted or step % train_config.checkpoint_every == 0 or step == total
        # What is saved was looked at first: a checkpoint of a loss that is not finite is no use.
        if step % train_config.log_every == 0 or saved:
            fetched = jax.device_get(since)
            values = {name: float(np.mean([s[name] for s in fetched])) for name in scalars}
            since.clear()
            _require_finite(values, stage, step)
            values["seconds_per_step"] = (time.monotonic() - begun) / (step - logged)
            values["scans_per_second"] = train_config.batch(stage) / values["seconds_per_step"]
            run.log.write(stage, step, values)
            progress.show(step, loss=values["loss"])
            begun, logged = time.monotonic(), step
        record = None
        paused = time.monotonic()
        if evaluated:
            record = validate(run, stage, eval_fn, state.params)
            found = {k: v for k, v in record.items() if v is not None}
            run.log.write(stage, step, {f"validation_{k}": v for k, v in found.items()})
            shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
            run.log.say(f"{stage} {step}/{total}  validation  {shown}")
        if saved:
            checkpoints.save(state, batches.get_state(), record)
        begun += time.monotonic() - paused
    batches.close()
    if preempted:
        run.log.say(f"{stage}: SIGTERM: saved at step {step}; start it again to go on")
    return not preempted


def _require_finite(values: dict[str, float], stage: Stage, step: int) -> None:
    """Refuse to go on from a loss or a gradient that is not finite."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise InputError(
                f"{stage}: {name} is {values[name]} by step {step}, a finite number expected: the "
                "last checkpoint is from before; lower the learning rate or look at the data"
            )


def _first_state(run: Run, stage: Stage, reached: int | None) -> states.State:
    """The state at the stage's first step; only its shapes matter where the stage is resumed."""
    params = states.initial_params(run.config, run.model)
    if stage == "joint" and reached is None:
        pretrained = {}
        for part in STAGES[:2]:
            _require_trained(run, part)
            like = jax.device_put(
                states.create(run.config, part, params), device_mesh.replicated(run.mesh)
            )
            pretrained[part] = load_params(run.workdir / part, like)[0]
        params = states.join(pretrained["segmentation"], pretrained["classification"])
    return states.create(run.config, stage, params)


def _require_trained(run: Run, part: Stage) -> None:
    """Refuse to start the joint stage from a pre-training that is not complete."""
    folder, total = run.workdir / part, run.config.train.steps(part)
    step = 0
    if has_checkpoint(folder):
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            step = checkpoints.latest_step() or 0
    if step != total:
        raise InputError(
            f"{folder}: trained for {step} steps, {total} expected before the joint stage: run "
            f"--stage={part} first, or --stage=all"
        )


def _check_validation(store: Store, stage: Stage) -> None:
    """Refuse a validation split that cannot tell a better checkpoint of the stage from a worse."""
    cases, lacking = store.cases("validation"), []
    if not cases:
        return
    if stage != "classification" and not any(c.lesions_known and c.lesion_voxels for c in cases):
        lacking.append("no scan with a lesion, at least 1")
    classes = {case.label for case in cases}
    if stage != "segmentation" and len(classes) < 2:
        lacking.append("scans of one class, at least 2 classes")
    if lacking:
        raise InputError(
            f"{store.path}: split validation has {lacking[0]} expected to choose the best "
            f"checkpoint of the {stage} stage: add one, or leave validation empty"
        )


def _batches(run: Run, split: str, stage: Stage, *, train: bool) -> Any:
    return pipeline.batches(
        run.store,
        split,
        stage,
        run.config,
        seed=run.config.train.seed * len(STAGES) + STAGE_SEEDS[stage],
        batch_size=run.config.train.batch(stage) // jax.process_count(),
        train=train,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def validate(run: Run, stage: Stage, eval_fn: Any, params: Any) -> dict[str, float | None]:
    """Mean DSC on the working grid at its best threshold, and macro AUC, over validation.

    `score`, their sum, decides which checkpoint is the best. None where the stage lacks a task.
    """
    rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for batch in _batches(run, "validation", stage, train=False):
        inputs = {k: v for k, v in batch.items() if k not in ("valid", "case")}
        out = jax.device_get(eval_fn(params, device_mesh.put_batch(inputs, run.mesh)))
        # The results are those of all processes' scans, and this process has read its own only.
        facts = {name: batch[name] for name in ("valid", "case", "label")}
        out |= device_mesh.whole_batch(facts, run.mesh)
        for name, values in out.items():
            rows[name].append(values[out["valid"]])
    whole = {name: np.concatenate(values) for name, values in rows.items()}
    order = np.argsort(whole["case"])  # the processes' number must not move a sum's last digit
    whole = {name: values[order] for name, values in whole.items()}
    record: dict[str, float | None] = {"dsc": None, "threshold": None, "auc": None}
    if "dice" in whole:
        means = np.nanmean(whole["dice"], axis=0)
        best = int(np.argmax(means))
        record |= {"dsc": float(means[best]), "threshold": THRESHOLDS[best]}
    if "probabilities" in whole:
        record["auc"] = macro_auc(whole["label"], whole["probabilities"])
    record["score"] = (record["dsc"] or 0.0) + (record["auc"] or 0.0)
    return record
