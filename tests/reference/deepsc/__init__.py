"""DeepSC-COVID in plain PyTorch: what the Flax network must compute, as a specification.

Written for reading, not for speed. Volumes are `(batch, channel, depth, height, width)`. Where the
Flax code pads and masks, the reference does neither: every tile is computed by itself, cut to the
slices that its scan has, so that torch's own operators apply as they are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepsc_jax.config import Config
from reference.deepsc import lesion
from reference.deepsc.inference import predict as _predict
from reference.deepsc.network import DeepSC
from reference.deepsc.training import train as _train

__all__ = ["forward", "network", "predict", "timed", "train"]


def network(config: Config) -> nn.Module:
    """The network of a configuration."""
    return DeepSC(config)


def timed(config: Config) -> nn.Module:
    """The network as it is timed: the readable pool shares the gradient of ties, and is slow."""
    pool: Callable[..., Tensor] = torch.nn.functional.max_pool3d
    lesion.pool = lambda x: pool(x, kernel_size=2, ceil_mode=True)  # type: ignore[assignment]
    return DeepSC(config)


def train(
    network: Any,
    config: Config,
    stage: str,
    batches: Iterable[dict[str, Tensor]],
    class_weights: Tensor,
) -> Iterator[dict[str, float]]:
    """One step a batch; yields the means of the losses over its scans, before the step."""
    del config  # it is the network's
    return _train(network, stage, batches, class_weights)


def forward(
    network: Any, config: Config, batch: dict[str, Tensor], stage: str
) -> dict[str, Tensor]:
    """`lesion` of all tiles in a row, and `logits (scan, class)`, each where the stage has it."""
    del config
    scans = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
    outs = [network(scan, stage) for scan in scans]
    found = {}
    if outs[0].tiles:
        found["lesion"] = torch.cat([t.lesion.flatten() for out in outs for t in out.tiles])
    if outs[0].logits is not None:
        found["logits"] = torch.cat([out.logits for out in outs])
    return found


def predict(
    network: Any, config: Config, volume: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Volumes by name, and class probabilities, of a whole preprocessed scan."""
    del config
    lesion_probability, classes, masks = _predict(network, volume)
    evidence = {f"evidence_{i}": mask for i, mask in enumerate(masks, start=1)}
    return {"lesion": lesion_probability, **evidence}, classes
