"""Pre-trainings of another run, in place of one's own (`train --init_from`)."""

import dataclasses
import pathlib
from collections.abc import Mapping

from deepsc_jax.config import Config, DataConfig
from deepsc_jax.config.run import differences
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import described
from deepsc_jax.systems.system import Stage, System
from deepsc_jax.training import checksums
from deepsc_jax.training.checkpoint import newest_and_chosen

# Of preprocessing: how far scans are padded, and which doubts about them were noted.
_SEEN_BY_NO_NETWORK = {"depth_bucket", "depth_buckets", "allow"}


@dataclasses.dataclass(frozen=True)
class Taken:
    """A stage's checkpoint of another run.

    Attributes:
      run: the folder of that run.
      step: of the checkpoint.
      digest: `checksums.digest` of it.
      store: digest of the store that it is trained on.
    """

    run: str
    step: int
    digest: str
    store: str

    def __post_init__(self) -> None:
        if [type(x) for x in dataclasses.astuple(self)] != [str, int, str, str]:
            raise TypeError(f"what was taken of a run is {self!r:.80}")


def take(
    runs: Mapping[pathlib.Path, tuple[Config, str]], ours: Config, our_store: str
) -> dict[str, Taken]:
    """The checkpoint to use of each stage that another starts from, or is taught by.

    Whatever the losses, the optimizer and the number of steps were: the network must be the same.

    Args:
      runs: by folder, complete runs or some whose pre-trainings are, with their configurations and
        the digests of the stores that they are trained on.
      ours: of the run that starts from them.
      our_store: the same of it.

    Raises:
      InputError: one is of another model, network or preprocessing, or of another fold of the same
        store; a stage is complete in none of them, or damaged; or no stage starts from another.
    """
    system = described(ours)
    names = [stage.name for stage in system.stages if _is_pretraining(stage, system)]
    for run, (theirs, store) in runs.items():
        _require_alike(run, theirs, ours, same_store=store == our_store)
        if not names:
            raise InputError(
                f"--init_from={run}: --model={ours.name} has no stage that starts from another: "
                "leave it out"
            )
    return {name: _chosen(runs, name) for name in names}


def _is_pretraining(stage: Stage, system: System) -> bool:
    return any(stage.name in other.before for other in system.stages)


def _require_alike(run: pathlib.Path, theirs: Config, ours: Config, *, same_store: bool) -> None:
    """Refuse a run of another model, network or preprocessing."""
    if theirs.name != ours.name:
        raise InputError(
            f"--init_from={run}: a run of --model={theirs.name}, and --model={ours.name} was asked "
            "for: name a run of that model"
        )
    changed = differences(theirs, ours)
    seen = {f.name for f in dataclasses.fields(DataConfig)} - _SEEN_BY_NO_NETWORK
    seen |= {f"{ours.name}.{option}" for option in described(ours).network_options}
    if same_store:  # or it has learnt from patients who are validation here
        seen.add("fold")
    other = [text for flag, text in changed.items() if flag in seen]
    if other:
        raise InputError(
            f"--init_from={run}: its network was trained with other settings ({'; '.join(other)}): "
            "give the same flags, or name another run"
        )


def _chosen(runs: Mapping[pathlib.Path, tuple[Config, str]], name: str) -> Taken:
    """A stage's checkpoint of the first run in which it is complete."""
    lacking = ""
    for run, (theirs, store) in runs.items():
        steps = theirs.stage(name).steps
        newest, chosen = newest_and_chosen(run / name, theirs.train.keep)
        if newest != steps:
            lacking = lacking or (
                f"--init_from={run}: its stage {name} was trained for {newest} of {steps} steps: "
                f"train it to its end (--stage={name} --workdir={run}), or name another run"
            )
            continue
        folder = run / name / str(chosen)
        damage = checksums.damage(folder)
        if damage is not None:
            raise InputError(f"--init_from={run}: {folder}: {damage}: copy it again")
        return Taken(str(run), chosen, checksums.digest(folder), store)
    if len(runs) > 1:
        lacking = (
            f"--init_from: none of {len(runs)} runs has the stage {name} trained to its end: train "
            f"it (--stage={name}), or name its run as well"
        )
    raise InputError(lacking)


def require_unchanged(taken: Taken, name: str) -> pathlib.Path:
    """The folder of the stage's checkpoints, where the one that was taken is as it was.

    Raises:
      InputError: it is gone, or another.
    """
    folder = pathlib.Path(taken.run, name)
    found = checksums.digest(folder / str(taken.step))
    if found != taken.digest:
        raise InputError(
            f"{folder / str(taken.step)}: not the checkpoint that this run was begun from, whose "
            f"digest is {taken.digest[:12]}: put it back, or begin another --workdir"
        )
    return folder
