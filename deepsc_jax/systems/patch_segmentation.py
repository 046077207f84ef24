"""Segmentation of patches: one stage, on tiles of a scan.

The model's module has `build(options, data, layout)`, whose network takes tiles `(N, d, h, w, 1)`
and the real slices of each, and gives `logits (N, d, h, w, class)`, background first; and
`losses(options, logits, truth, valid)`, per tile.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepsc_jax.data.batch import Reads
from deepsc_jax.data.prediction import Prediction
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
    dice_at_thresholds,
    without_perturbations,
)
from deepsc_jax.systems.whole_scan import chunks, cut, one_behind, paste


class PatchSegmentation(System):
    """A network that segments tiles, each by itself."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One."""
        of_stage = self.config.stage("segmentation")
        reads = Reads(tiles="drawn")
        return (Stage("segmentation", reads, ("lesions",), of_stage.steps, of_stage.batch),)

    def init(self, key: Array, batch: Batch) -> Variables:
        """Fresh variables of the network."""
        tiles, valid = self._inputs(batch)
        return without_perturbations(self.network.init(key, tiles, valid, train=False))

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        """The model's terms, each the mean over a scan's tiles."""
        del stage, facts
        tiles, valid = self._inputs(batch)
        out, changed = self.network.apply(
            variables, tiles, valid, train=True, mutable=carried_of(variables)
        )
        truth = batch["lesions"].reshape(tiles.shape[:-1]).astype(jnp.int32)
        terms = self.model.losses(self.config.model, out["logits"], truth, valid)
        scans = len(batch["depth"])
        return {name: x.reshape(scans, -1).mean(axis=1) for name, x in terms.items()}, dict(changed)

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> Outputs:
        """`lesion (scan, tile, d, h, w)`: the probability of the first class but the background."""
        del stage
        tiles, valid = self._inputs(batch)
        out = self.network.apply(variables, tiles, valid, train=False)
        lesion = jax.nn.softmax(out["logits"])[..., 1]
        return {"lesion": lesion.reshape(batch["tiles"].shape), "maps": out["maps"]}

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """DSC at every threshold, over all tiles of a scan."""
        lesion = self.outputs(stage, variables, batch)["lesion"]
        real = batch["tiles"] > 0  # outside of the lungs nothing is predicted
        return {"dice": dice_at_thresholds(lesion * real, batch["lesions"])}

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        """The lesion probability."""
        del stage
        return ("lesion",)

    def predictor(self, stage: Stage, variables: Variables) -> Predict:
        """The network over a whole scan, chunk by chunk of its tiles."""
        data = self.config.data
        options = compiler.options(jax.default_backend(), data.tile, self.layout.form)

        @functools.partial(jax.jit, compiler_options=options)
        def program(variables: Variables, batch: Batch) -> Array:
            return self.outputs(stage, variables, batch)["lesion"][0]

        def segmented(volume: np.ndarray) -> Iterator[tuple[Array, np.ndarray]]:
            depth = jnp.asarray([len(volume)], jnp.int32)
            for origins, corners in chunks(data, len(volume)):
                tiles = jnp.asarray(cut(volume, origins, data.tile)[None])
                batch = {"tiles": tiles, "origins": jnp.asarray(origins[None]), "depth": depth}
                yield program(variables, batch), corners

        def predict(volume: Float[np.ndarray, "depth height width"]) -> Prediction:
            lesion = np.zeros_like(volume)
            for tiles, corners in one_behind(segmented(volume)):
                paste(lesion, tiles, corners)
            return Prediction({"lesion": lesion})

        return predict

    def _inputs(self, batch: Batch) -> tuple[Array, Array]:
        """All tiles in a row, `(N, d, h, w, 1)`, and the real slices of each, `(N,)`."""
        data, tiles = self.config.data, batch["tiles"]
        shown = standardise(tiles, data.intensity_mean, data.intensity_sd)
        valid = jnp.clip(batch["depth"][:, None] - batch["origins"][..., 0], 0, tiles.shape[2])
        return shown.reshape(-1, *tiles.shape[2:], 1), valid.reshape(-1)
