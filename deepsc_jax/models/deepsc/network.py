"""DeepSC-COVID: the paper's Figure 2.

    scan -- tiles  --> inception_seg --> F_s --+
         -- slices --> inception_cls --> F_c --+
                                 cross-stitch <+
      F_L = a_LL F_s + a_LC to_tile(F_c)     F_C = a_CL sum_k to_scan(F_s,k) + a_CC F_c
      F_L --> lesion subnet --> S_1..S_4 --> S
      F_C, to_scan(S) --> classification subnet --> logits, M_1..M_3

S is the lesion probability and S_1..S_4 its scales; M_1..M_3 are the evidence masks.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from deepsc_jax.config import DataConfig, Ints3
from deepsc_jax.geometry import grids
from deepsc_jax.models.deepsc.classifier import Classifier, evidence_masks
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.models.deepsc.cross_stitch import CrossStitch
from deepsc_jax.models.deepsc.inception import Inception
from deepsc_jax.models.deepsc.lesion import LesionSubnet
from deepsc_jax.models.deepsc.torch_names import TORCH_NAMES
from deepsc_jax.models.layers.blocks import (
    masked,
    pool_mask,
    real_slices,
    recomputed,
    standardise,
)
from deepsc_jax.models.layers.layout import Layout, Volume
from deepsc_jax.runtime.types import PyTree

__all__ = ["TORCH_NAMES", "DeepSC", "build", "evidence"]  # of a registry's row

Tiles = Float[Array, "batch tile d h w"]
Slices = Float[Array, "batch slice height width"]
StageName = Literal["segmentation", "classification", "joint"]
FEATURE_STEP = 2  # in-plane stride of inception_cls, so the step of the slice grid's features


class DeepSC(nn.Module):
    """The joint network; `stage` chooses which parts run.

    `segmentation` and `classification` run one task alone: the cross-stitch unit is the identity
    and the classifier's lesion input is zero. `joint` runs everything.
    """

    model: Options
    data: DataConfig
    layout: Layout = Layout()

    def setup(self) -> None:
        config, layout = self.model, self.layout
        branches = (config.inception, config.inception_branches, config.inception_channels)
        groups = config.norm_groups
        inception = recomputed(Inception, layout.remat_blocks)
        self.inception_seg = inception(*branches, groups, 1, layout)
        self.inception_cls = inception(*branches, groups, FEATURE_STEP, layout)
        self.cross_stitch = CrossStitch(config.cross_stitch, config.cross_stitch_init)
        self.lesion = LesionSubnet(config.lesion_channels, config.scale_weights, groups, layout)
        self.classifier = Classifier(
            len(self.data.classes),
            config.classifier_stem_channels,
            config.encoder_channels,
            groups,
            layout,
        )

    def __call__(self, batch: dict[str, Array], stage: StageName, gradient_tiles: int = 0) -> dict:
        """Run `stage` on a batch.

        Args:
          batch: what the stage needs of `tiles (B, K, d, h, w)`, `origins (B, K, 3)`,
            `slices (B, T, H, W)` and `depth (B,)`, the true number of slices.
          stage: `segmentation`, `classification` or `joint`.
          gradient_tiles: joint stage: only the first so many tiles carry gradient; 0 for all.

        Returns:
          `lesion (B, K, d, h, w, 1)` and `scales` (S_1..S_4 of every tile); `logits (B, class)`,
          `maps`, `weights` and `lungs` for `evidence`; each where the stage has it.
        """
        if stage == "segmentation":
            return self.segment(batch["tiles"], batch["origins"], batch["depth"])
        slices = batch["slices"]
        features = self.slice_features(slices)
        if stage == "classification":
            return self.classify(features, jnp.zeros_like(features[..., :1]), slices)

        tiles, origins, depth = batch["tiles"], batch["origins"], batch["depth"]
        count = gradient_tiles or tiles.shape[1]
        out = self.segment(tiles[:, :count], origins[:, :count], depth, features)
        if count < tiles.shape[1]:
            rest = self.segment(tiles[:, count:], origins[:, count:], depth, features)
            out = _append(out, lax.stop_gradient(rest))
        mixed, lesion = self.mix_features(features, out["scan_features"]), out["scan_lesion"]
        if self.model.lesion_gradient == "stopped":
            lesion = lax.stop_gradient(lesion)
        return out | self.classify(mixed, lesion, slices)

    def slice_features(self, slices: Slices) -> Volume:
        """F_c `(B, T, H / 2, W / 2, channel)`."""
        return self.inception_cls(self._standardise(slices)[..., None], inside(slices))

    def mix_features(self, features: Volume, scan_features: Volume) -> Volume:
        """C-features F_C from F_c and the sum of to_scan(F_s) over all tiles."""
        stitch = self.cross_stitch()
        return (stitch[1, 0] * scan_features + stitch[1, 1] * features).astype(features.dtype)

    def segment(
        self,
        tiles: Tiles,
        origins: Int[Array, "batch tile 3"],
        depth: Int[Array, "batch"],
        features: Volume | None = None,
    ) -> dict:
        """Segment tiles; with F_c (`features`), also bring F_s and S to the slice grid.

        Returns `lesion`, `scales` and, with `features`, the sums over the tiles `scan_features`
        and `scan_lesion` `(B, T, H / 2, W / 2, channel)`.
        """
        if not self.layout.loop_tiles or self.is_initializing():
            return self._segment(tiles, origins, depth, features)

        def one_tile(
            module: "DeepSC", sums: PyTree, item: tuple[Array, Array]
        ) -> tuple[PyTree, PyTree]:
            tile, origin = item
            out = module._segment(tile[:, None], origin[:, None], depth, features)
            added = {k: out.pop(k) for k in ("scan_features", "scan_lesion") if k in out}
            return jax.tree.map(jnp.add, sums, added), jax.tree.map(lambda x: x[:, 0], out)

        sums = {}
        if features is not None:
            wide = jnp.promote_types(features.dtype, jnp.float32)
            lesion = jnp.zeros_like(features[..., :1], wide)
            sums = {"scan_features": jnp.zeros_like(features), "scan_lesion": lesion}
        body = nn.remat(one_tile, prevent_cse=False) if self.layout.remat_tiles else one_tile
        scan = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        sums, out = scan(self, sums, (tiles, origins))
        return {**out, **sums}

    def _segment(self, tiles: Tiles, origins: Array, depth: Array, features: Volume | None) -> dict:
        batch, count, *tile = tiles.shape
        shape = (tile[0], tile[1], tile[2])
        valid = jnp.clip(depth[:, None] - origins[..., 0], 0, tile[0]).reshape(-1)
        flat = tiles.reshape(batch * count, *tile)
        lungs = inside(flat) & real_slices(valid, tile[0])
        tile_features = self.inception_seg(self._standardise(flat)[..., None], lungs)
        sums = {}
        if features is None:
            mixed = tile_features
        else:
            # The weights stay float32, and so does the sum over all voxels that is their gradient.
            stitch = self.cross_stitch()
            shared = self._to_tiles(features, origins, depth, shape)
            shared = shared.reshape(tile_features.shape)
            mixed = stitch[0, 0] * tile_features + stitch[0, 1] * shared
            mixed = masked(mixed.astype(tile_features.dtype), lungs)
        lesion, scales = self.lesion(mixed, lungs, valid)
        if features is not None:
            sums["scan_features"] = self._to_scan(tile_features, origins, depth)
            sums["scan_lesion"] = self._to_scan(lesion, origins, depth)

        def unfold(x: Array) -> Array:
            return x.reshape(batch, count, *x.shape[1:])

        return {"lesion": unfold(lesion), "scales": tuple(map(unfold, scales))} | sums

    def classify(self, features: Volume, scan_lesion: Volume, slices: Slices) -> dict:
        """Logits, maps and weights from F_C and the lesions on the slice grid."""
        lungs = pool_mask(inside(slices), (1, FEATURE_STEP, FEATURE_STEP))
        return self.classifier(features, scan_lesion, lungs)

    def _standardise(self, x: Array) -> Array:
        return standardise(x, self.data.intensity_mean, self.data.intensity_sd)

    def _slice_grid(self, depth: Array, step: int) -> grids.Grid:
        return grids.slice_grid(depth, self.data.slices, self.data.working_size, step)

    def _to_tiles(self, features: Volume, origins: Array, depth: Array, tile: Ints3) -> Array:
        """F_c on every tile's grid: `(B, K, d, h, w, channel)`."""

        def one(x: Array, origin: Array, true_depth: Array) -> Array:
            source = self._slice_grid(true_depth, FEATURE_STEP)
            return grids.to_tile(x, source, grids.tile_grid(origin, tile, true_depth))

        per_tile = jax.vmap(one, in_axes=(None, 0, None))
        return jax.vmap(per_tile)(features, origins, depth)

    def _to_scan(self, x: Array, origins: Array, depth: Array) -> Array:
        """The sum over tiles of `x (B * K, d, h, w, channel)` on the slice grid."""
        batch, count = origins.shape[:2]
        tile = (x.shape[1], x.shape[2], x.shape[3])

        def one(part: Array, origin: Array, true_depth: Array) -> Array:
            source = grids.tile_grid(origin, tile, true_depth)
            return grids.to_scan(part, source, self._slice_grid(true_depth, FEATURE_STEP))

        per_tile = jax.vmap(one, in_axes=(0, 0, None))
        parts = jax.vmap(per_tile)(x.reshape(batch, count, *x.shape[1:]), origins, depth)
        return parts.sum(axis=1)


def inside(
    volume: Float[Array, "batch depth height width"],
) -> Bool[Array, "batch depth height width 1"]:
    """The lungs' voxels: what lies outside of them is 0, and nothing inside is."""
    return (volume > 0)[..., None]


def _append(first: dict, second: dict) -> dict:
    """Results of two groups of tiles as one: tiles in a row, sums added."""
    joined = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1),
        {k: first[k] for k in ("lesion", "scales")},
        {k: second[k] for k in ("lesion", "scales")},
    )
    return joined | {k: first[k] + second[k] for k in ("scan_features", "scan_lesion")}


def evidence(out: dict, classes: Int[Array, "batch"]) -> tuple[Array, ...]:
    """Evidence masks M_1, M_2, M_3 of one class per scan, on the slice grid."""
    return evidence_masks(out["maps"], out["weights"], out["lungs"], classes)


def build(options: Options, data: DataConfig, layout: Layout) -> DeepSC:
    """The network of the registry's row."""
    return DeepSC(options, data, layout)
