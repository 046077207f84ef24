"""Which depth a scan is padded to, and an order whose batches are of one depth each.

A step is compiled once for every shape of a batch. So the scans of a split are padded to a few
depths, its buckets, rather than each to its own or all to the deepest one's.

The order is a pure function of (seed, size of the global batch, element): every process works it
out for itself, and a resumed run goes on where it was. Of every N batches, N the number of scans,
a bucket has as many as it has scans, spread evenly, so that each scan is seen equally often. Within
a bucket scans come in epochs, each shuffled anew.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import grain
import numpy as np

from deepsc_jax.config import DataConfig
from deepsc_jax.data import occupancy
from deepsc_jax.data.batch import Reads
from deepsc_jax.data.store import StoredCase
from deepsc_jax.geometry.sampling import tile_corners


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The scans of a split that are padded alike.

    Attributes:
      depth: slices that they are padded to.
      tiles: of a scan that are computed: as many as hold lung in the scan that has the most.
      members: indices of its cases, in order.
    """

    depth: int
    tiles: int
    members: tuple[int, ...]


def of_cases(
    cases: Sequence[StoredCase], reads: Reads, data: DataConfig, batch: int, *, moves: bool
) -> tuple[Bucket, ...]:
    """The buckets of `cases`, shallow ones first; one where no whole scan is read.

    Args:
      cases: of a split, at least one.
      reads: what is read of them.
      data: `depth_bucket`, `depth_buckets` and the tiles.
      batch: scans in a global batch; a bucket of fewer would show some twice in each.
      moves: whether augmentation moves lungs, so that any tile may hold some.
    """
    deepest = data.bucket(max(case.depth for case in cases))
    if reads.tiles != "all":
        return (Bucket(deepest, 0, tuple(range(len(cases)))),)
    found, low = [], 0
    for depth in depths([case.depth for case in cases], data, batch):
        members = tuple(i for i, case in enumerate(cases) if low < case.depth <= depth)
        counts = [int(lung_tiles(cases[i], data, depth).sum()) for i in members]
        tiles = int(np.prod(data.tile_counts(depth))) if moves else max(*counts, 1)
        found.append(Bucket(depth, tiles, members))
        low = depth
    return tuple(found)


def lung_tiles(case: StoredCase, data: DataConfig, depth: int) -> np.ndarray:
    """Which of the tiles of the case, padded to `depth`, hold lung, (K,) bool; all unmasked."""
    corners = tile_corners((depth, *case.shape[1:]), data.tile)
    if data.mask == "none":
        return np.ones(len(corners), bool)
    return occupancy.occupied(case.lung_blocks, case.shape, corners, data.tile)


def tile_covers(data: DataConfig, cases: Sequence[StoredCase]) -> bool:
    """Whether a tile holds each of `cases`, of which there is one: they are seen as whole scans."""
    deepest = max((case.depth for case in cases), default=data.tile[0] + 1)
    return deepest <= data.tile[0] and data.tile[1:] == data.working_size


def depths(found: Sequence[int], data: DataConfig, least: int) -> tuple[int, ...]:
    """The depths of at most `depth_buckets` buckets that pad the fewest slices, ascending.

    Args:
      found: the true depth of each scan.
      data: `depth_bucket`, of which depths are multiples, and `depth_buckets`.
      least: scans in a bucket, unless there are fewer in all.
    """
    steps, counts = np.unique([data.bucket(depth) for depth in found], return_counts=True)

    @functools.cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """The padded slices of the scans from step `first` on, and the buckets' depths."""
        if first == len(steps):
            return 0.0, ()
        options: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())]
        for last in range(first, len(steps)) if left else ():
            scans = counts[first : last + 1].sum()
            if scans >= least:
                slices, deeper = best(last + 1, left - 1)
                options.append((slices + float(scans * steps[last]), (int(steps[last]), *deeper)))
        return min(options)

    return best(0, data.depth_buckets)[1] or (int(steps[-1]),)


class TrainingOrder(Sequence[int]):
    """The endless order of a training: which case element g of the global stream is."""

    def __init__(self, buckets: Sequence[Bucket], seed: int, batch: int):
        """Batches of `batch` elements, each of one of the `buckets`."""
        self._buckets, self._seed, self._batch = buckets, seed, batch
        self._sizes = np.asarray([len(bucket.members) for bucket in buckets])

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, element):  # type: ignore[override]  # slices are not asked for
        number, within = divmod(element, self._batch)
        turn, place = divmod(number, int(self._sizes.sum()))
        bucket, before = self._turn(turn, place)
        size = int(self._sizes[bucket])
        epoch, shuffled = divmod((turn * size + before) * self._batch + within, size)
        seed = np.random.SeedSequence((self._seed, bucket, epoch)).generate_state(1)[0]
        index = grain.experimental.index_shuffle(
            shuffled, max_index=size - 1, seed=int(seed), rounds=4
        )
        return self._buckets[bucket].members[index]

    def _turn(self, turn: int, place: int) -> tuple[int, int]:
        """The bucket of batch `place` of a turn of N batches, and its batches before that."""
        if len(self._sizes) == 1:
            return 0, place
        rng = np.random.default_rng((self._seed, turn))
        starts = rng.random(len(self._sizes))
        owners = np.repeat(np.arange(len(self._sizes)), self._sizes)
        before = np.concatenate([np.arange(size) for size in self._sizes])
        chosen = np.argsort((before + starts[owners]) / self._sizes[owners], kind="stable")[place]
        return int(owners[chosen]), int(before[chosen])


def evaluation_order(buckets: Sequence[Bucket], batch: int) -> list[tuple[int, bool]]:
    """Every case once, bucket by bucket, each filled up by its last; and whether it counts."""
    order = []
    for bucket in buckets:
        filled = -(-len(bucket.members) // batch) * batch
        order += [(case, True) for case in bucket.members]
        order += [(bucket.members[-1], False)] * (filled - len(bucket.members))
    return order
