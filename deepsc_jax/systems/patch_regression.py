"""Regression of clinical indicators from patches of lesions: one stage.

A case is a stack of patches (`--patches`), of which up to `--slices` are read; what it is given is
the mean over them. The model's module has `build(options, data, layout)`, whose network takes
patches `(N, H, W, 3)` and a weight for each, 0 for what only fills up, and gives `values
(N, indicator)`; and `losses(config, outputs, carried, targets)`, per patch.

Networks see indicators as shares of the way from the least to the largest of the training cases.
These ends are carried, so that a trained network answers in the case list's own units.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepsc_jax.data.batch import Reads
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.store import StoredCase
from deepsc_jax.metrics.regression import fit, fits
from deepsc_jax.models.layers.blocks import standardise
from deepsc_jax.models.torch_names import Rule
from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.system import (
    Batch,
    Facts,
    Losses,
    Outputs,
    Predict,
    Stage,
    System,
    Variables,
    carried_of,
    without_perturbations,
)

SCALE = "scale"  # the collection of `low` and `high`, the ends of each indicator
CHANNELS = 3


class PatchRegression(System):
    """A network that gives numbers for a case by its patches."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One."""
        of_stage = self.config.stage("regression")
        reads = Reads(slices=True, targets=True)
        return (Stage("regression", reads, ("values",), of_stage.steps, of_stage.batch),)

    @property
    def torch_names(self) -> tuple[Rule, ...]:
        """The model's, and the ends of each indicator."""
        return (*self.model.TORCH_NAMES, Rule("{name}", f"{SCALE}.{{name}}", collection=SCALE))

    def init(self, key: Array, batch: Batch) -> Variables:
        """Fresh variables of the network; until it is trained indicators are as they are."""
        patches, weights = self._inputs(batch)
        fresh = without_perturbations(self.network.init(key, patches, weights, train=False))
        zeros = jnp.zeros(len(self.config.data.indicators))
        return {**fresh, SCALE: {"low": zeros, "high": zeros + 1}}

    def facts(self, stage: Stage, cases: Sequence[StoredCase]) -> Facts:
        """`low` and `high (indicator,)`, the ends of each in training; 0 and 1 for no cases.

        Raises:
          InputError: an indicator is the same in all cases.
        """
        del stage
        names = self.config.data.indicators
        if not cases:
            return {"low": jnp.zeros(len(names)), "high": jnp.ones(len(names))}
        targets = np.array([case.targets for case in cases])
        low, high = targets.min(axis=0), targets.max(axis=0)
        for name, least, largest in zip(names, low, high, strict=True):
            if not least < largest:
                raise InputError(
                    f"--indicators: {name} is {least:g} in each of the {len(cases)} training "
                    "cases, two values or more expected: correct the case list, or prepare and "
                    "train without it"
                )
        return {"low": jnp.asarray(low, float), "high": jnp.asarray(high, float)}

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        """The model's terms, each the mean over a case's patches."""
        del stage
        patches, weights = self._inputs(batch)
        network = _of_network(variables)
        out, changed = self.network.apply(
            network, patches, weights, train=True, mutable=carried_of(network)
        )
        scale = {name: facts[name] for name in ("low", "high")}
        targets = jnp.repeat(_shares(batch["targets"], scale), batch["slices"].shape[1], axis=0)
        terms, carried = self.model.losses(self.config, out, dict(changed), targets)
        means = {name: _over_patches(term, batch) for name, term in terms.items()}
        return means, {**carried, SCALE: scale}

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> Outputs:
        """`values (case, indicator)` as shares, the mean over patches; the patches' `maps`."""
        del stage
        patches, weights = self._inputs(batch)
        out = self.network.apply(_of_network(variables), patches, weights, train=False)
        return {"values": _over_patches(out["values"], batch), "maps": out["maps"]}

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """What is given and what is true, as shares."""
        values = self.outputs(stage, variables, batch)["values"]
        return {"values": values, "targets": _shares(batch["targets"], variables[SCALE])}

    def record(self, stage: Stage, rows: Mapping[str, np.ndarray]) -> dict[str, float | None]:
        """`mse` of the shares, by which checkpoints are scored; the mean `r` of indicators."""
        del stage
        truth, given = rows["targets"], rows["values"]
        defined = [one.r for one in fits(truth, given) if np.isfinite(one.r)]
        mse = fit(np.ravel(truth), np.ravel(given)).mse
        return {"mse": mse, "r": float(np.mean(defined)) if defined else None, "score": -mse}

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        """None."""
        del stage
        return ()

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        """The network on each of a case's patches, and the mean in the indicators' own units."""
        del whole_scans
        data = self.config.data
        options = compiler.options(jax.default_backend(), data.tile, self.layout.form)

        @functools.partial(jax.jit, compiler_options=options)
        def program(variables: Variables, batch: Batch) -> Array:
            return self.outputs(stage, variables, batch)["values"][0]

        low, high = (np.asarray(variables[SCALE][name], float) for name in ("low", "high"))

        def predict(volume: Float[np.ndarray, "patch height width"]) -> Prediction:
            depth = jnp.ones(1, jnp.int32)  # one by one: cases differ in how many there are
            batches = [{"slices": jnp.asarray(one[None, None]), "depth": depth} for one in volume]
            shares = np.mean([np.asarray(program(variables, one)) for one in batches], axis=0)
            values = low + (high - low) * shares
            return Prediction(values=dict(zip(data.indicators, values.tolist(), strict=True)))

        return predict

    def _inputs(self, batch: Batch) -> tuple[Array, Array]:
        """All patches in a row, grey three times, and 0 for each that repeats the one before."""
        data, slices = self.config.data, batch["slices"]
        shown = standardise(slices, data.intensity_mean, data.intensity_sd)
        patches = shown.reshape(-1, *slices.shape[2:], 1)
        weights = _patch_weights(batch).reshape(-1).astype(patches.dtype)
        return jnp.repeat(patches, CHANNELS, axis=-1), weights


def _patch_weights(batch: Batch) -> Float[Array, "case patch"]:
    """1 for each of a case's patches and 0 where it is repeated (`sampling.slice_indices`)."""
    count = batch["slices"].shape[1]
    indices = jnp.arange(count) * batch["depth"][:, None] // count
    return (jnp.diff(indices, prepend=-1) > 0).astype(jnp.float32)


def _over_patches(x: Float[Array, "patches *rest"], batch: Batch) -> Float[Array, "case *rest"]:
    """The mean over each case's patches, each once."""
    weights = _patch_weights(batch).astype(x.dtype)
    x = x.reshape(*weights.shape, *x.shape[1:])
    spread = weights.reshape(*weights.shape, *[1] * (x.ndim - 2))
    return (x * spread).sum(axis=1) / spread.sum(axis=1)


def _shares(
    targets: Float[Array, "case indicator"], scale: Mapping[str, Float[Array, "indicator"]]
) -> Float[Array, "case indicator"]:
    return (targets - scale["low"]) / (scale["high"] - scale["low"])


def _of_network(variables: Variables) -> Variables:
    """Without what the network's module knows nothing of."""
    return {name: values for name, values in variables.items() if name != SCALE}
