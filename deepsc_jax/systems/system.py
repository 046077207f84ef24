"""What the engine asks of whatever it trains: the interface between it and all models.

A model is a Flax module; a system is a task with its data that a model is put into. The engine
(training, inference, planning, benchmarks, weights to and from PyTorch) knows systems alone: no
model by name, no stage by name, and no loss.

Variables are Flax's: the collection `params` is trained; the others (batch statistics, counters,
teachers) are carried: the losses return them as they are after a batch, equal on all devices.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from deepsc_jax.config import Config, Plateau, SgdConfig
from deepsc_jax.data import batch as batches
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.store import StoredCase
from deepsc_jax.metrics.classification import macro_auc
from deepsc_jax.metrics.overlap import THRESHOLDS, best_threshold
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.models.torch_names import Rule
from deepsc_jax.runtime.types import PyTree, Untyped
from deepsc_jax.systems import optimizers, sgd

Task = Literal["lesions", "classes", "values"]
Variables = dict[str, PyTree]
Batch = dict[str, Array]
Outputs = dict[str, PyTree]  # what a network computes, by name
Facts = dict[str, Array]
Losses = dict[str, Float[Array, "example"]]
Predict = Callable[[Float[np.ndarray, "depth height width"]], Prediction]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage.

    Attributes:
      name: of its checkpoints' folder, its flags and its lines in the log.
      reads: what its batches hold.
      learns: its tasks, by which checkpoints are scored.
      steps: optimizer steps.
      batch: scans in a global batch.
      after: the stages whose checkpoints it starts from.
      fold: a fold of the training split's patients that it does not see, counted from 0, and how
        many folds there are; None for all patients.
      taught_by: of each teacher its stages, one a fold. Their `logits`, of the cases that they have
        not seen, are the soft labels of this stage, which reads them.
    """

    name: str
    reads: Reads
    learns: tuple[Task, ...]
    steps: int
    batch: int
    after: tuple[str, ...] = ()
    fold: tuple[int, int] | None = None
    taught_by: tuple[tuple[str, ...], ...] = ()

    @property
    def before(self) -> tuple[str, ...]:
        """The names of the stages that must be trained first."""
        return (*self.after, *itertools.chain.from_iterable(self.taught_by))


class System(abc.ABC):
    """A task with its data, and the model that is put into it.

    Attributes:
      config: the configuration.
      layout: how a device computes the network.
      model: the module of the network.
    """

    def __init__(self, config: Config, layout: Layout, model: ModuleType):
        """Put `model`, a module of the registry, into this task."""
        self.config, self.layout, self.model = config, layout, model

    @functools.cached_property
    def network(self) -> Untyped:
        """The model's Flax module, as its options and the layout have it."""
        return self.model.build(self.config.model, self.config.data, self.layout)

    @property
    def torch_names(self) -> tuple[Rule, ...]:
        """The parameters' names in PyTorch."""
        return self.model.TORCH_NAMES

    def exported(self, variables: Variables) -> Variables:
        """The collections that go to PyTorch: those that a rule of `torch_names` is of.

        Parameters and running statistics; what is of training alone, as a teacher, has no rule.
        """
        named = {rule.collection for rule in self.torch_names}
        return {name: variables[name] for name in variables if name in named}

    @property
    def network_options(self) -> frozenset[str]:
        """The names of the model's options that change what the network computes, given weights.

        Here all but those of stages.
        """
        options = self.config.model
        return frozenset(
            name
            for name in options.__dataclass_fields__
            if not dataclasses.is_dataclass(getattr(options, name))
        )

    @property
    @abc.abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The stages, in order."""

    def of(self, stage: Stage) -> "System":
        """The system that trains `stage`, of the same stages: here always this one.

        Another where a stage trains another network, as a teacher; the same for all its folds.
        """
        del stage
        return self

    @abc.abstractmethod
    def init(self, key: Array, batch: Batch) -> Variables:
        """Fresh variables of all parts, for a batch of `init_reads`."""

    @property
    def init_reads(self) -> Reads:
        """What a batch must hold for `init`: what the last stage reads."""
        return self.stages[-1].reads

    def start(self, stage: Stage, fresh: Variables, trained: Mapping[str, Variables]) -> Variables:
        """The variables at the start of `stage`.

        Args:
          stage: the stage.
          fresh: from `init`.
          trained: of the best checkpoint of each stage that this one comes `after`, by name.
        """
        del stage, trained
        return fresh

    def facts(self, stage: Stage, cases: Sequence[StoredCase]) -> Facts:
        """Arrays of the training split that the losses use; for no cases, as if classes were even.

        Here `class_weights (class,)`: N / (classes * n_c), inverse class frequency.
        """
        del stage
        labels = [case.label for case in cases]
        counts = np.bincount(labels, minlength=len(self.config.data.classes))
        return {"class_weights": inverse_frequency(jnp.asarray(counts))}

    @abc.abstractmethod
    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        """Every loss term of each example, with their weighted sum `loss`; and what is carried."""

    def weighted(self, stage: Stage, terms: Losses) -> Losses:
        """What each term of `losses` adds to `loss`, for watching: here as it is logged."""
        del stage
        return {name: term for name, term in terms.items() if name != "loss"}

    def watched(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """What is watched of validation besides `measures`, per example, on the device.

        A figure `(example,)` is logged as the mean over the examples of which it is not nan; a
        picture `(example, height, width)`, of values from 0 to 1, is shown beside the others.
        `batch` also holds `voxel_ml (example,)`, the volume of a voxel. Here nothing.
        """
        del stage, variables, batch
        return {}

    def watched_parameters(self, stage: Stage, params: PyTree) -> dict[str, Array]:
        """Scalars among the parameters that are watched in training: here none."""
        del stage, params
        return {}

    @abc.abstractmethod
    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> Outputs:
        """What the network gives for a batch, by name, as it predicts.

        `lesion` (probabilities of tiles) and `logits (example, class)`, each where the stage learns
        it; besides, whatever a system's own code needs.
        """

    @abc.abstractmethod
    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Per example, on the device, for `record`: by a network as it predicts.

        `dice (example, threshold)` at `THRESHOLDS` on the working grid, nan without lesions;
        `probabilities (example, class)`; each where the stage learns it; `logits (example, class)`
        where the stage teaches another.
        """

    def record(self, stage: Stage, rows: Mapping[str, np.ndarray]) -> dict[str, float | None]:
        """The validation record: its `score` decides which checkpoint is the best.

        Here the mean DSC at `best_threshold` plus the macro AUC, each where the stage learns it.

        Args:
          stage: the stage.
          rows: `measures` of all scans, and their `label`.
        """
        del stage
        record: dict[str, float | None] = {"dsc": None, "threshold": None, "auc": None}
        if "dice" in rows:
            means = np.nanmean(rows["dice"], axis=0)
            best = best_threshold(means)
            record |= {"dsc": float(means[best]), "threshold": THRESHOLDS[best]}
        if "probabilities" in rows:
            record["auc"] = macro_auc(rows["label"], rows["probabilities"])
        record["score"] = (record["dsc"] or 0.0) + (record["auc"] or 0.0)
        return record

    def plateau(self, stage: Stage) -> Plateau | None:
        """When the learning rate is reduced; None where it goes by the step alone."""
        del stage
        return None

    def learning_rate(self, stage: Stage) -> optax.Schedule:
        """The learning rate by step, but for what a plateau takes from it.

        By the stage's options where they are an `SgdConfig`; else by the shared ones, or, where
        there is a `plateau`, constant.
        """
        of_stage = self.config.stage(stage.name)
        if isinstance(of_stage, SgdConfig):
            return sgd.rate(of_stage)
        if self.plateau(stage) is not None:
            return optax.constant_schedule(of_stage.learning_rate)
        return optimizers.learning_rate(self.config.train, of_stage)

    def optimizer(self, stage: Stage) -> optax.GradientTransformationExtraArgs:
        """The optimizer of `stage`, which is told the loss as `value`: SGD, Adam, or AdamW."""
        of_stage = self.config.stage(stage.name)
        if isinstance(of_stage, SgdConfig):
            return optax.with_extra_args_support(sgd.sgd(of_stage))
        chosen = optimizers.chosen(self.config.train, self.learning_rate(stage))
        plateau = self.plateau(stage)
        if plateau is None:
            return optax.with_extra_args_support(chosen)
        return optax.chain(chosen, reduction(plateau, of_stage.learning_rate))

    def rate_taken(self, stage: Stage, step: Array, opt_state: optax.OptState) -> Array:
        """The learning rate of a step, given the optimizer's state after it."""
        rate = jnp.asarray(self.learning_rate(stage)(step))
        if self.plateau(stage) is None:
            return rate
        # By the state's name: a norm's parameters have a `scale` as well.
        return rate * optax.tree.get(opt_state, "ReduceLROnPlateauState").scale

    def warnings(self, stage: Stage, step: int, carried: Variables) -> tuple[str, ...]:
        """What whoever trains must hear after `step` steps: here nothing.

        It is asked after each step, which waits where what is carried is looked at: do so seldom.
        """
        del stage, step, carried
        return ()

    @abc.abstractmethod
    def volumes(self, stage: Stage) -> tuple[str, ...]:
        """The names of the volumes and then of the evidence that `predictor` gives."""

    @abc.abstractmethod
    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        """A function from a preprocessed scan (D, H, W) to what the network says of it.

        Args:
          stage: the stage.
          variables: the network's.
          whole_scans: it was trained on scans that were one tile each: a deeper scan is one deeper
            tile, so that norms see what they saw, the extent of a scan.
        """

    def broken(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> dict[str, Predict]:
        """Networks that are broken on purpose, by what was done to them: here none.

        Evidence that stays as it is when a network no longer knows what it learnt explains nothing.
        Arguments as of `predictor`.
        """
        del stage, variables, whole_scans
        return {}

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def seed(self, stage: Stage) -> int:
        """Of the stage's order, tiles and augmentation: another one for every run and stage."""
        return self.config.train.seed * len(self.stages) + self.stages.index(stage) + 1


def reduction(plateau: Plateau, rate: float) -> optax.GradientTransformationExtraArgs:
    """Scales updates that were made with `rate`; the last step of a window is the first reduced."""
    return optax.contrib.reduce_on_plateau(
        factor=plateau.factor,
        patience=plateau.patience,
        rtol=0.0,
        atol=plateau.min_delta,
        cooldown=plateau.cooldown,
        accumulation_size=plateau.window,
        min_scale=min(1.0, plateau.floor / rate) if rate > 0 else 0.0,
    )


def inverse_frequency(counts: Float[Array, "class"]) -> Float[Array, "class"]:
    """N / (classes * n_c) of each class; a class without an example counts as one."""
    counts = jnp.maximum(jnp.asarray(counts, jnp.result_type(float)), 1)
    return counts.sum() / (counts.shape[0] * counts)


def carried_of(variables: Variables) -> list[str]:
    """The collections that are carried, for Flax's `mutable`."""
    return [name for name in variables if name != "params"]


def without_perturbations(variables: Mapping[str, PyTree]) -> Variables:
    """Fresh variables but for those by which a gradient of a map is taken: shapes of a batch."""
    return {name: values for name, values in variables.items() if name != "perturbations"}


def dice_at_thresholds(
    probability: Float[Array, "example *voxels"], truth: Float[Array, "example *voxels"]
) -> Float[Array, "example threshold"]:
    """The DSC of each example at every one of `THRESHOLDS`; nan where the truth is empty."""
    truth = truth > 0
    axes = tuple(range(1, truth.ndim))
    volume = truth.sum(axes)
    rows = []
    for threshold in THRESHOLDS:
        lesion = probability >= threshold
        overlap = (lesion & truth).sum(axes)
        rows.append(2 * overlap / jnp.maximum(lesion.sum(axes) + volume, 1))
    dice = jnp.stack(rows, axis=1)
    return jnp.where(volume[:, None] > 0, dice, jnp.nan)


def initial(system: System) -> Variables:
    """Fresh variables, drawn from the configuration's seed."""
    init = jax.jit(system.init)
    seed = system.config.train.seed
    key = jax.random.key(seed, impl="rbg")  # compiles in a quarter of threefry's time
    variables = init(key, batches.zeros(system.init_reads, system.config.data))
    return without_perturbations(variables)
