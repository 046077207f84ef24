"""What every peer is told of how to compute, and the step that trains one."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from deepsc_jax.config import Config, TrainConfig

Inputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Parts:
    """How much is computed at once.

    Attributes:
      at_once: tiles of all scans in one batch, of one layer of tiles, or of one place.
      recompute: activations are computed again in the backward pass.
    """

    at_once: Literal["all", "layer", "tile"] = "all"
    recompute: bool = False


def make_step(
    objective: nn.Module, config: Config, stage: str, inputs: Inputs
) -> Callable[[], dict[str, Tensor]]:
    """A function that takes a step of the optimizer, whose learning rate falls linearly to 0.

    It returns the terms as before the step, on the device.
    """
    options, of_stage = config.train, config.stage(stage)
    optimizer = _optimizer(objective, options, of_stage.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(1 - step / of_stage.steps, 0)
    )

    def step() -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        terms = objective(inputs)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        optimizer.step()
        schedule.step()
        return {name: term.detach() for name, term in terms.items()}

    return step


def _optimizer(objective: nn.Module, options: TrainConfig, rate: float) -> torch.optim.Optimizer:
    parameters = objective.parameters()
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, options.momentum, nesterov=True, fused=True)
    betas = (options.adam_b1, options.adam_b2)
    return torch.optim.Adam(parameters, rate, betas, options.adam_eps, fused=True)
