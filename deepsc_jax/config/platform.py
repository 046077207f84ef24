"""How the computation is laid out on devices."""

import dataclasses
from typing import Literal

from deepsc_jax.config.options import option, require


@dataclasses.dataclass(frozen=True)
class PlatformConfig:
    """How the computation is laid out; none of it changes the mathematics.

    Where a part of it would, it is refused: `accumulation` of a network with batch norm.
    """

    data_devices: int = option(
        0, "assumed: devices over which the batch is split; 0 for all there are"
    )
    space: int = option(
        1,
        "assumed: devices over which the depth of every tile is split; they reduce the kernels' "
        "gradients tile by tile: once a step where a tile is a whole scan",
    )
    shard_optimizer: bool = option(
        False, "assumed: split Adam's moments over the data axis (ZeRO-1, Rajbhandari et al. 2020)"
    )
    accumulation: int = option(
        1,
        "assumed: parts in which a device takes its scans, one after another; their gradients "
        "are summed, and reduced over devices once; 1 for networks with batch norm, which would "
        "take each part's own statistics",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "assumed: of convolutions; auto is float32 on CPU and bfloat16 elsewhere"
    )
    conv_form: Literal["auto", "native", "banded", "sliced", "folded", "direct"] = option(
        "auto",
        "assumed: how a 3D convolution is written; auto is banded (neighbouring voxels as "
        "channels) on GPU; where depth is not split, sliced (a sum of 2D ones, of bands) on TPU "
        "and folded (2D over stacked slices) on CPU; else native. direct (CPU, JAX 0.11: oneDNN) "
        "is to be asked for: what is compiled is not kept. predict has a flag of its own",
    )
    tile_loop: Literal["auto", "fold", "loop"] = option(
        "auto", "assumed: tiles of a scan folded into the batch (CPU) or looped over (GPU, TPU)"
    )
    remat: Literal["none", "tiles", "blocks", "all"] = option(
        "tiles",
        "assumed: activations that the backward pass computes again instead of keeping: each "
        "looped tile's, those inside blocks (inception, transition, encoder unit), both, or none",
    )

    def __post_init__(self) -> None:
        require(
            self.data_devices >= 0,
            f"data_devices is {self.data_devices}: give 0 (all devices) or a count",
        )
        require(self.space >= 1, f"space is {self.space}: give at least 1 device")
        require(
            self.accumulation >= 1, f"accumulation is {self.accumulation}: give at least 1 part"
        )
