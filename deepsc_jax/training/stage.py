"""What the steps of a stage need: state, batches and programs, from its newest checkpoint."""

import dataclasses
import pathlib
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from deepsc_jax.config.run import section
from deepsc_jax.data import pipeline
from deepsc_jax.data.buckets import tile_covers
from deepsc_jax.data.store import Store
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import Untyped
from deepsc_jax.runtime.watchdog import Watchdog
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Stage, System, Variables, initial
from deepsc_jax.training import checksums
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints, load_variables, newest_and_chosen
from deepsc_jax.training.logs import MetricsLog
from deepsc_jax.training.preemption import Preemption
from deepsc_jax.training.pretrained import Taken, require_unchanged
from deepsc_jax.training.step import TrainStep, make_eval_step, make_train_step
from deepsc_jax.training.utilisation import Ledger
from deepsc_jax.training.validation import Validation, validate
from deepsc_jax.training.watch import Watch, make_watch

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages of a training run share.

    `require_held` raises where another run has taken the folder over; called before it is written.
    `taken` are checkpoints of another run, by stage, in place of those of `workdir`; `programs` are
    those of the stage before. `ledger` has where the time goes, and `profile` which steps of each
    stage are traced.
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
    programs: "Programs" = dataclasses.field(default_factory=lambda: Programs())


class Programs:
    """The programs of one stage, which another takes that differs from it in its data alone."""

    def __init__(self) -> None:
        """None yet."""
        self._kind: tuple[System, Stage] | None = None
        self._made: dict[Hashable, Untyped] = {}

    def once(self, run: Run, stage: Stage, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes, once for all stages that are like this one; others' are let go."""
        kind = run.system, dataclasses.replace(stage, name=section(stage.name), fold=None)
        if kind != self._kind:
            self._kind, self._made = kind, {}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def of_stage(run: Run, stage: Stage) -> Run:
    """The run as a stage sees it: of the system that it trains, on the patients that it sees."""
    store = run.store if stage.fold is None else run.store.of_fold(*stage.fold, held_out=False)
    return dataclasses.replace(run, system=run.system.of(stage), store=store)


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


def prepare_stage(
    run: Run,
    stage: Stage,
    checkpoints: Checkpoints,
    taught: Mapping[str, np.ndarray] | None = None,
) -> ReadyStage:
    """The state, the batches and the programs of a stage, from its newest checkpoint if any.

    Args:
      run: as the stage sees it (`of_stage`).
      stage: the stage.
      checkpoints: its own.
      taught: by training case, its teachers' logits, where the stage reads them.
    """
    system, reached = run.system, checkpoints.latest_step()
    variables = initial(system)
    if reached is None:
        before = {name: trained(run, name) for name in stage.after}
        variables = system.start(stage, variables, before)
    state = states.create(system, stage, variables)
    shard = system.config.platform.shard_optimizer
    where = states.sharding(state, run.mesh, shard_optimizer=shard)
    state = jax.device_put(state, where)
    read = _batches(run, "train", stage, train=True, taught=taught)
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
    made = run.programs.once(
        run, stage, "step", lambda: make_train_step(system, stage, run.mesh, facts, where)
    )
    watches = system.config.train.watch_every > 0
    watch = make_watch(system, stage, run.mesh, facts) if watches else None
    run.log.say(
        f"{stage.name}: the first step compiles its program, unless an earlier run has kept it"
    )
    step = made.given(facts)  # the program may be of another fold
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
    measure = run.programs.once(
        run,
        stage,
        ("measure", whole),
        lambda: make_eval_step(run.system, stage, run.mesh, whole_scans=whole, watched=watched),
    )

    def of_state(state: states.State) -> Validation | None:
        batches = iter(_batches(run, "validation", stage, train=False))
        stop = run.preemption.agreed
        variables = state.variables
        return validate(run.system, stage, run.mesh, batches, measure, variables, stop, voxel_ml)

    return of_state


@dataclasses.dataclass(frozen=True)
class Kept:
    """The checkpoint to use of a stage that is trained to its end.

    Attributes:
      folder: of the stage's checkpoints.
      step: of this one.
      digest: `checksums.digest` of it.
    """

    folder: pathlib.Path
    step: int
    digest: str


def kept(run: Run, name: str) -> Kept | None:
    """The checkpoint of a stage of this run, or what is taken of another; None if not complete."""
    if name in run.taken:
        taken = run.taken[name]
        return Kept(pathlib.Path(taken.run, name), taken.step, taken.digest)
    folder = run.workdir / name
    newest, chosen = newest_and_chosen(folder, run.system.config.train.keep)
    if newest != run.system.stage(name).steps:
        return None
    return Kept(folder, chosen, checksums.digest(folder / str(chosen)))


def trained(run: Run, name: str) -> Variables:
    """The variables of a stage that must be complete, here or in the run that it is taken from.

    Raises:
      InputError: it is not, or its checkpoint is damaged or another than was taken.
    """
    checkpoint = kept(run, name)
    if checkpoint is None:
        folder, steps = run.workdir / name, run.system.stage(name).steps
        newest, _ = newest_and_chosen(folder, run.system.config.train.keep)
        raise InputError(
            f"{folder}: trained for {newest} steps, {steps} expected before what comes after "
            f"it: run --stage={name} first, or --stage=all"
        )
    system = run.system
    if name in run.taken:  # whatever optimizer it had
        folder = require_unchanged(run.taken[name], name)
        theirs = workdirs.read(folder.parent).config
        system = build(dataclasses.replace(theirs, platform=system.config.platform))
    stage = system.stage(name)
    system = system.of(stage)
    like = jax.eval_shape(lambda: states.create(system, stage, initial(system)))
    whole = device_mesh.replicated(run.mesh)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
    return load_variables(checkpoint.folder, like, checkpoint.step)[0]


def _batches(
    run: Run,
    split: str,
    stage: Stage,
    *,
    train: bool,
    taught: Mapping[str, np.ndarray] | None = None,
) -> pipeline.Batches:
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
        taught=taught,
    )
