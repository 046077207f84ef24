"""How a network's arrays are named in PyTorch: a table of `Rule`s beside each network."""

from typing import NamedTuple


class Rule(NamedTuple):
    """A pattern of names on both sides, `{x}` being the same in both, and what torch transposes.

    Attributes:
      flax: names joined by slashes, below the collection; `{x}` is letters and digits.
      torch: the name in a `state_dict`.
      axes: torch's axes, as numbers of ours; -1 is a new axis of one.
      collection: of Flax variables: `params`, `batch_stats` for running statistics, or another.
    """

    flax: str
    torch: str
    axes: tuple[int, ...] | None = None
    collection: str = "params"


CONV = (4, 3, 0, 1, 2)  # (depth, height, width, in, out) to (out, in, depth, height, width)
CONV2D = (3, 2, 0, 1)  # (height, width, in, out) to (out, in, height, width)
DECONV = (3, 4, 0, 1, 2)  # the same to (in, out, depth, height, width)
LINEAR = (1, 0)  # (in, out) to (out, in)
POINT = (1, 0, -1, -1, -1)  # (in, out) to (out, in, 1, 1, 1): -1 is a new axis
POINT2D = (1, 0, -1, -1)  # (in, out) to (out, in, 1, 1)
