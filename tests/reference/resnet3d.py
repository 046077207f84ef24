"""MONAI's 3D ResNet-50, trained as ours is: a classifier of the sampled slices."""

from collections.abc import Iterable, Iterator

import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn

from deepsc_jax.config import Config
from deepsc_jax.models.comparators.resnet3d import Options


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


def standardise(x: Tensor, config: Config) -> Tensor:
    """Values inside the lungs to about mean 0 and deviation 1; 0, outside of them, stays."""
    return torch.where(x > 0, (x - config.data.intensity_mean) / config.data.intensity_sd, 0)


def train(
    network: nn.Module,
    config: Config,
    stage: str,
    batches: Iterable[dict[str, Tensor]],
    class_weights: Tensor,
) -> Iterator[dict[str, float]]:
    """One step a batch; yields the losses before the step."""
    options, of_stage = config.train, config.stage(stage)
    optimizer = torch.optim.Adam(
        network.parameters(),
        of_stage.learning_rate,
        (options.adam_b1, options.adam_b2),
        options.adam_eps,
    )
    steps = of_stage.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0))
    for batch in batches:
        label = batch["label"].long()
        logits = network(standardise(batch["slices"], config)[:, None])
        entropy = nn.functional.cross_entropy(logits, label, reduction="none")
        loss = (class_weights[label] * entropy).mean()  # torch's own divides by the weights' sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield {"cross_entropy": loss.item(), "loss": loss.item()}


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
