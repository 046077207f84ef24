"""Checkpoints through Orbax: state and data order together, and then their validation result.

In a run's folder:

    STAGE/STEP            a checkpoint, with the SHA-256 sums of its files
    STAGE/STEP/validation.json    its validation result, where it was validated
    STAGE/damaged-STEP    one whose files were not as they were written, set aside by a run
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import orbax.checkpoint.experimental.v1 as ocp

from deepsc_jax.runtime import cluster, failures
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.output import tell
from deepsc_jax.runtime.types import JsonObject, JsonValue, PyTree, Untyped
from deepsc_jax.systems.system import Variables
from deepsc_jax.training import checksums
from deepsc_jax.training.state import State


class Checkpoints:
    """The checkpoints of one stage: the two newest, and the best on validation.

    A checkpoint holds the state and the data iterator's place. It is saved once; its validation
    result, a JSON object (`score`, `threshold`, ...), is added when it is known. Saving is
    asynchronous. All processes of a job create and call this alike; the files are on a disk that
    all of them see.

    Args:
      directory: the stage's folder.
      writer: whether to save: then what a killed run left half written is removed, and newest
        checkpoints that are damaged are set aside, with a line about each.
    """

    def __init__(self, directory: pathlib.Path, *, writer: bool = False):
        self.directory = directory
        self._saving = 0
        if writer:
            if cluster.is_writer():
                _set_damaged_aside(directory)
            cluster.wait_for_all(f"checkpoints of {directory.name} verified")
        self._records = _records(directory)
        always: Untyped = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        # Called when all files are written and before the folder gets its final name, so that no
        # checkpoint is ever without its sums; in the first process only. A function, since Orbax
        # copies the context, and with a method the object that it belongs to.
        context = ocp.Context()
        context.async_options.post_finalization_callback = lambda: self._write_sums()
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            context=context,
            preservation_policy=_Kept(self),
            save_decision_policy=always,
            cleanup_tmp_directories=writer,
        )

    def save(self, state: State, data_state: JsonValue) -> None:
        """Save a step that is not saved yet, in the background."""
        self.wait()
        self._saving = int(state.step)
        contents = {"state": state, "data": data_state}
        self._checkpointer.save_checkpointables_async(self._saving, contents)

    def add_record(self, step: int, record: JsonObject) -> None:
        """Add the validation result of a step that was saved; what is not kept then is removed."""
        self.wait()
        if cluster.is_writer():
            checksums.add_record(self.directory / str(step), record)
        self._records[step] = record
        steps = self._steps()
        for other in steps:
            if other not in self.kept(steps):
                self._checkpointer.delete(other, missing_ok=True)

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Which of `steps` are not removed."""
        best = self._best(steps)
        return {*sorted(steps)[-2:], *([] if best is None else [best])}

    def _write_sums(self) -> None:
        (partial,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        checksums.write_sums(partial)

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def best_step(self) -> int | None:
        """The step with the highest score, or the newest where none was scored."""
        best = self._best(self._steps())
        return self.latest_step() if best is None else best

    def record(self, step: int) -> JsonObject | None:
        """The validation result of the checkpoint at `step`; None where there is none."""
        return self._records.get(step)

    def _steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def _best(self, steps: Sequence[int]) -> int | None:
        return _best_of(steps, self._records)

    def load(self, like: State, step: int) -> dict[str, PyTree]:
        """`state`, laid out as `like` is, and `data` of the checkpoint at `step`.

        Raises:
          InputError: it is of another network or optimizer, or of another version.
        """
        wanted = {"state": jax.tree.map(_abstract, like), "data": None}
        try:
            return self._checkpointer.load_checkpointables(step, wanted)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            if failures.explain(error) is not None:
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise InputError(
                f"{self.directory / str(step)}: not a checkpoint of this network ({reason}): copy "
                "the whole folder of its run, or move it away"
            ) from error

    def wait(self) -> None:
        """Return when everything is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Finish saving and let go of the directory."""
        self._checkpointer.close()


class _Kept:
    """Orbax's way to ask `Checkpoints.kept`."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Untyped], *, context: Untyped) -> list[bool]:
        """Whether each of the checkpoints is kept."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self._checkpoints.kept(steps)
        return [step in kept for step in steps]


def _set_damaged_aside(directory: pathlib.Path) -> None:
    """Rename what is damaged, with a line about each, down to the newest checkpoint that is not.

    Of those before it, only what lacks a file: a run was killed while it removed an old one.
    """
    steps, usable = _steps(directory), None
    for step in reversed(steps):
        folder = directory / str(step)
        damage = checksums.damage(folder, contents=usable is None)
        if damage is None:
            usable = usable or step
            continue
        names = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
        aside = next(directory / name for name in names if not (directory / name).exists())
        folder.rename(aside)
        before = "the one before it is used" if step > steps[0] else "the stage starts anew"
        then = "" if usable else f", {before}"
        tell(f"{folder}: {damage}: set aside as {aside.name}{then}")


def _steps(directory: pathlib.Path) -> list[int]:
    """The steps of a stage's complete checkpoints, in order."""
    if not directory.is_dir():
        return []
    names = [child.name for child in directory.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def _records(directory: pathlib.Path) -> dict[int, JsonObject]:
    """The validation results of a stage's complete checkpoints, by step."""
    read = {step: checksums.read_record(directory / str(step)) for step in _steps(directory)}
    return {step: record for step, record in read.items() if record is not None}


def _best_of(steps: Sequence[int], records: Mapping[int, JsonObject]) -> int | None:
    scored = [(records[step]["score"], step) for step in steps if step in records]
    return max(scored)[1] if scored else None


def newest_and_chosen(directory: pathlib.Path, keep: Literal["best", "last"]) -> tuple[int, int]:
    """The newest step of a stage's folder and the one to use, as its files say; 0 without any."""
    steps = _steps(directory)
    newest = max(steps, default=0)
    best = _best_of(steps, _records(directory)) if keep == "best" else None
    return newest, best or newest


def _abstract(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def has_checkpoint(directory: pathlib.Path) -> bool:
    """Whether a stage's folder holds one that is complete."""
    return bool(_steps(directory))


def load_variables(
    directory: pathlib.Path, like: State, keep: Literal["best", "last"] | int
) -> tuple[Variables, JsonObject]:
    """Variables and validation record (with its `step`) of a stage's checkpoint.

    Args:
      directory: a stage's folder of checkpoints.
      like: the state's shapes, types and shardings.
      keep: which checkpoint, as `TrainConfig.keep`; or the step of one.

    Raises:
      InputError: there is no checkpoint, or its files are not as they were written.
    """
    if not has_checkpoint(directory):
        raise InputError(f"{directory}: no checkpoint found: train that stage first")
    checkpoints = Checkpoints(directory)
    chosen = {"best": checkpoints.best_step, "last": checkpoints.latest_step}
    step = keep if isinstance(keep, int) else chosen[keep]()
    assert step is not None
    damage = checksums.damage(directory / str(step))
    if damage is not None:
        raise InputError(
            f"{directory / str(step)}: {damage}, and it is the checkpoint to use: copy it again, "
            "or move it away and train on"
        )
    contents, record = checkpoints.load(like, step), checkpoints.record(step) or {"score": None}
    checkpoints.close()
    return contents["state"].variables, record | {"step": step}
