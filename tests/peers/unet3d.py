"""MLPerf's 3D U-Net as it is timed: all patches in a batch, the losses of all at once."""

import itertools

import torch
from reference.training import standardise
from reference.unet3d import UNet3D, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepsc_jax.config import Config, Ints3
from deepsc_jax.models.comparators.unet3d import Options
from peers.parts import Inputs, Parts

__all__ = ["Forward", "Objective", "Predictor", "inputs", "network"]


def inputs(config: Config, stage: str, batch: Inputs) -> Inputs:
    """Patches `(patch, 1, d, h, w)` and their classes `(patch, d, h, w)`."""
    del config, stage
    tiles = batch["tiles"].flatten(0, 1)[:, None]
    return {"tiles": tiles, "lesions": batch["lesions"].flatten(0, 1).long()}


class Logits(nn.Module):
    """The network on patches as they are stored; with `recompute`, level by level
    (DynUNet, whose levels call one another, as a whole)."""

    def __init__(self, made: nn.Module, config: Config, parts: Parts):
        super().__init__()
        self.network, self.config, self.parts = made, config, parts

    def forward(self, tiles: Tensor) -> Tensor:
        """`(patch, class, d, h, w)`, in float32 at least."""
        shown = standardise(tiles, self.config)
        parts = [shown] if self.parts.at_once == "all" else shown.split(1)
        logits = torch.cat([self._of(x) for x in parts])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _of(self, x: Tensor) -> Tensor:
        if not self.parts.recompute:
            return self.network(x)
        if not isinstance(self.network, UNet3D):
            return self._level(self.network, x)
        network = self.network
        skips = [self._level(network.input_block, x)]
        for level in network.downsample:
            skips.append(self._level(level, skips[-1]))
        x = self._level(network.bottleneck, skips[-1])
        for level, skip in zip(network.upsample, reversed(skips), strict=True):
            x = self._level(level, x, skip)
        return network.output(x)

    @staticmethod
    def _level(level: nn.Module, *arguments: Tensor) -> Tensor:
        out = checkpoint(level, *arguments, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out


class Objective(nn.Module):
    """The means of the terms over patches."""

    def __init__(
        self,
        made: nn.Module,
        config: Config,
        stage: str,
        batch: Inputs,
        class_weights: Tensor,
        parts: Parts,
    ):
        super().__init__()
        del stage, batch, class_weights
        assert isinstance(config.model, Options)
        self.logits, self.smoothing = Logits(made, config, parts), config.model.dice_smoothing

    def forward(self, given: Inputs) -> Inputs:
        """`dice`, `cross_entropy` and `loss`, their mean."""
        logits, truth = self.logits(given["tiles"]), given["lesions"]
        probability, space = logits.softmax(dim=1)[:, 1:], (2, 3, 4)
        target = F.one_hot(truth, logits.shape[1]).movedim(-1, 1)[:, 1:].to(logits.dtype)
        overlap = (probability * target).sum(space)
        total = probability.sum(space) + target.sum(space)
        dice = (1 - (2 * overlap + self.smoothing) / (total + self.smoothing)).mean()
        entropy = F.cross_entropy(logits, truth)
        return {"dice": dice, "cross_entropy": entropy, "loss": (dice + entropy) / 2}


class Forward(nn.Module):
    """What the reference's `forward` gives, without gradients."""

    def __init__(self, made: nn.Module, config: Config, stage: str, batch: Inputs, parts: Parts):
        super().__init__()
        del stage
        self.logits, self.shape = Logits(made, config, parts), batch["tiles"].shape

    @torch.no_grad()
    def forward(self, given: Inputs) -> Inputs:
        """`lesion` of all tiles."""
        return {"lesion": self.logits(given["tiles"]).softmax(dim=1)[:, 1].reshape(self.shape)}


class Predictor(nn.Module):
    """The lesion probability of a whole preprocessed scan: all tiles, a layer or one at once."""

    def __init__(self, made: nn.Module, config: Config, shape: Ints3, parts: Parts):
        super().__init__()
        self.logits, self.shape, self.tile = Logits(made, config, Parts()), shape, config.data.tile
        counts = [-(-side // tile) for side, tile in zip(shape, self.tile, strict=True)]
        corners = list(itertools.product(*(range(n) for n in counts)))
        chunk = {"all": len(corners), "layer": counts[1] * counts[2], "tile": 1}[parts.at_once]
        self.chunks = [corners[i : i + chunk] for i in range(0, len(corners), chunk)]
        self.pads = [
            n * tile - side for n, tile, side in zip(counts, self.tile, shape, strict=True)
        ]

    @torch.no_grad()
    def forward(self, volume: Tensor) -> tuple[dict[str, Tensor], None]:
        """Volumes by name, and no classes."""
        padded = F.pad(volume, [x for pad in reversed(self.pads) for x in (0, pad)])
        lesion = torch.zeros_like(padded)
        for chunk in self.chunks:
            boxes = [
                tuple(slice(i * t, (i + 1) * t) for i, t in zip(corner, self.tile, strict=True))
                for corner in chunk
            ]
            tiles = torch.stack([padded[box] for box in boxes])[:, None]
            for box, found in zip(boxes, self.logits(tiles).softmax(dim=1)[:, 1], strict=True):
                lesion[box] = found
        depth, height, width = self.shape
        return {"lesion": lesion[:depth, :height, :width]}, None
