"""The training of a system's stages, one after another."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax

from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.data.store import Store
from deepsc_jax.runtime import cluster, device_mesh
from deepsc_jax.runtime.progress import Progress
from deepsc_jax.runtime.signals import signals
from deepsc_jax.runtime.watchdog import Watchdog
from deepsc_jax.systems.system import Stage, System
from deepsc_jax.training import soft_labels
from deepsc_jax.training.checkpoint import Checkpoints
from deepsc_jax.training.gauges import Gauges
from deepsc_jax.training.logs import MetricsLog
from deepsc_jax.training.meters import require_finite, take_means
from deepsc_jax.training.preemption import Preemption
from deepsc_jax.training.pretrained import Taken
from deepsc_jax.training.stage import ReadyStage, Run, of_stage, prepare_stage
from deepsc_jax.training.step import Scalars
from deepsc_jax.training.utilisation import EVALUATING, Ledger
from deepsc_jax.training.validation import check_split, log_validation


def train(
    system: System,
    store: Store,
    workdir: pathlib.Path,
    stages: Sequence[Stage],
    step_timeout: float = 0,
    require_held: Callable[[], None] = lambda: None,
    taken: Mapping[str, Taken] | None = None,
    profile: tuple[int, int] | None = None,
) -> bool:
    """Run `stages` in order, each from where it was stopped; in every process of a job alike.

    A stage that comes after others starts from their best checkpoints in `workdir`, or from those
    that are `taken` from another run; one with teachers learns what theirs say. On SIGTERM or
    SIGINT the job saves at the next step that its processes agree on, and ends.

    Args:
      system: whose stages they are.
      store: the scans.
      workdir: where checkpoints and logs go.
      stages: of the system.
      step_timeout: the seconds after which a step that has not ended hangs; 0 for ever.
      require_held: called before something is written; raises where another run has `workdir` now.
      taken: by stage, the checkpoints of another run (`workdir.Record.init_from`).
      profile: the first and the last step of each stage that are traced, for xprof.

    Returns:
      Whether it got to the end; False after a signal.

    Raises:
      InputError: a stage lacks one that it comes after, validation cannot choose checkpoints,
        devices and batches do not fit, or the loss or its gradient is not finite.
    """
    config = system.config
    mesh = device_mesh.make_mesh(config.platform)
    device_mesh.check_processes(mesh)
    device_mesh.connect(mesh)
    for stage in stages:
        flag = config.stage_flag(stage.name, "batch")
        device_mesh.check_batch(flag, stage.batch, config.platform.accumulation, mesh)
        check_split(store, stage)
    log = MetricsLog(workdir, writer=cluster.is_writer())
    watchdog = Watchdog(step_timeout, workdir, jax.process_index())
    with watchdog, contextlib.closing(log):
        run = Run(
            system,
            store,
            workdir,
            mesh,
            log,
            Preemption(mesh),
            watchdog,
            require_held,
            taken or {},
            Ledger(workdir / "time.json", writer=cluster.is_writer()),
            profile,
        )
        if not all(train_stage(run, stage) for stage in stages):
            return False
        run.require_held()
        run.ledger.keep(ended=True)
        return True


def train_stage(run: Run, stage: Stage) -> bool:
    """Train one stage to its last step, validating and saving on the way.

    However it ends, what is being saved is finished first. False if it was preempted: a signal that
    came after the last step was agreed on ends it too.
    """
    run = of_stage(run, stage)
    checkpoints = Checkpoints(run.workdir / stage.name, writer=True)
    # Entered once there is something to save, left when it is on disk.
    with contextlib.ExitStack() as heeding, contextlib.closing(checkpoints):
        if checkpoints.latest_step() == stage.steps and (
            checkpoints.record(stage.steps) is not None or not run.store.cases("validation")
        ):
            run.log.say(f"{stage.name}: already trained for {stage.steps} steps")
            step = stage.steps
        else:
            taught = soft_labels.settle(run, stage) if stage.taught_by else None
            ready = prepare_stage(run, stage, checkpoints, taught)
            step = _take_steps(run, stage, checkpoints, ready, heeding)
    stopped = run.preemption.agreed_now()
    if stopped:
        run.log.say(f"{stage.name}: {signals.told}: saved at step {step}; start it again to go on")
    return not stopped


# The order within a step must hold:
# 1. The batch is put on the devices before the step before it is waited for: they overlap.
# 2. All processes ask for SIGTERM after every step, or their programs would wait for one another.
# 3. The loss is looked at before a checkpoint is saved: one of a loss that is not finite is no use.
# 4. The batches' place is saved with the state of the same step: a resumed run sees the next batch.
# 5. A step is saved before it is validated, which may take longer than a preemption grants; a run
#    that was stopped in between validates first.
def _take_steps(
    run: Run,
    stage: Stage,
    checkpoints: Checkpoints,
    ready: ReadyStage,
    heeding: contextlib.ExitStack,
) -> int:
    train, state = run.system.config.train, ready.state
    first = step = int(state.step)
    gauges = Gauges(run, stage, step)
    heeding.callback(gauges.close)

    def validates() -> bool:
        due = step == stage.steps or step % train.evaluate_every == 0
        return ready.validate is not None and step > 0 and due

    def validate() -> bool:
        """Whether it was stopped."""
        with gauges.apart(EVALUATING):
            found = ready.validate(state) if ready.validate else None
        if found is not None:
            heeding.enter_context(signals.heeded(f"training of {stage.name}"))
            run.require_held()
            log_validation(run.log, run.store, stage, step, found)
            with gauges.saving():
                checkpoints.add_record(step, found.record)
        return found is None

    heeding.callback(run.watchdog.rest)
    heeding.callback(ready.batches.close)
    preempted = validates() and checkpoints.record(step) is None and validate()
    since: list[Scalars] = []
    shapes = set[frozenset[tuple[str, tuple[int, ...]]]]()
    with (
        Progress(stage.name, stage.steps, step, quiet=not run.log.writer, lines=True) as progress,
        gauges.stepping(),
    ):
        while step < stage.steps and not preempted:
            with gauges.waiting():
                read = next(ready.batches)
            batch = device_mesh.put_batch(read, run.mesh, DEPTH_AXES)
            watched = gauges.watched(ready.watch, state, batch, step + 1)
            shape = frozenset((name, x.shape) for name, x in batch.items())
            with gauges.step(step + 1, batch, compiles=shape not in shapes):
                state, scalars = ready.step(state, batch)
            if step == first:
                heeding.enter_context(signals.heeded(f"training of {stage.name}"))
                gauges.restart()
            shapes.add(shape)
            since.append(scalars)
            step += 1
            gauges.took(step, batch, state)
            if watched:
                run.require_held()
                run.log.write(stage.name, step, watched)
            for line in run.system.warnings(stage, step, state.carried):
                run.log.say(f"{stage.name} {step}/{stage.steps}  {line}")
            preempted = run.preemption.agreed()
            run.watchdog.beat(step)
            ends = preempted or step == stage.steps
            saves = validates() or ends or step % train.checkpoint_every == 0
            if saves or step % train.log_every == 0:
                values = take_means(since)
                require_finite(values, stage.name, step)
                run.require_held()
                values |= gauges.rates(step)
                run.log.write(stage.name, step, values)
                progress.show(step, loss=values["loss"])
            if saves:
                with gauges.saving():
                    checkpoints.save(state, ready.batches.get_state())
            if validates() and not preempted:
                preempted = validate()
    if said := gauges.last_line():
        run.log.say(f"{stage.name}: {said}")
    return step
