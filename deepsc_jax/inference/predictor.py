"""Inference: a preprocessed scan in, lesion and class probabilities and evidence out.

F_c is computed once per scan; tiles pass through one program in chunks, each adding its share of
to_scan(F_s) and to_scan(S) to sums on the slice grid; then the classifier runs. Only those sums and
two chunks of tiles are on the device, so memory does not grow with the scan, and the programs'
shapes do not depend on it: a second scan never compiles again.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepsc_jax.config import STAGES, Config, Stage
from deepsc_jax.data.pipeline import slice_indices
from deepsc_jax.geometry import grids
from deepsc_jax.inference.results import Network, Prediction
from deepsc_jax.models.deepsc import network as deepsc
from deepsc_jax.runtime import device_mesh
from deepsc_jax.training import state as states
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import has_checkpoint, load_params

CHUNK_VOXELS = 2**21  # of tiles that pass through the network at once


class SegmentsScans(Protocol):
    """What an evaluation asks of a trained network, ours or another's."""

    config: Config
    threshold: float

    def __call__(self, volume: Float[np.ndarray, "depth height width"], /) -> Prediction:
        """Predict one preprocessed scan."""
        ...


class Predictor:
    """A trained network, ready for any number of scans.

    Attributes:
      config: the configuration it was trained with, but for its devices.
      stage: the stage whose best checkpoint it is.
      threshold: lesion probability from which a voxel is lesion, chosen on validation; 0.5 without.
      trained_on: `phantoms`, `scans`, or `unknown data`.
    """

    def __init__(
        self, config: Config, stage: Stage, params: Any, threshold: float, trained_on: str
    ):
        self.config, self.threshold = config, threshold
        self.stage: Stage = stage
        self.trained_on = trained_on
        self._params = params
        alone = dataclasses.replace(config.platform, space=1)
        self._model = deepsc.build(
            dataclasses.replace(config, platform=alone), jax.default_backend()
        )
        jit = functools.partial(
            jax.jit,
            compiler_options=device_mesh.compiler_options(
                jax.default_backend(), config.data, self._model.layout.form
            ),
        )
        self._features = jit(self._call("slice_features"))
        self._segment = jit(self._call("segment"))
        self._mix = jit(self._call("mix_features"))
        self._classify = jit(self._classify_program)
        self._evidence = jit(self._evidence_program)

    def __call__(self, volume: Float[np.ndarray, "depth height width"]) -> Prediction:
        """Predict one preprocessed scan (`preprocess.Prepared.volume`)."""
        depth = jnp.asarray([len(volume)], jnp.int32)
        features = sums = out = lesion = None
        if self.stage != "segmentation":
            slices = volume[slice_indices(len(volume), self.config.data.slices)]
            features = self._features(self._params, jnp.asarray(slices[None]))
        if self.stage != "classification":
            shared = features if self.stage == "joint" else None
            lesion, sums = self._lesions(volume, depth, shared)
        if features is not None:
            if sums is None:
                scan_lesion = jnp.zeros((*features.shape[:-1], 1), features.dtype)
            else:
                features = self._mix(self._params, features, sums["scan_features"])
                scan_lesion = sums["scan_lesion"]
            out = self._classify(self._params, features, scan_lesion)
        if out is None:
            return Prediction(lesion, None, None)
        evidence = self._evidence_masks(out["evidence"], depth, len(volume), volume.dtype)
        return Prediction(lesion, np.asarray(out["probabilities"][0]), evidence)

    @property
    def params(self) -> Any:
        """The network's parameters."""
        return self._params

    @property
    def network(self) -> Network:
        """What results say of this network."""
        return Network(self.config.data, self.stage, self.threshold, self.trained_on, self._digest)

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self.config.model)).encode())
        for path, leaf in jax.tree.leaves_with_path(self._params):
            array = np.asarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _call(self, method: str) -> Any:
        def program(params: Any, *arguments: Array) -> Any:
            return self._model.apply({"params": params}, *arguments, method=method)

        return program

    def _classify_program(self, params: Any, features: Array, scan_lesion: Array) -> dict:
        out = self._call("classify")(params, features, scan_lesion)
        masks = deepsc.evidence(out, jnp.argmax(out["logits"], axis=-1))
        return {"probabilities": jax.nn.softmax(out["logits"]), "evidence": masks}

    def _evidence_program(self, masks: tuple[Array, ...], origins: Array, depth: Array) -> Array:
        """The masks on tiles at `origins (K, 3)`: `(K, 3, d, h, w)`."""
        data = self.config.data

        def one(origin: Array) -> Array:
            target = grids.tile_grid(origin, data.tile, depth[0])
            parts = []
            for level, mask in enumerate(masks, start=1):
                source = grids.slice_grid(depth[0], data.slices, data.working_size, 2**level)
                parts.append(grids.to_tile(mask[0, ..., None], source, target)[..., 0])
            return jnp.stack(parts)

        return jax.vmap(one)(origins)

    def _lesions(
        self, volume: np.ndarray, depth: Array, features: Array | None
    ) -> tuple[np.ndarray, dict[str, Array] | None]:
        lesion = np.zeros_like(volume)
        sums = None

        def segmented() -> Iterator[tuple[Array, np.ndarray]]:
            nonlocal sums
            for origins, corners in self._chunks(len(volume)):
                tiles = [_cut(volume, origin, self.config.data.tile) for origin in origins]
                out = self._segment(
                    self._params,
                    jnp.asarray(np.stack(tiles)[None]),
                    jnp.asarray(origins[None]),
                    depth,
                    features,
                )
                if features is not None:
                    share = {name: out[name] for name in ("scan_features", "scan_lesion")}
                    sums = share if sums is None else jax.tree.map(jnp.add, sums, share)
                yield out["lesion"][0, ..., 0], corners

        for found, corners in _one_behind(segmented()):
            for tile, corner in zip(np.asarray(found), corners, strict=False):
                _paste(lesion, tile, corner)
        return lesion, sums

    def _evidence_masks(self, masks: Any, depth: Array, slices: int, dtype: np.dtype) -> np.ndarray:
        evidence = np.zeros((3, slices, *self.config.data.working_size), dtype)
        masked = (
            (self._evidence(masks, jnp.asarray(origins), depth), corners)
            for origins, corners in self._chunks(slices)
        )
        for found, corners in _one_behind(masked):
            for tile, corner in zip(np.asarray(found), corners, strict=False):
                for level in range(3):
                    _paste(evidence[level], tile[level], corner)
        return evidence

    def _chunks(self, depth: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tile origins in chunks of one size, filled up beyond the scan, and the real ones."""
        data = self.config.data
        counts = data.tile_counts(depth)
        corners = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), axis=-1)
        corners = (corners.reshape(-1, 3) * np.asarray(data.tile)).astype(np.int32)
        size = max(1, CHUNK_VOXELS // int(np.prod(data.tile)))
        if jax.default_backend() == "cpu":
            size = min(size, 4)
        for start in range(0, len(corners), size):
            real = corners[start : start + size]
            beyond = np.full((size - len(real), 3), (counts[0] * data.tile[0], 0, 0), np.int32)
            yield np.concatenate([real, beyond]), real


def _one_behind(
    dispatched: Iterator[tuple[Array, np.ndarray]],
) -> Iterator[tuple[Array, np.ndarray]]:
    """Each item once the next is dispatched: the device computes while the host reads."""
    last = next(dispatched)
    for item in dispatched:
        yield last
        last = item
    yield last


def _cut(volume: np.ndarray, origin: np.ndarray, tile: tuple[int, int, int]) -> np.ndarray:
    part = volume[tuple(slice(o, o + t) for o, t in zip(origin, tile, strict=True))]
    return np.pad(part, [(0, t - n) for t, n in zip(tile, part.shape, strict=True)])


def _paste(volume: np.ndarray, tile: np.ndarray, origin: np.ndarray) -> None:
    depth, height, width = (int(o) for o in origin)
    room = volume[depth : depth + tile.shape[0], height:, width:]
    room[:, : tile.shape[1], : tile.shape[2]] = tile[: len(room)]


def load(
    workdir: pathlib.Path, stage: Stage | None = None, form: Literal["auto", "direct"] = "auto"
) -> Predictor:
    """The best checkpoint of a training run.

    Args:
      workdir: the run's `--workdir`.
      stage: whose checkpoint; by default the last stage that has one.
      form: of its convolutions (`PlatformConfig.conv_form`).

    Raises:
      InputError: no run or no checkpoint there, or this device has not that form.
    """
    record = workdirs.read(workdir)
    # In whichever form and on however many devices it was trained, the weights are the same.
    platform = dataclasses.replace(record.config.platform, conv_form=form, space=1)
    config = dataclasses.replace(record.config, platform=platform)
    trained: list[Stage] = [s for s in STAGES if has_checkpoint(workdir / s)]
    chosen: Stage = stage or (trained[-1] if trained else "joint")
    model = deepsc.build(config, jax.default_backend())
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(
        lambda: states.create(config, chosen, states.initial_params(config, model))
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    params, validated = load_params(workdir / chosen, like)
    threshold = record.thresholds.get(chosen) or validated.get("threshold") or 0.5
    return Predictor(config, chosen, params, threshold, record.trained_on)
