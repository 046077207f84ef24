"""DeepSC-COVID over a whole scan: lesion and class probabilities and evidence.

F_c is computed once per scan; tiles that hold lung pass through one program in chunks, each adding
its share of to_scan(F_s) and to_scan(S) to sums on the slice grid; then the classifier runs. Only
those sums and two chunks of tiles are on the device.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepsc_jax.config import Ints3
from deepsc_jax.data.prediction import Prediction, Volume
from deepsc_jax.geometry import grids
from deepsc_jax.geometry.sampling import slice_indices
from deepsc_jax.models.deepsc.network import DeepSC, evidence
from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.types import PyTree
from deepsc_jax.systems.system import Outputs, Stage, Variables
from deepsc_jax.systems.whole_scan import averaged, chunks, covering_tile, cut

SHARED = ("scan_features", "scan_lesion")  # what tiles add up to on the slice grid


class JointPredictor:
    """A stage's network, ready for any number of scans.

    With `sees_lesions=False` the lesions that it found are kept from its classifier.
    """

    def __init__(
        self,
        network: DeepSC,
        stage: Stage,
        variables: Variables,
        *,
        whole_scans: bool = False,
        sees_lesions: bool = True,
    ):
        self._sees_lesions = sees_lesions
        self._network, self._stage, self._variables = network, stage, variables
        self._data, self._whole_scans = network.data, whole_scans
        jit = functools.partial(
            jax.jit,
            compiler_options=compiler.options(
                jax.default_backend(), network.data.tile, network.layout.form
            ),
        )
        self._features = jit(self._call("slice_features"))
        self._segment = jit(self._call("segment"))
        self._mix = jit(self._call("mix_features"))
        self._classify = jit(self._classify_program)
        self._evidence = jit(self._evidence_program, static_argnums=3)

    def __call__(self, volume: Float[np.ndarray, "depth height width"]) -> Prediction:
        """Predict one preprocessed scan (`preprocess.Prepared.volume`)."""
        depth = jnp.asarray([len(volume)], jnp.int32)
        slices = features = sums = None
        volumes: dict[str, Volume] = {}
        if "classes" in self._stage.learns:
            sampled = volume[slice_indices(len(volume), self._data.slices)]
            slices = jnp.asarray(sampled[None])
            features = self._features(self._variables, slices)
        if "lesions" in self._stage.learns:
            volumes["lesion"], sums = self._lesions(volume, depth, features)
        if features is None or slices is None:
            return Prediction(volumes)
        if sums is None:
            scan_lesion = jnp.zeros((*features.shape[:-1], 1), features.dtype)
        else:
            features = self._mix(self._variables, features, sums["scan_features"])
            scan_lesion = sums["scan_lesion"] * self._sees_lesions
        out = self._classify(self._variables, features, scan_lesion, slices)
        masks = self._evidence_masks(out["evidence"], depth, volume)
        return Prediction(volumes, np.asarray(out["probabilities"][0]), masks)

    def _covering(self, depth: int) -> Ints3 | None:
        """The one tile of a scan, of a network that was trained on such."""
        step = self._network.model.tile_step
        return covering_tile(self._data, depth, step) if self._whole_scans else None

    def _call(self, method: str) -> Callable[..., PyTree]:
        def program(variables: Variables, *arguments: Array) -> PyTree:
            return self._network.apply(variables, *arguments, method=method)

        return program

    def _classify_program(
        self, variables: Variables, features: Array, scan_lesion: Array, slices: Array
    ) -> Outputs:
        out = self._call("classify")(variables, features, scan_lesion, slices)
        masks = evidence(out, jnp.argmax(out["logits"], axis=-1))
        return {"probabilities": jax.nn.softmax(out["logits"]), "evidence": masks}

    def _evidence_program(
        self, masks: tuple[Array, ...], origins: Array, depth: Array, tile: Ints3
    ) -> Array:
        """The masks on tiles at `origins (K, 3)`: `(K, 3, d, h, w)`."""
        data = self._data

        def one(origin: Array) -> Array:
            target = grids.tile_grid(origin, tile, depth[0])
            parts = []
            for level, mask in enumerate(masks, start=1):
                source = grids.slice_grid(depth[0], data.slices, data.working_size, 2**level)
                parts.append(grids.to_tile(mask[0, ..., None], source, target)[..., 0])
            return jnp.stack(parts)

        return jax.vmap(one)(origins)

    def _lesions(
        self, volume: np.ndarray, depth: Array, features: Array | None
    ) -> tuple[np.ndarray, dict[str, Array] | None]:
        sums = None
        covering = self._covering(len(volume))

        def segmented() -> Iterator[tuple[Array, np.ndarray]]:
            nonlocal sums
            for origins, corners in chunks(
                self._data, len(volume), covering=covering, masked=volume
            ):
                tiles = jnp.asarray(cut(volume, origins, covering or self._data.tile)[None])
                where = jnp.asarray(origins[None])
                out = self._segment(self._variables, tiles, where, depth, features)
                if features is not None:
                    share = {name: out[name] for name in SHARED}
                    sums = share if sums is None else jax.tree.map(jnp.add, sums, share)
                yield out["lesion"][0, ..., 0], corners

        lesion = averaged(volume.shape, segmented())
        return lesion, sums

    def _evidence_masks(
        self, masks: tuple[Array, ...], depth: Array, volume: np.ndarray
    ) -> dict[str, Volume]:
        covering = self._covering(len(volume))
        masked = (
            (self._evidence(masks, jnp.asarray(o), depth, covering or self._data.tile), corners)
            for o, corners in chunks(self._data, len(volume), covering=covering, masked=volume)
        )
        whole = averaged(volume.shape, masked) * (volume > 0)
        return {f"evidence_{level}": mask for level, mask in enumerate(whole, start=1)}
