"""Batches from a store: random access, counter-based randomness, a few shapes for a whole run.

`batch` says what one holds, and `buckets` to which depth its scans are padded with zeros.

Order. Element g of the endless global stream is a pure function of (seed, g) and the size of a
global batch: which scan, from epoch-wise shuffles, and every random choice made for it. Process p
of P takes the elements p, p + P, p + 2P, ...: its batch n holds elements of the global batch n. So
a run may go on with another number of processes: with the same global batch size each step sees the
same scans, tiles and augmentation, only their place within the batch differs. An iterator's state
is its count of batches, the same in every process. With the same number of processes and devices a
restarted run computes the same numbers to the last bit; with another number, sums are taken in
another order.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping

import grain
import numpy as np

from deepsc_jax.config import Config, Ints3
from deepsc_jax.data import augment, buckets
from deepsc_jax.data.batch import Batch, Reads, fields
from deepsc_jax.data.store import ArrayName, Store, StoredCase
from deepsc_jax.geometry.sampling import slice_indices, tile_corners
from deepsc_jax.runtime.errors import InputError

_READ_BYTES = 2 * 2**30  # of examples that are read ahead of the batch that is put together
_READ_BATCHES = 8

Example = dict[str, np.ndarray | np.generic]


def learnable(cases: list[StoredCase], reads: Reads) -> list[StoredCase]:
    """What a stage can train on: where it reads lesions, the cases whose lesions are known."""
    return [c for c in cases if c.lesions_known] if reads.lesions else cases


def batches(
    store: Store,
    split: str,
    reads: Reads,
    config: Config,
    *,
    seed: int,
    batch_size: int,
    train: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    read_threads: int | None = None,
    taught: Mapping[str, np.ndarray] | None = None,
) -> "Batches":
    """The batches of one process, read ahead by threads.

    Args:
      store: where the scans are; cases with unknown lesions are left out of training where
        lesions are read.
      split: `train`, `validation` or `test`.
      reads: what a batch holds of a scan; an evaluation has all tiles in place of drawn ones.
      config: its `data` and `train` sections are used.
      seed: of order, tiles and augmentation, below 2**32.
      batch_size: scans in a batch of this process.
      train: endless, shuffled and augmented; else each case once, as it is, bucket by bucket in
        order, the last batch of each filled up by its last case, and as many batches for every
        process.
      process_index: which of the processes this one is.
      process_count: the number of processes.
      read_threads: threads that read examples ahead of time, 0 for none; by default as many as
        there are cores, within 2 GiB of examples. Besides these, one batch is put together ahead.
        The batches do not depend on it.
      taught: by case, its teachers' logits (N, C), where they are read.

    Returns:
      What can be iterated over, by iterators with `get_state` and `set_state`.

    Raises:
      InputError: the split has no case to offer, or the store was made with other preprocessing.
    """
    store.require(config.data)
    cases = learnable(store.cases(split), reads) if train else store.cases(split)
    if not cases:
        kind = "case" if not store.cases(split) else "case with a lesion mask"
        raise InputError(
            f"{store.path}: split {split} has no {kind}, at least 1 expected: prepare a case list "
            "that has one"
        )
    global_batch = batch_size * process_count
    reads = reads if train else reads.whole()
    moves = train and augment.moves_lungs(config.train)
    padded = buckets.of_cases(cases, reads, config.data, global_batch, moves=moves)
    spacings = {case.spacing_mm for case in cases}
    margin = augment.margin(config.train, config.data.tile, sorted(spacings))
    if not train:
        margin = (0, 0, 0)
    reader = _Reader(store, cases, reads, config, padded, margin, taught or {})
    dataset: grain.MapDataset
    if train:
        order = buckets.TrainingOrder(padded, seed, global_batch)
        # Before the slice: the random numbers belong to the global element.
        dataset = grain.MapDataset.source(order).seed(seed).random_map(reader.train_example)
    else:
        rows = buckets.evaluation_order(padded, global_batch)
        dataset = grain.MapDataset.source(rows).map(reader.evaluation_example)
    dataset = dataset.slice(slice(process_index, None, process_count))
    # Examples, not batches, are read in parallel, and one batch is put together ahead of time.
    ahead = int(np.clip(_READ_BYTES // reader.example_bytes(), 2, _READ_BATCHES * batch_size))
    threads = os.cpu_count() or 1 if read_threads is None else read_threads
    examples = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    )
    collected = examples.batch(batch_size, drop_remainder=True)
    if threads:
        collected = grain.experimental.ThreadPrefetchIterDataset(collected, prefetch_buffer_size=1)
    return Batches(collected, batch_size, padded)


class Batches:
    """Batches, from the first one on, each time that it is iterated over."""

    def __init__(
        self, dataset: grain.IterDataset, batch_size: int, padded: tuple[buckets.Bucket, ...]
    ):
        """The batches of `dataset`, which counts its examples; each is of one of the buckets."""
        self._dataset, self._batch_size, self.buckets = dataset, batch_size, padded

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(iter(self._dataset), self._batch_size)

    def shapes(self) -> str:
        """A line for the log: into how many shapes, each compiled apart, scans are padded."""
        if not self.buckets[0].tiles:
            return "1 shape of batches"
        parts = [
            f"{len(bucket.members)} scans padded to {bucket.depth} slices, {bucket.tiles} tiles"
            for bucket in self.buckets
        ]
        plural = "s" if len(parts) > 1 else ""
        return f"{len(parts)} shape{plural} of batches: {'; '.join(parts)}"


class BatchIterator(Iterator[Batch]):
    """Goes through batches; its state is their count, whatever this process's share of them."""

    def __init__(self, batches: grain.DatasetIterator, batch_size: int):
        """Through `batches`, whose own state counts examples."""
        self._batches: grain.DatasetIterator | None = batches
        self._batch_size, self._taken = batch_size, 0

    def __next__(self) -> Batch:
        assert self._batches is not None, "closed"
        batch = next(self._batches)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """How many batches were taken."""
        return {"next_index": self._taken}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on after so many batches."""
        assert self._batches is not None, "closed"
        self._taken = int(state["next_index"])
        self._batches.set_state({"next_index": self._taken * self._batch_size})

    def close(self) -> None:
        """Stop to read ahead, for good."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None  # at the interpreter's end grain's could not be closed any more


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes one example; every method is a function of its arguments alone."""

    store: Store
    cases: list[StoredCase]
    reads: Reads
    config: Config
    buckets: tuple[buckets.Bucket, ...]
    margin: Ints3
    taught: Mapping[str, np.ndarray]

    def train_example(self, index: int, rng: np.random.Generator) -> Example:
        """A shuffled example, and how it is augmented."""
        case = self.cases[index]
        augmentation = augment.draw(
            rng,
            self.config.train,
            self.config.data,
            case.spacing_mm,
            flat=self.reads.slices and self.reads.tiles != "all",
        )
        example = self._example(case, augmentation, rng) | self._facts(case)
        return example | {"augmentation": augmentation.vector()}

    def evaluation_example(self, row: tuple[int, bool]) -> Example:
        """A case as it is, and whether it counts or only fills up a batch."""
        index, valid = row
        case = self.cases[index]
        extra = {"valid": np.bool_(valid), "case": np.int32(index)}
        return self._example(case, augment.Augmentation(), None) | self._facts(case) | extra

    @property
    def _truth(self) -> ArrayName:
        """The stored array of what is true of voxels."""
        return "classes" if self.reads.classes else "lesion"

    def example_bytes(self) -> int:
        """The size of the largest example."""
        tiles = self.buckets[-1].tiles or self.config.train.tiles_per_scan
        depth = self.buckets[-1].depth
        arrays = fields(self.reads, self.config.data, tiles, depth, margin=self.margin)
        return sum(field.nbytes for field in arrays.values())

    def _example(
        self,
        case: StoredCase,
        augmentation: augment.Augmentation,
        rng: np.random.Generator | None,
    ) -> Example:
        """What is read of a scan; tiles are drawn, or put in random order, if there is an `rng`."""
        if self.reads.tiles == "all":
            return self._whole_scan(case, augmentation, rng)
        example: Example = {}
        if self.reads.tiles == "drawn":
            assert rng is not None
            example |= self._random_tiles(case, augmentation, rng)
        if self.reads.slices:
            indices = slice_indices(case.depth, self.config.data.slices)
            example["slices"] = self.store.read_slices(case.name, indices)
        return example

    def _random_tiles(
        self, case: StoredCase, augmentation: augment.Augmentation, rng: np.random.Generator
    ) -> Example:
        """Tiles of the changed scan, as the boxes that they are made of on the device."""
        tile = self.config.data.tile
        depth, height, width = (t + 2 * more for t, more in zip(tile, self.margin, strict=True))
        box = depth, height, width
        voxels = self.store.lesion_voxels(case.name)
        voxels = augment.moved_voxels(voxels, augmentation, case.shape)
        origins = self._random_origins(case.shape, voxels, rng)
        starts = augment.moved_starts(origins, augmentation, case.shape, tile, box)
        tiles = self.store.read_boxes(case.name, "volume", starts, box)
        truth = self.store.read_boxes(case.name, self._truth, starts, box)
        example: Example = {"tiles": tiles, self.reads.truth[0]: truth, "origins": origins}
        return example | ({"starts": starts} if any(self.margin) else {})

    def _random_origins(
        self, shape: tuple[int, int, int], lesion_voxels: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Corners of the tiles, (K, 3) int32: those centred on a lesion voxel come first."""
        count = self.config.train.tiles_per_scan
        tile = np.asarray(self.config.data.tile)
        step = np.array([1, self.reads.origin_step, self.reads.origin_step])
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
        """The scan in slabs, and the corners of its tiles, in random order if there is an `rng`.

        Those that hold lung come first, and of the others as many as fill up the bucket's number.
        """
        data = self.config.data
        bucket = next(bucket for bucket in self.buckets if case.depth <= bucket.depth)
        padded = (bucket.depth, *case.shape[1:])
        slabs = (bucket.depth // data.tile[0], data.tile[0], *case.shape[1:])
        volume = self.store.read_boxes(case.name, "volume", [(0, 0, 0)], padded)
        truth = self.store.read_boxes(case.name, self._truth, [(0, 0, 0)], padded)
        origins = tile_corners(padded, data.tile)
        order = np.arange(len(origins)) if rng is None else rng.permutation(len(origins))
        lung = buckets.lung_tiles(case, data, bucket.depth)
        if augmentation.flip:
            lung = lung.reshape(data.tile_counts(bucket.depth))[..., ::-1].ravel()
        first = np.argsort(~lung[order], kind="stable")[: bucket.tiles]
        return {
            "volume": volume.reshape(slabs),
            self.reads.truth[1]: truth.reshape(slabs),
            "origins": origins[order[first]],
        }

    def _facts(self, case: StoredCase) -> Example:
        facts: Example = {"depth": np.int32(case.depth), "label": np.int32(case.label)}
        if self.config.data.mask == "none":
            facts["intensity"] = np.asarray(case.intensity, np.float32)
        if self.reads.targets:
            facts["targets"] = np.asarray(case.targets, np.float32)
        if self.reads.teachers:
            facts["teachers"] = np.asarray(self.taught[case.name], np.float32)
        return facts
