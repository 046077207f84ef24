"""Batches from a store: random access, counter-based randomness, one shape for a whole run.

A batch is a dictionary of numpy arrays (B scans, K tiles each, T slices, tile size d, h, w):

    tiles    (B, K, d, h, w) float32   masked, normalised intensities
    lesions  (B, K, d, h, w) float32   0 or 1
    origins  (B, K, 3) int32           working-grid voxel of each tile's corner
    slices   (B, T, H, W) float32      C_i = V[floor(i D / T)]
    depth    (B,) int32                the scan's true number of slices, D
    label    (B,) int32                index into config.CLASSES

The segmentation stage has no `slices`; the classification stage has no `tiles`, `lesions` and
`origins`. An evaluation (`train=False`) has all of them in every stage, and two more:

    valid    (B,) bool                 False for what only fills up the last batch
    case     (B,) int32                index into store.cases(split)

Every scan of a split is padded with zeros to the largest depth bucket of the split, so that a run
compiles one shape.

Order. Element g of the endless global stream is a pure function of (seed, g): which scan, from an
epoch-wise shuffle, and every random choice made for it. Process p of P takes the elements p, p + P,
p + 2P, ...: its batch n holds elements of the global batch n. So a run may go on with another
number of processes: with the same global batch size each step sees the same scans, tiles and
augmentation, only their place within the batch differs. An iterator's state is its count of
batches, the same in every process. With the same number of processes and devices a restarted run
computes the same numbers to the last bit; with another number, sums are taken in another order.
"""

import dataclasses
import os
from typing import Any

import grain
import numpy as np

from deepsc_jax.config import Config, Stage
from deepsc_jax.data import augment
from deepsc_jax.data.store import Store, StoredCase
from deepsc_jax.runtime.errors import InputError

ORIGIN_STEP = 8  # in-plane origins of random tiles: the pooled grids of tile and scan then align

_PREFETCHED_BYTES = 2 * 2**30
_PREFETCHED_BATCHES = 8

Example = dict[str, Any]


def learnable(cases: list[StoredCase], stage: Stage) -> list[StoredCase]:
    """What a stage can train on: where it learns lesions, the cases whose lesions are known."""
    return cases if stage == "classification" else [c for c in cases if c.lesions_known]


def batches(
    store: Store,
    split: str,
    stage: Stage,
    config: Config,
    *,
    seed: int,
    batch_size: int,
    train: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int | None = None,
) -> grain.IterDataset:
    """The batches of one process, read ahead by threads.

    Args:
      store: where the scans are; its cases with unknown lesions are left out of the training of the
        stages that learn lesions.
      split: `train`, `validation` or `test`.
      stage: decides what a training batch holds.
      config: its `data` and `train` sections are used.
      seed: of order, tiles and augmentation, below 2**32.
      batch_size: scans in a batch of this process.
      train: endless, shuffled and augmented; else each case once, in order, as it is, the last
        batch filled up by its last case, and as many batches for every process.
      process_index: which of the processes this one is.
      process_count: the number of processes.
      read_threads: threads that make batches ahead of time, 0 for none; by default as many as there
        are cores, within 2 GiB of batches. The batches do not depend on it.

    Returns:
      A dataset whose iterators have `get_state` and `set_state` (a small JSON-able dictionary).

    Raises:
      InputError: the split has no case to offer, or the store was made with other preprocessing.
    """
    store.require(config.data)
    cases = learnable(store.cases(split), stage) if train else store.cases(split)
    if not cases:
        kind = "case" if not store.cases(split) else "case with a lesion mask"
        raise InputError(
            f"{store.path}: split {split} has no {kind}, at least 1 expected for the {stage} "
            "stage: prepare a case list that has one"
        )
    reader = _Reader(store, cases, stage, config, padded_depth(store, split, config), train)
    dataset: grain.MapDataset
    if train:
        dataset = grain.MapDataset.range(len(cases)).seed(seed).shuffle().repeat()
        # Before the slice: the random numbers belong to the global element.
        dataset = dataset.random_map(reader.train_example)
    else:
        global_batch = batch_size * process_count
        filled = -(-len(cases) // global_batch) * global_batch
        dataset = grain.MapDataset.range(filled).map(reader.evaluation_example)
    dataset = dataset.slice(slice(process_index, None, process_count))
    dataset = dataset.batch(batch_size, drop_remainder=True)
    ahead = int(
        np.clip(_PREFETCHED_BYTES // reader.batch_bytes(batch_size), 2, _PREFETCHED_BATCHES)
    )
    threads = os.cpu_count() or 1 if read_threads is None else read_threads
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    )


def padded_depth(store: Store, split: str, config: Config) -> int:
    """The depth, in slices, to which every scan of the split is padded: its largest bucket."""
    return max((config.data.bucket(case.depth) for case in store.cases(split)), default=0)


def slice_indices(depth: int, count: int) -> np.ndarray:
    """The slices the classifier sees, floor(i D / T) for i < T: paper, section V-A."""
    return np.arange(count) * depth // count


def cut_tiles(volume: np.ndarray, tile: tuple[int, int, int]) -> np.ndarray:
    """(D, H, W) into its non-overlapping tiles (K, d, h, w), width fastest; sides must divide."""
    (depth, height, width), (d, h, w) = volume.shape, tile
    blocks = volume.reshape(depth // d, d, height // h, h, width // w, w)
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(-1, d, h, w)


def tile_origins(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> np.ndarray:
    """The corners of `cut_tiles`' tiles, (K, 3) int32, in its order."""
    axes = [
        np.arange(0, side, step, dtype=np.int32) for side, step in zip(shape, tile, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes one example; every method is a function of its arguments alone."""

    store: Store
    cases: list[StoredCase]
    stage: Stage
    config: Config
    padded_depth: int
    train: bool

    def train_example(self, index: int, rng: np.random.Generator) -> Example:
        """A shuffled, augmented example of the stage."""
        case = self.cases[index]
        augmentation = augment.draw(rng, self.config.train)
        if self.stage == "segmentation":
            tiles = self._random_tiles(case, augmentation, rng)
        elif self.stage == "classification":
            tiles = {"slices": self._slices(case, augmentation)}
        else:
            tiles = self._whole_scan(case, augmentation, rng)
        return tiles | _facts(case)

    def evaluation_example(self, index: int) -> Example:
        """Everything about the case at `index`, or about the last one beyond the end."""
        row = min(index, len(self.cases) - 1)
        case = self.cases[row]
        extra = {"valid": np.bool_(index == row), "case": np.int32(row)}
        return self._whole_scan(case, augment.NONE, None) | _facts(case) | extra

    def batch_bytes(self, batch_size: int) -> int:
        """The size of a batch, small fields apart."""
        data = self.config.data
        slices = data.slices * data.working_size[0] * data.working_size[1]
        tiles = 2 * self.padded_depth * data.working_size[0] * data.working_size[1]
        if self.train and self.stage == "segmentation":
            tiles, slices = 2 * self.config.train.tiles_per_scan * int(np.prod(data.tile)), 0
        elif self.train and self.stage == "classification":
            tiles = 0
        return 4 * batch_size * (tiles + slices)

    def _random_tiles(
        self, case: StoredCase, augmentation: augment.Augmentation, rng: np.random.Generator
    ) -> Example:
        tile = self.config.data.tile
        width = case.shape[2]
        lesion_voxels = self.store.lesion_voxels(case.name)
        if augmentation.flip:
            lesion_voxels = augment.mirrored_starts(lesion_voxels, 1, width)
        origins = self._random_origins(case.shape, lesion_voxels, rng)
        starts = augment.mirrored_starts(origins, tile[2], width) if augmentation.flip else origins
        tiles = self.store.read_boxes(case.name, "volume", starts, tile)
        lesions = self.store.read_boxes(case.name, "lesion", starts, tile)
        if augmentation.flip:
            tiles, lesions = tiles[..., ::-1], lesions[..., ::-1]
        augment.change_intensity(tiles, augmentation)
        return {"tiles": tiles, "lesions": lesions.astype(np.float32), "origins": origins}

    def _random_origins(
        self, shape: tuple[int, int, int], lesion_voxels: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Corners of the tiles, (K, 3) int32: those centred on a lesion voxel come first."""
        count = self.config.train.tiles_per_scan
        tile = np.asarray(self.config.data.tile)
        step = np.array([1, ORIGIN_STEP, ORIGIN_STEP])
        last = np.maximum(np.asarray(shape) - tile, 0) // step
        origins = rng.integers(0, last, size=(count, 3), endpoint=True)
        # The expected share is exact whatever the count; drawn even where there is no lesion.
        centred = int(self.config.train.foreground * count + rng.random())
        if len(lesion_voxels):
            chosen = lesion_voxels[rng.integers(0, len(lesion_voxels), size=centred)]
            corner = chosen - tile // 2
            origins[:centred] = np.clip((corner + step // 2) // step, 0, last)
        return (origins * step).astype(np.int32)

    def _whole_scan(
        self,
        case: StoredCase,
        augmentation: augment.Augmentation,
        rng: np.random.Generator | None,
    ) -> Example:
        """All tiles, in random order if there is an `rng`, and the slices."""
        data = self.config.data
        padded = (self.padded_depth, *case.shape[1:])
        volume = self.store.read(case.name, "volume", (0, 0, 0), padded)
        lesion = self.store.read(case.name, "lesion", (0, 0, 0), padded)
        if augmentation.flip:
            volume, lesion = volume[..., ::-1], lesion[..., ::-1]
        augment.change_intensity(volume, augmentation)
        origins = tile_origins(padded, data.tile)
        order = np.arange(len(origins)) if rng is None else rng.permutation(len(origins))
        return {
            "tiles": cut_tiles(volume, data.tile)[order],
            "lesions": cut_tiles(lesion, data.tile)[order].astype(np.float32),
            "origins": origins[order],
            "slices": volume[slice_indices(case.depth, data.slices)],
        }

    def _slices(self, case: StoredCase, augmentation: augment.Augmentation) -> np.ndarray:
        indices = slice_indices(case.depth, self.config.data.slices)
        slices = self.store.read_slices(case.name, indices)
        if augmentation.flip:
            slices = slices[..., ::-1]
        augment.change_intensity(slices, augmentation)
        return slices


def _facts(case: StoredCase) -> Example:
    return {"depth": np.int32(case.depth), "label": np.int32(case.label)}
