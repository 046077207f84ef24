"""The least time a step can take on a chip, and what a cluster keeps of it.

Williams et al. 2009: a program takes at least as long as its arithmetic at the chip's peak, and at
least as long as its bytes at the memory's bandwidth. Transfers between chips are added likewise.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from deepsc_jax.planning.hlo import Collective
from deepsc_jax.planning.targets import Chip


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least, for each of its reasons."""

    arithmetic: float
    memory: float
    transfers: float

    @property
    def alone(self) -> float:
        """Of what a device does by itself."""
        return max(self.arithmetic, self.memory)

    @property
    def step(self) -> float:
        """Of the step, if transfers hide behind all else."""
        return max(self.alone, self.transfers)

    @property
    def efficiency(self) -> float:
        """What a device keeps of its speed alone if nothing hides the transfers."""
        return self.alone / (self.alone + self.transfers) if self.alone else 1.0


def bound(
    flops: Mapping[str, int], bytes_moved: int, collectives: Sequence[Collective], chip: Chip
) -> Bound:
    """The bound of a step from what one device computes, moves and exchanges in it."""
    return Bound(
        arithmetic=sum(count / chip.peaks[kind] for kind, count in flops.items()),
        memory=bytes_moved / chip.bandwidth,
        transfers=sum(transfer_seconds(collective, chip) for collective in collectives),
    )


def transfer_seconds(collective: Collective, chip: Chip) -> float:
    """The time of a collective at the links' bandwidth, latency apart.

    An all-reduce sends every byte twice, but for its own share; gathering and scattering send it
    once. Between nodes every chip of a node sends its share over its own network port.
    """
    if collective.kind == "collective-permute":
        members, sent = 2, 1.0
    else:
        members = len(collective.groups[0]) if collective.groups else 1
        sent = (2 if collective.kind == "all-reduce" else 1) * (members - 1) / members
    if members == 1:
        return 0.0
    together = all(
        len({device // chip.joined for device in group}) == 1 for group in collective.groups
    )
    bandwidth = chip.link
    if not together:
        here = max(
            sum(device // chip.joined == group[0] // chip.joined for device in group)
            for group in collective.groups
        )
        bandwidth = min(chip.link, here * chip.network)
    return (collective.trips or 1) * sent * collective.bytes / bandwidth
