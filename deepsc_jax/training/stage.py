"""What the steps of a stage need: state, batches and programs, from its newest checkpoint."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from deepsc_jax.data import pipeline
from deepsc_jax.data.buckets import tile_covers
from deepsc_jax.data.store import Store
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.watchdog import Watchdog
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Stage, System, Variables, initial
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints, has_checkpoint, load_variables
from deepsc_jax.training.logs import MetricsLog
from deepsc_jax.training.preemption import Preemption
from deepsc_jax.training.pretrained import Taken, require_unchanged
from deepsc_jax.training.step import TrainStep, make_eval_step, make_train_step
from deepsc_jax.training.utilisation import Ledger
from deepsc_jax.training.validation import Validation, validate
from deepsc_jax.training.watch import Watch, make_watch


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a training run share.

    `require_held` raises where another run has taken the folder over; called before it is written.
    `taken` are checkpoints of another run, by stage, in place of those of `workdir`. `ledger` has
    where the time goes, and `profile` which steps of each stage are traced.
    """

    system: System
    store: Store
    workdir: pathlib.Path
    mesh: Mesh
    log: MetricsLog
    preemption: Preemption
    watchdog: Watchdog
    require_held: Callable[[], None]
    taken: Mapping[str, Taken]
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    profile: tuple[int, int] | None = None


@dataclasses.dataclass
class ReadyStage:
    """What the steps of a stage need, at the step from which it goes on.

    `watch` is called with what some steps are given; None where nothing is watched.
    """

    state: states.State
    batches: pipeline.BatchIterator
    step: TrainStep
    validate: Callable[[states.State], Validation | None] | None
    watch: Watch | None = None


def prepare_stage(run: Run, stage: Stage, checkpoints: Checkpoints) -> ReadyStage:
    """The state, the batches and the programs of a stage, from its newest checkpoint if any."""
    system, reached = run.system, checkpoints.latest_step()
    variables = initial(system)
    if reached is None:
        trained = {
            name: _of_another(run, name) if name in run.taken else _trained(run, name, variables)
            for name in stage.after
        }
        variables = system.start(stage, variables, trained)
    state = states.create(system, stage, variables)
    shard = system.config.platform.shard_optimizer
    where = states.sharding(state, run.mesh, shard_optimizer=shard)
    state = jax.device_put(state, where)
    read = _batches(run, "train", stage, train=True)
    run.log.say(f"{stage.name}: {read.shapes()}")
    batches = iter(read)
    scored = reached is not None and checkpoints.record(reached) is not None
    run.log.resume(stage.name, reached or 0, scored=scored)
    if reached is not None:
        contents = checkpoints.load(state, reached)
        state = contents["state"]
        batches.set_state(contents["data"])
        run.log.say(f"{stage.name}: resumed at step {reached}")
    cases = pipeline.learnable(run.store.cases("train"), stage.reads)
    facts = system.facts(stage, cases)
    step = make_train_step(system, stage, run.mesh, facts, where)
    watches = system.config.train.watch_every > 0
    watch = make_watch(system, stage, run.mesh, facts) if watches else None
    run.log.say(
        f"{stage.name}: the first step compiles its program, unless an earlier run has kept it"
    )
    return ReadyStage(state, batches, step, _validation(run, stage), watch)


def _validation(run: Run, stage: Stage) -> Callable[[states.State], Validation | None] | None:
    """A function that validates a state, until it is stopped; None without a validation split."""
    cases = run.store.cases("validation")
    if not cases:
        run.log.say(f"{stage.name}: no validation split: its last checkpoint counts")
        return None
    whole = tile_covers(run.system.config.data, run.store.cases("train"))
    watched, voxel_ml = run.system.config.train.watch_every > 0, None
    if watched:
        voxel_ml = np.asarray([np.prod(case.spacing_mm) / 1000 for case in cases], np.float32)
    measure = make_eval_step(run.system, stage, run.mesh, whole_scans=whole, watched=watched)

    def of_state(state: states.State) -> Validation | None:
        batches = iter(_batches(run, "validation", stage, train=False))
        stop = run.preemption.agreed
        variables = state.variables
        return validate(run.system, stage, run.mesh, batches, measure, variables, stop, voxel_ml)

    return of_state


def _trained(run: Run, name: str, fresh: Variables) -> Variables:
    """The checkpoint to use of a stage that must be complete."""
    stage, folder, step = run.system.stage(name), run.workdir / name, 0
    if has_checkpoint(folder):
        with contextlib.closing(Checkpoints(folder)) as checkpoints:
            step = checkpoints.latest_step() or 0
    if step != stage.steps:
        raise InputError(
            f"{folder}: trained for {step} steps, {stage.steps} expected before what comes after "
            f"it: run --stage={name} first, or --stage=all"
        )
    like = states.create(run.system, stage, fresh)
    like = jax.device_put(like, device_mesh.replicated(run.mesh))
    return load_variables(folder, like, run.system.config.train.keep)[0]


def _of_another(run: Run, name: str) -> Variables:
    """The variables of a stage that are taken from another run, whatever optimizer it had."""
    taken = run.taken[name]
    folder = require_unchanged(taken, name)
    theirs = workdirs.read(folder.parent).config
    system = build(dataclasses.replace(theirs, platform=run.system.config.platform))
    like = jax.eval_shape(lambda: states.create(system, system.stage(name), initial(system)))
    whole = device_mesh.replicated(run.mesh)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
    return load_variables(folder, like, taken.step)[0]


def _batches(run: Run, split: str, stage: Stage, *, train: bool) -> pipeline.Batches:
    return pipeline.batches(
        run.store,
        split,
        stage.reads,
        run.system.config,
        seed=run.system.seed(stage),
        batch_size=stage.batch // jax.process_count(),
        train=train,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
