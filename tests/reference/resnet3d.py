"""MONAI's 3D ResNet-50, trained as ours is: a classifier of the sampled slices."""

from collections.abc import Iterable, Iterator

import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn

from deepsc_jax.config import Config
from deepsc_jax.models.comparators.resnet3d import Options
from reference.training import Batch, standardise, take_steps


def network(config: Config) -> nn.Module:
    """The network of a configuration."""
    options = config.model
    assert isinstance(options, Options)
    return ResNet(
        ResNetBottleneck,
        list(options.blocks),
        list(options.widths),
        n_input_channels=1,
        conv1_t_stride=options.stem_stride,
        num_classes=len(config.data.classes),
    )


timed = network


def train(
    network: nn.Module,
    config: Config,
    stage: str,
    batches: Iterable[Batch],
    class_weights: Tensor,
) -> Iterator[dict[str, float]]:
    """One step a batch; yields the losses before the step."""

    def losses_of(batch: Batch) -> dict[str, Tensor]:
        label = batch["label"].long()
        logits = network(standardise(batch["slices"], config)[:, None])
        entropy = nn.functional.cross_entropy(logits, label, reduction="none")
        loss = (class_weights[label] * entropy).mean()  # torch's own divides by the weights' sum
        return {"cross_entropy": loss, "loss": loss}

    return take_steps(network, config, stage, batches, losses_of)


def forward(
    network: nn.Module, config: Config, batch: dict[str, Tensor], stage: str
) -> dict[str, Tensor]:
    """`logits (scan, class)` by running statistics."""
    return {"logits": network.eval()(standardise(batch["slices"], config)[:, None])}


def predict(
    network: nn.Module, config: Config, volume: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Class probabilities of a whole preprocessed scan."""
    slices = volume[torch.arange(config.data.slices) * len(volume) // config.data.slices]
    with torch.no_grad():
        logits = network.eval()(standardise(slices, config)[None, None])
    return {}, logits.softmax(dim=1)[0]
