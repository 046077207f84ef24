"""What the training of every reference shares: its input, and steps with a falling rate."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from deepsc_jax.config import Config

Batch = dict[str, Tensor]


def standardise(x: Tensor, config: Config) -> Tensor:
    """Values inside the lungs to about mean 0 and deviation 1; 0, outside of them, stays."""
    return torch.where(x > 0, (x - config.data.intensity_mean) / config.data.intensity_sd, 0)


def take_steps(
    network: nn.Module,
    config: Config,
    stage: str,
    batches: Iterable[Batch],
    losses: Callable[[Batch], dict[str, Tensor]],
) -> Iterator[dict[str, float]]:
    """One step a batch, by the `loss` of its `losses`; yields these, as before the step.

    Adam, or SGD with Nesterov's momentum, whose learning rate falls linearly to 0.
    """
    options, of_stage = config.train, config.stage(stage)
    parameters, rate = network.parameters(), of_stage.learning_rate
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, rate, options.momentum, nesterov=True)
    else:
        betas = (options.adam_b1, options.adam_b2)
        optimizer = torch.optim.Adam(parameters, rate, betas, options.adam_eps)
    steps = of_stage.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0))
    for batch in batches:
        means = losses(batch)
        optimizer.zero_grad()
        means["loss"].backward()
        optimizer.step()
        schedule.step()
        yield {name: value.item() for name, value in means.items()}


def means_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every term over examples."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
