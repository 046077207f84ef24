"""Where in a scan there is lung, in blocks, as a short text of the store's index.

Tiles are chosen by it without reading the scan, whatever their size.
"""

import base64
import zlib

import numpy as np

from deepsc_jax.config import Ints3

BLOCK: Ints3 = (8, 32, 32)


def pack(lung: np.ndarray) -> str:
    """Which blocks of a lung mask (D, H, W) hold lung, as text."""
    blocks = np.zeros(_blocks(lung.shape), bool)
    places = np.nonzero(lung)
    blocks[tuple(place // side for place, side in zip(places, BLOCK, strict=True))] = True
    return base64.b64encode(zlib.compress(np.packbits(blocks).tobytes(), 9)).decode()


def occupied(packed: str, shape: Ints3, corners: np.ndarray, tile: Ints3) -> np.ndarray:
    """Which of the tiles at `corners (K, 3)` touch a block that holds lung, (K,) bool.

    Exact where a tile's sides are multiples of a block's; else a tile may count that holds none.

    Raises:
      ValueError: `packed` is not what `pack` made of a mask of that shape.
    """
    sides = _blocks(shape)
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
    blocks = np.unpackbits(bits, count=int(np.prod(sides))).reshape(sides).astype(bool)
    first = corners // np.asarray(BLOCK)
    last = -(-(corners + np.asarray(tile)) // np.asarray(BLOCK))
    boxes = zip(first.tolist(), last.tolist(), strict=True)
    return np.asarray([blocks[a:d, b:e, c:f].any() for (a, b, c), (d, e, f) in boxes])


def _blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-side // block) for side, block in zip(shape, BLOCK, strict=True))
