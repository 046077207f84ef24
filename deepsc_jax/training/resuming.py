"""What may be another when a run goes on: nothing that changes a number of the steps it took."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from deepsc_jax.config import Config
from deepsc_jax.config.run import differences
from deepsc_jax.config.training import CHANGES_NO_STEP
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.output import tell
from deepsc_jax.systems.building import described
from deepsc_jax.systems.system import Stage, System
from deepsc_jax.training.checkpoint import has_checkpoint

_COMPARED = 1024  # of a stage's learning rates: one that goes by the total differs all along


def settle(
    workdir: pathlib.Path, begun: Config, asked: Config, *, longer: bool, say: bool
) -> set[str]:
    """Refuse settings with which a run cannot go on, and say in one line which are others.

    On whatever devices, it computes the same thing. `CHANGES_NO_STEP` may change, and, with
    `longer`, a stage's steps may grow where those it has would have been the same.

    Returns:
      The names of the stages with more steps than before.

    Raises:
      InputError: naming the flags that differ, or why there can be no more steps.
    """
    changed = differences(begun, asked)
    if not changed:
        return set()
    before, after = described(begun), described(asked)
    of_steps = {f"{asked.name}.{stage.name}.steps": stage for stage in after.stages}
    free = {*CHANGES_NO_STEP, *(of_steps if longer else ())}
    fixed = [text for flag, text in changed.items() if flag not in free]
    if fixed:
        raise InputError(
            f"{workdir / 'config.json'}: the run was begun with other settings "
            f"({'; '.join(fixed)}): give another folder, or the same flags to go on"
        )
    for flag, stage in of_steps.items():
        if flag in changed:
            reason = _against_more_steps(workdir, before, after, stage)
            if reason:
                raise InputError(
                    f"{workdir / 'config.json'}: {changed[flag]}: {reason}: give another folder, "
                    "or the same flag to go on"
                )
    if say:
        tell(
            f"{workdir}: goes on, what was computed stays the same ({'; '.join(changed.values())})"
        )
    return {stage.name for flag, stage in of_steps.items() if flag in changed}


def _against_more_steps(
    workdir: pathlib.Path, before: System, after: System, stage: Stage
) -> str | None:
    """Why a stage cannot go on with the steps that it has now; None where it can."""
    then = before.stage(stage.name)
    if stage.steps < then.steps:
        return "steps can be added and not taken away"
    started = [other.name for other in after.stages if stage.name in other.after]
    started = [name for name in started if has_checkpoint(workdir / name)]
    if started:
        return f"stage {started[0]} has started from what it was"
    taken = jnp.asarray(np.unique(np.linspace(0, then.steps - 1, _COMPARED, dtype=np.int32)))
    was = jax.vmap(before.learning_rate(then))(taken)
    if not jnp.array_equal(was, jax.vmap(after.learning_rate(stage))(taken)):
        train = after.config.train
        return (
            "the learning rate of the steps before would have been another under "
            f"--schedule={train.schedule} --warmup_steps={train.warmup_steps}, and is the same "
            "under a constant schedule alone"
        )
    return None
