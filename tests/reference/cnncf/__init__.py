"""CNNCF in PyTorch: its networks, and its training by SGD."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from deepsc_jax.config import Config, SgdConfig
from deepsc_jax.models.cnncf.config import Options
from reference.cnncf.network import CNNCF, Published


def network(config: Config) -> CNNCF | Published:
    """The network of a configuration."""
    assert isinstance(config.model, Options)
    if config.model.variant == "published":
        return Published(config)
    made = CNNCF(config)
    made.positive = config.data.classes.index(config.model.positive)
    return made


timed = network


def standardise(x: Tensor, config: Config) -> Tensor:
    """Values inside the lungs to about mean 0 and deviation 1; 0, outside of them, stays."""
    return torch.where(x > 0, (x - config.data.intensity_mean) / config.data.intensity_sd, 0)


def rate(options: SgdConfig, step: int) -> float:
    """What the initial learning rate is multiplied by at a step."""
    factor = options.decay ** (step // options.decay_every)
    if options.warmup_steps:
        factor *= 0.1 + 0.9 * min(step / options.warmup_steps, 1)
    return factor


def train(
    network: CNNCF | Published,
    config: Config,
    stage: str,
    batches: Iterable[dict[str, Tensor]],
    class_weights: Tensor,
) -> Iterator[dict[str, float]]:
    """One step a batch; yields the losses before the step."""
    options = config.stage(stage)
    assert isinstance(options, SgdConfig)
    optimizer = torch.optim.SGD(
        network.parameters(),
        options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(options, step))
    for batch in batches:
        slices = standardise(batch["slices"], config)
        terms = network.terms(slices, batch["label"].long(), class_weights, batch.get("teachers"))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        schedule.step()
        yield {name: x.item() for name, x in terms.items()}


def forward(
    network: nn.Module, config: Config, batch: dict[str, Tensor], stage: str
) -> dict[str, Tensor]:
    """`logits (scan, class)` by running statistics."""
    assert isinstance(network, CNNCF | Published)
    network.eval()
    return {"logits": network.logits(standardise(batch["slices"], config))}


def predict(
    network: nn.Module, config: Config, volume: Tensor
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Class probabilities of a whole preprocessed scan."""
    slices = volume[torch.arange(config.data.slices) * len(volume) // config.data.slices]
    with torch.no_grad():
        logits = forward(network, config, {"slices": slices[None]}, "")["logits"]
    return {}, logits.softmax(dim=1)[0]
