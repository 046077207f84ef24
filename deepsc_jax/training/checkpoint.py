"""Checkpoints through Orbax: state, data order and validation result together."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from deepsc_jax.errors import InputError
from deepsc_jax.training.state import State

policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one stage: the newest, and the best on validation.

    A checkpoint holds the state, the data iterator's place, and `record`: a JSON object with the
    validation result (`score`, `threshold`, ...). Saving is asynchronous.
    """

    def __init__(self, directory: pathlib.Path, *, writer: bool = False):
        self.directory = directory
        best: Any = policies.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        keep: Any = policies.AnyPreservationPolicy([policies.LatestN(1), best])
        always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            preservation_policy=keep,
            save_decision_policy=always,
            cleanup_tmp_directories=writer,
        )

    def save(self, state: State, data_state: Any, record: dict[str, Any] | None) -> None:
        """Save in the background; `record` is the validation result of this very step, if any."""
        contents = {"state": state, "data": data_state, "record": record or {"score": None}}
        metrics = {"score": record["score"]} if record else None
        self._checkpointer.save_checkpointables_async(
            int(state.step), contents, metrics=metrics, overwrite=True
        )

    def latest_step(self) -> int | None:
        """The newest step saved, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def best_step(self) -> int | None:
        """The step with the highest score, or the newest where none was scored."""
        found: Any = self._checkpointer.checkpoints
        scored = [(c.metrics["score"], c.step) for c in found if c.metrics]
        return max(scored)[1] if scored else self.latest_step()

    def load(self, like: State, step: int) -> dict[str, Any]:
        """`state`, laid out as `like` is, `data` and `record` of the checkpoint at `step`."""
        wanted = {"state": jax.tree.map(_abstract, like), "data": None, "record": None}
        return self._checkpointer.load_checkpointables(step, wanted)

    def wait(self) -> None:
        """Return when everything is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Finish saving and let go of the directory."""
        self._checkpointer.close()


def _abstract(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def has_checkpoint(directory: pathlib.Path) -> bool:
    """Whether a stage's folder holds one that is complete."""
    return directory.is_dir() and any(child.name.isdecimal() for child in directory.iterdir())


def load_params(directory: pathlib.Path, like: State) -> tuple[Any, dict[str, Any]]:
    """Parameters and validation record (with its `step`) of a stage's best checkpoint.

    Args:
      directory: a stage's folder of checkpoints.
      like: the state's shapes, types and shardings.

    Raises:
      InputError: there is no checkpoint.
    """
    if not has_checkpoint(directory):
        raise InputError(f"{directory}: no checkpoint found: train that stage first")
    checkpoints = Checkpoints(directory)
    step = checkpoints.best_step()
    assert step is not None
    contents = checkpoints.load(like, step)
    checkpoints.close()
    return contents["state"].params, contents["record"] | {"step": step}
