"""Weights to and from PyTorch.

    python -m deepsc_jax.interop.torch --from=WORKDIR --to=weights.safetensors
    python -m deepsc_jax.interop.torch --flagfile=FLAGS --from=weights.pth --to=WORKDIR

WORKDIR is a training run's folder. From it, the best checkpoint of `--stage` (default: the last
one trained) becomes a `state_dict` in a .safetensors or .pth file; to it, such a file becomes a
run that `predict` and `evaluate` read, with the configuration of the flags.

The names are those of the network's table; the values are the same bits, their axes in the other
order. A .pth file is read without unpickling code. Needs the extra `torch`.
"""

import contextlib
import pathlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.torch
import torch
from absl import flags

from deepsc_jax.inference import predictor
from deepsc_jax.models import registry
from deepsc_jax.models.torch_names import Rule
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import folder_aside, local_path, own, require_own, require_writable
from deepsc_jax.runtime.types import PyTree
from deepsc_jax.systems.building import build, stages_of
from deepsc_jax.systems.system import Stage, System, Variables, initial
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints

StateDict = dict[str, torch.Tensor]
Params = dict[str, PyTree]
Shapes = dict[str, tuple[int, ...]]
Table = Sequence[Rule]
SUFFIXES = (".safetensors", ".pth")
MEAN, COUNT = "running_mean", "num_batches_tracked"  # of a batch norm


def to_torch(variables: Params, table: Table, collection: str = "params") -> StateDict:
    """The `state_dict` of one collection of Flax variables, or of a part such as `lesion` alone.

    Beside running statistics stands PyTorch's `num_batches_tracked`, 0: it reads it only where
    there is no momentum.

    Raises:
      InputError: names that the table does not have, all of them.
    """
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    rules = [rule for rule in table if rule.collection == collection]
    weights = {
        name: torch.from_numpy(_outward(np.asarray(flat[ours]), rule))
        for ours, (name, rule) in _rename(flat, "flax", "torch", rules).items()
    }
    norms = [name.removesuffix(MEAN) for name in weights if name.endswith(MEAN)]
    return weights | {norm + COUNT: torch.tensor(0) for norm in norms}


def variables_to_torch(variables: Variables, table: Table) -> StateDict:
    """The `state_dict` of all collections of a network's variables.

    Raises:
      InputError: names that the table does not have, all of them.
    """
    weights: StateDict = {}
    for collection, values in variables.items():
        weights |= to_torch(values, table, collection)
    return weights


def variables_from_torch(
    weights: Mapping[str, torch.Tensor], table: Table, like: Variables
) -> Variables:
    """All collections of `like` from a `state_dict`, as numpy arrays.

    Raises:
      InputError: as `from_torch`.
    """
    return {name: from_torch(weights, table, values, name) for name, values in like.items()}


def from_torch(
    weights: Mapping[str, torch.Tensor],
    table: Table,
    like: Params | None = None,
    collection: str = "params",
) -> Params:
    """The Flax variables of a `state_dict` that belong to `collection`, as numpy arrays.

    Args:
      weights: whole, or a part such as the lesion subnet alone.
      table: of the network.
      like: variables, or their `jax.ShapeDtypeStruct`s, that they must fit.
      collection: `params`, or `batch_stats`.

    Raises:
      InputError: names that the table does not have or, with `like`, that are missing, unexpected
        or of another shape: all of them in one message; or tensors of fewer bits than float32.
    """
    weights = {name: x for name, x in weights.items() if not name.endswith(COUNT)}
    if like is not None:
        others = [rule for rule in table if rule.collection != collection]
        shapes = {name: tuple(x.shape) for name, x in weights.items() if not _known(name, others)}
        _check_fit(shapes, _torch_shapes(like, table))
    renamed = {
        name: (ours, rule)
        for name, (ours, rule) in _rename(weights, "torch", "flax", table).items()
        if rule.collection == collection
    }
    counters = _counters(like)
    inexact = [
        name
        for name, (ours, _) in renamed.items()
        if weights[name].dtype not in counters.get(ours, (torch.float32, torch.float64))
    ]
    if inexact:
        raise InputError(
            f"weights: {inexact[0]} is {weights[inexact[0]].dtype} ({len(inexact)} such), expected "
            f"{_wanted(renamed[inexact[0]][0], counters)}"
        )
    flat = {
        ours: _inward(weights[name].detach().cpu().numpy(), rule)
        for name, (ours, rule) in renamed.items()
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def read(path: pathlib.Path) -> StateDict:
    """Read the `state_dict` in a .safetensors or .pth file.

    Raises:
      InputError: there is none, the file is broken, or it holds anything but tensors by name.
    """
    try:
        if _suffix(path) == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, and reading it could run code: save a plain "
            "state_dict with torch.save(model.state_dict(), path)"
        ) from error
    except InputError:
        raise
    except Exception as error:  # of whatever kind torch and safetensors raise for a broken file
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}): give a file of weights") from error
    tensors = isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in weights.items()
    )
    if not tensors:
        raise InputError(
            f"{path}: found {type(weights).__name__}, expected tensors by name: save a plain "
            "state_dict with torch.save(model.state_dict(), path)"
        )
    return dict(weights)


def write(weights: StateDict, path: pathlib.Path) -> None:
    """Write a `state_dict`.

    Raises:
      InputError: the name ends in neither .safetensors nor .pth, or what has it was written or
        changed by somebody else.
    """
    suffix = _suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with own(path) as partial:
        if suffix == ".safetensors":
            safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, partial)
        else:
            torch.save(weights, partial)


def save_run(
    system: System, stage: Stage, variables: Variables, threshold: float, workdir: pathlib.Path
) -> None:
    """Write a folder that `predict` reads: no training, one step; lesion is p >= `threshold`.

    Raises:
      InputError: `workdir` exists.
    """
    if workdir.exists():
        raise InputError(f"{workdir}: exists already: give --to another folder")
    with folder_aside(workdir) as partial:
        thresholds = {stage.name: threshold}
        workdirs.write(partial, workdirs.Record(system.config, "unknown data", "", thresholds))
        checkpoints = Checkpoints(partial / stage.name, writer=True)
        state = states.create(system, stage, jax.tree.map(jnp.asarray, variables))
        checkpoints.save(state, {"next_index": 0})
        checkpoints.wait()
        checkpoints.close()


def run_variables(system: System, weights: StateDict) -> Variables:
    """The variables of a `state_dict`; what does not go to PyTorch is as at the start.

    Raises:
      InputError: as `from_torch`.
    """
    exported = system.exported(expected(system))
    loaded = variables_from_torch(weights, system.torch_names, exported)
    if expected(system).keys() == loaded.keys():
        return loaded
    return initial(system) | loaded


def expected(system: System) -> Variables:
    """Shapes and types of the network's variables."""
    return jax.eval_shape(lambda: initial(system))


def _suffix(path: pathlib.Path) -> str:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    return path.suffix


def _rename(
    names: Iterable[str], source: str, target: str, table: Table
) -> dict[str, tuple[str, Rule]]:
    """The other side's name, and the rule, of every name."""
    rules = [(_pattern(getattr(rule, source)), rule) for rule in table]
    renamed, unknown = {}, []
    for name in names:
        matches = [(match, rule) for pattern, rule in rules if (match := pattern.fullmatch(name))]
        if matches:
            match, rule = matches[0]
            renamed[name] = (getattr(rule, target).format(**match.groupdict()), rule)
        else:
            unknown.append(name)
    if unknown:
        raise InputError(f"weights: unexpected names: {', '.join(sorted(unknown))}")
    return renamed


def _known(name: str, table: Table) -> bool:
    return any(_pattern(rule.torch).fullmatch(name) for rule in table)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[a-z0-9]+)", re.escape(template)))


def _outward(values: np.ndarray, rule: Rule) -> np.ndarray:
    """Always a copy: torch may write to what it is given."""
    if rule.axes is None:
        return values.copy()
    new = tuple(i for i, axis in enumerate(rule.axes) if axis < 0)
    kept = tuple(axis for axis in rule.axes if axis >= 0)
    return np.array(np.expand_dims(values.transpose(kept), new), order="C")


def _inward(values: np.ndarray, rule: Rule) -> np.ndarray:
    if rule.axes is None:
        return values.copy()
    kept = tuple(axis for axis in rule.axes if axis >= 0)
    lean = values.reshape(values.shape[: len(kept)])
    return np.array(lean.transpose(np.argsort(kept)), order="C")


def _counters(like: Params | None) -> dict[str, tuple[torch.dtype]]:
    """The types of what is no floating-point number, such as counters, by our names."""
    flat: Params = flax.traverse_util.flatten_dict(like or {}, sep="/")
    return {
        name: (torch.from_numpy(np.empty(0, x.dtype)).dtype,)
        for name, x in flat.items()
        if not np.issubdtype(x.dtype, np.floating)
    }


def _wanted(name: str, counters: Mapping[str, tuple[torch.dtype]]) -> str:
    if name in counters:
        return str(counters[name][0])
    return "float32: convert them with .float() first"


def _torch_shapes(like: Params, table: Table) -> Shapes:
    flat: Params = flax.traverse_util.flatten_dict(like, sep="/")
    shapes = {}
    for ours, (name, rule) in _rename(flat, "flax", "torch", table).items():
        shape = tuple(flat[ours].shape)
        axes = rule.axes or range(len(shape))
        shapes[name] = tuple(1 if axis < 0 else shape[axis] for axis in axes)
    return shapes


def _check_fit(given: Shapes, wanted: Shapes) -> None:
    problems = []
    if missing := sorted(wanted.keys() - given.keys()):
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(given.keys() - wanted.keys()):
        problems.append(f"unexpected: {', '.join(unexpected)}")
    misshaped = [
        f"{name} is {given[name]}, expected {wanted[name]}"
        for name in sorted(given.keys() & wanted.keys())
        if given[name] != wanted[name]
    ]
    if misshaped:
        problems.append(f"of another shape: {', '.join(misshaped)}")
    if problems:
        raise InputError(
            f"weights do not fit the network: {'; '.join(problems)}: give the flags of the network "
            "they were trained in"
        )


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Put the file in front of what is wrong with its weights."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


CONFIG = registry.config_flags()


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    flags.DEFINE_string("from", None, "Run's --workdir, or file of weights.", required=True)
    flags.DEFINE_string("to", None, "File of weights, or new run's --workdir.", required=True)
    flags.DEFINE_string("stage", None, "Whose checkpoint; default: the last one.")
    flags.DEFINE_float(
        "threshold", 0.5, "Of lesion probability, for a new run: run.json of the old one has it."
    )


def main() -> None:
    """Convert `--from` to `--to`."""
    options = flags.FLAGS
    source, target = (local_path(name, getattr(options, name)) for name in ("from", "to"))
    require_writable("to", target.parent)
    if source.is_dir() or target.suffix in SUFFIXES:
        _suffix(target)
        require_own(target)
    if source.is_dir():
        trained = predictor.load(source, options.stage)
        system = build(trained.config, "cpu")
        weights = variables_to_torch(system.exported(trained.variables), system.torch_names)
        write(weights, target)
    elif target.suffix in SUFFIXES:
        weights = read(source)
        with _naming(source):
            names = [name for name in weights if not name.endswith(COUNT)]
            _rename(names, "torch", "flax", registry.torch_names(options.model))
        write(weights, target)
    else:
        system, weights = build(CONFIG.config(), "cpu"), read(source)
        stage = stages_of(system.config, options.stage or "all")[-1]
        with _naming(source):
            variables = run_variables(system, weights)
        save_run(system, stage, variables, options.threshold, target)
        print(f"lesion is p >= {options.threshold:g}: weights do not say; see --threshold")
    print(f"written: {target}")


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, CONFIG.parse)


if __name__ == "__main__":
    run()
