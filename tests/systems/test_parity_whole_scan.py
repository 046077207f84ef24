"""Overlapping tiles and their mean against MONAI's sliding windows and the reference's."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Array
from monai.inferers.utils import sliding_window_inference
from parity import VALUES, relative
from reference import qchc_unet as reference

from deepsc_jax.systems.whole_scan import averaged, corners, cut

TILE, STRIDE, FILL = (4, 6, 8), (2, 3, 4), -1.5
RAMP = np.linspace(0.5, 2, 4 * 6 * 8).reshape(TILE).astype(np.float32)


@pytest.mark.parametrize(
    "shape", [(8, 12, 16), (9, 13, 19), (5, 7, 9), (3, 13, 8), (1, 2, 3)], ids=str
)
def test_sliding_windows(shape: tuple[int, int, int], within):
    # What a window gives depends on the place within it and on all that it sees.
    volume = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    places = corners(shape, TILE, STRIDE)

    def segmented() -> Iterator[tuple[Array, np.ndarray]]:
        for start in range(0, len(places), 5):
            some = places[start : start + 5]
            tiles = cut(volume, some, TILE, FILL)
            yield jnp.asarray(tiles * RAMP + tiles.mean(axis=(1, 2, 3), keepdims=True)), some

    ours = averaged(shape, segmented())

    def network(x: torch.Tensor) -> torch.Tensor:
        return x * torch.from_numpy(RAMP) + x.mean(dim=(1, 2, 3, 4), keepdim=True)

    theirs = sliding_window_inference(
        torch.from_numpy(volume)[None, None], TILE, 2, network, overlap=0.5, mode="constant",
        cval=FILL,
    )  # fmt: skip
    assert isinstance(theirs, torch.Tensor)
    error = relative(ours, theirs[0, 0].numpy())

    def of_two_classes(x: torch.Tensor) -> torch.Tensor:
        y = network(x)
        return torch.cat([torch.zeros_like(y), y], dim=1)

    two = reference.sliding_windows(of_two_classes, torch.from_numpy(volume), TILE, FILL)

    def probabilities() -> Iterator[tuple[Array, np.ndarray]]:
        tiles = cut(volume, places, TILE, FILL)
        logits = tiles * RAMP + tiles.mean(axis=(1, 2, 3), keepdims=True)
        yield jnp.asarray(1 / (1 + np.exp(-logits))), places

    of_reference = relative(averaged(shape, probabilities()), two[1].numpy())
    bound = VALUES["float32"]
    within(
        "sliding windows",
        "float32",
        {"against MONAI": (error, bound), "values": (of_reference, bound)},
    )
