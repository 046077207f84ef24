"""Classification of images: one stage, on the sampled slices of a scan.

The model's module has `build(options, data, layout)`, whose network takes slices `(N, T, H, W, 1)`
and gives `logits (N, class)`; and `losses(options, logits, label, class_weights)`, per scan.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepsc_jax.data.batch import Reads
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.geometry.sampling import slice_indices
from deepsc_jax.models.layers.blocks import standardise
from deepsc_jax.runtime import compiler
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


class ImageClassification(System):
    """A network that classifies a scan by its sampled slices."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One."""
        of_stage = self.config.stage("classification")
        reads = Reads(slices=True)
        return (Stage("classification", reads, ("classes",), of_stage.steps, of_stage.batch),)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Fresh variables of the network."""
        return without_perturbations(self.network.init(key, self._inputs(batch), train=False))

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        """The model's terms."""
        del stage
        out, changed = self.network.apply(
            variables, self._inputs(batch), train=True, mutable=carried_of(variables)
        )
        weights = facts["class_weights"]
        terms = self.model.losses(self.config.model, out["logits"], batch["label"], weights)
        return terms, dict(changed)

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> Outputs:
        """The network's `logits` and `maps`, by running statistics."""
        del stage
        return self.network.apply(variables, self._inputs(batch), train=False)

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Class probabilities."""
        return {"probabilities": jax.nn.softmax(self.outputs(stage, variables, batch)["logits"])}

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        """None."""
        del stage
        return ()

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        """The network on a scan's sampled slices."""
        del whole_scans
        data = self.config.data
        options = compiler.options(jax.default_backend(), data.tile, self.layout.form)

        @functools.partial(jax.jit, compiler_options=options)
        def program(variables: Variables, batch: Batch) -> Array:
            return self.measures(stage, variables, batch)["probabilities"][0]

        def predict(volume: Float[np.ndarray, "depth height width"]) -> Prediction:
            slices = volume[slice_indices(len(volume), data.slices)]
            probabilities = program(variables, {"slices": jnp.asarray(slices[None])})
            return Prediction(classes=np.asarray(probabilities))

        return predict

    def _inputs(self, batch: Batch) -> Array:
        data = self.config.data
        return standardise(batch["slices"], data.intensity_mean, data.intensity_sd)[..., None]
