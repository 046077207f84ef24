"""Segmentation of patches: one stage, on tiles of a scan.

The model's module has `build(options, data, layout)`, whose network takes tiles `(N, d, h, w, 1)`
and the real slices of each, and gives `logits (N, d, h, w, class)`, background first; and
`losses(options, logits, truth, valid)`, per tile. Its options are `PatchOptions`.

Where the lungs are given, tiles are masked by them (`standardise`); where they are to be found as
well (`--mask=none`), tiles are z-scores of the whole scan, whose minimum lies beyond its end.
"""

import functools
from collections.abc import Iterator
from typing import Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepsc_jax.config import ModelOptions, Plateau, VoxelClass
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.classes import IDS
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.preprocess import intensity_of
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
from deepsc_jax.systems.watching import lesion_figures, plane, telling_slice
from deepsc_jax.systems.whole_scan import averaged, chunks, covering_tile, cut

DEVIATION_EPSILON = 1e-6  # of a z-score, MIScnn's


class PatchOptions(ModelOptions, Protocol):
    """What this task asks of a model's options."""

    @property
    def voxel_classes(self) -> tuple[VoxelClass, ...]:
        """What the network's outputs are of, background first, `lesion` among the others."""
        ...

    @property
    def overlap(self) -> float:
        """Share of a tile that its neighbours cover as well, in prediction."""
        ...

    @property
    def plateau(self) -> Plateau | None:
        """When the learning rate is reduced; None where it goes by the step alone."""
        ...


class PatchSegmentation(System):
    """A network that segments tiles, each by itself."""

    @property
    def options(self) -> PatchOptions:
        """What the model's options say of the task."""
        return cast(PatchOptions, self.config.model)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One."""
        of_stage = self.config.stage("segmentation")
        lungs = {"left_lung", "right_lung"} & set(self.options.voxel_classes)
        step = 1 if self.config.data.mask == "none" else Reads.origin_step
        reads = Reads(tiles="drawn", classes=bool(lungs), origin_step=step)
        return (Stage("segmentation", reads, ("lesions",), of_stage.steps, of_stage.batch),)

    def plateau(self, stage: Stage) -> Plateau | None:
        """As the model's options say."""
        del stage
        return self.options.plateau

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
        truth = self._truth(batch).reshape(tiles.shape[:-1])
        terms = self.model.losses(self.config.model, out["logits"], truth, valid)
        scans = len(batch["depth"])
        return {name: x.reshape(scans, -1).mean(axis=1) for name, x in terms.items()}, dict(changed)

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> Outputs:
        """`lesion (scan, tile, d, h, w)`, `probabilities (..., class)`, the network's `maps`."""
        del stage
        tiles, valid = self._inputs(batch)
        out = self.network.apply(variables, tiles, valid, train=False)
        probabilities = jax.nn.softmax(out["logits"])
        probabilities = probabilities.reshape(*batch["tiles"].shape, -1)
        lesion = probabilities[..., self.options.voxel_classes.index("lesion")]
        return {"lesion": lesion, "probabilities": probabilities, "maps": out["maps"]}

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """DSC at every threshold, over all tiles of a scan."""
        lesion, truth = self._found(stage, variables, batch)
        return {"dice": dice_at_thresholds(lesion, truth)}

    def watched(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Figures of lesions; the scan, its lesions and what was found in one slice."""
        lesion, truth = self._found(stage, variables, batch)
        free = batch["label"] == self.config.data.lesion_free_id
        origins, size = batch["origins"], self.config.data.working_size
        slices = telling_slice(truth, origins, batch["depth"])
        volumes = {"scan": batch["tiles"], "truth": truth.astype(lesion.dtype), "lesion": lesion}
        pictures = {name: plane(x, origins, slices, size) for name, x in volumes.items()}
        return lesion_figures(lesion, truth, free, batch["voxel_ml"]) | pictures

    def _found(self, stage: Stage, variables: Variables, batch: Batch) -> tuple[Array, Array]:
        """Lesion probabilities of all tiles, where they count, and which voxels are lesion."""
        lesion = self.outputs(stage, variables, batch)["lesion"]
        if self.config.data.mask == "lungs":
            real = batch["tiles"] > 0  # outside of the lungs nothing is predicted
        else:
            slices = batch["origins"][..., 0, None] + jnp.arange(lesion.shape[2])
            real = (slices < batch["depth"][:, None, None])[..., None, None]
        truth = self._truth(batch) == self.options.voxel_classes.index("lesion")
        return lesion * real, truth

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        """The lesion probability, and those of the lungs where they are found."""
        del stage
        others = [n for n in self.options.voxel_classes if n not in ("background", "lesion")]
        return ("lesion", *others)

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        """The network over a whole scan, chunk by chunk of its tiles."""
        data, names, step = self.config.data, self.volumes(stage), self.options.tile_step
        ids = jnp.asarray([self.options.voxel_classes.index(cast(VoxelClass, n)) for n in names])
        options = compiler.options(jax.default_backend(), data.tile, self.layout.form)

        @functools.partial(jax.jit, compiler_options=options)
        def program(variables: Variables, batch: Batch) -> Array:
            probabilities = self.outputs(stage, variables, batch)["probabilities"][0]
            return jnp.moveaxis(probabilities[..., ids], -1, 1)

        def segmented(volume: np.ndarray) -> Iterator[tuple[Array, np.ndarray]]:
            facts, fill = {"depth": jnp.asarray([len(volume)], jnp.int32)}, 0.0
            if data.mask == "none":
                intensity = intensity_of(volume)
                facts["intensity"], fill = jnp.asarray([intensity], jnp.float32), intensity[0]
            covering = covering_tile(data, len(volume), step) if whole_scans else None
            tile = covering or data.tile
            depth, height, width = (max(1, int(n * (1 - self.options.overlap))) for n in tile)
            masked = volume if data.mask == "lungs" else None
            stride = (depth, height, width)
            for origins, corners in chunks(data, len(volume), stride, covering, masked):
                tiles = jnp.asarray(cut(volume, origins, tile, fill)[None])
                batch = {"tiles": tiles, "origins": jnp.asarray(origins[None]), **facts}
                yield program(variables, batch), corners

        def predict(volume: Float[np.ndarray, "depth height width"]) -> Prediction:
            found = averaged(volume.shape, segmented(volume))
            return Prediction(dict(zip(names, found, strict=True)))

        return predict

    def _truth(self, batch: Batch) -> Int[Array, "scan tile d h w"]:
        """The network's class of every voxel; what it does not tell apart is background."""
        if "classes" not in batch:
            return batch["lesions"].astype(jnp.int32)
        names = self.options.voxel_classes
        ours = [names.index(cast(VoxelClass, n)) if n in names else 0 for n in IDS]
        return jnp.asarray(ours, jnp.int32)[batch["classes"]]

    def _inputs(self, batch: Batch) -> tuple[Array, Array]:
        """All tiles in a row, `(N, d, h, w, 1)`, and the real slices of each, `(N,)`."""
        data, tiles = self.config.data, batch["tiles"]
        if data.mask == "none":
            least, mean, deviation = batch["intensity"].T[..., None, None, None, None]
            # What lies beyond a scan is its minimum. Augmented values may be anything else.
            shown = (jnp.where(tiles == 0, least, tiles) - mean) / (deviation + DEVIATION_EPSILON)
        else:
            shown = standardise(tiles, data.intensity_mean, data.intensity_sd)
        valid = jnp.clip(batch["depth"][:, None] - batch["origins"][..., 0], 0, tiles.shape[2])
        return shown.reshape(-1, *tiles.shape[2:], 1), valid.reshape(-1)
