"""The ways in which PyTorch is asked to compute, and its device."""

import contextlib
import dataclasses
import importlib
import importlib.util
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from deepsc_jax.benchmarking.jobs import InapplicableError, Job
from deepsc_jax.interop.torch import variables_to_torch
from deepsc_jax.models import registry

Out = TypeVar("Out")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


@dataclasses.dataclass(frozen=True)
class Way:
    """What a variant is.

    Attributes:
      at_once: see `Parts` of `tests/peers`.
      recompute: the same.
      channels_last: weights, and so what convolutions give, have channels last in memory.
      compiled: the mode of `torch.compile`, or none.
      processes: among which a batch's scans and the cores are divided, by DDP and gloo.
    """

    at_once: Literal["all", "layer", "tile"] = "all"
    recompute: bool = False
    channels_last: bool = False
    compiled: Literal["default", "max-autotune"] | None = None
    processes: int = 1


WAYS = {
    "eager": Way(),
    "layers": Way("layer"),
    "one_by_one": Way("tile"),
    "channels_last": Way(channels_last=True),
    "compiled": Way(compiled="default"),
    "compiled_channels_last": Way(channels_last=True, compiled="default"),
    "max_autotune": Way(channels_last=CUDA, compiled="max-autotune"),
    "checkpointed": Way("layer", recompute=True),
    "processes": Way(processes=2),
}


def as_variant(network: Module, job: Job) -> Module:
    """The module on the device, in the memory format of its variant, and compiled if that is."""
    way, network = WAYS[job.variant], network.float().to(DEVICE)
    if way.channels_last:
        network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if way.compiled:
        network.compile(mode=way.compiled)
    return network


def precision(job: Job) -> contextlib.AbstractContextManager:
    """AMP where ours computes in bfloat16."""
    wanted = job.config.platform.compute_dtype
    if wanted == "bfloat16" or (wanted == "auto" and CUDA):
        return torch.autocast(DEVICE.type, torch.bfloat16)
    return contextlib.nullcontext()


def synchronised(job: Job, work: Callable[[], Out]) -> Callable[[], Out]:
    """The work to its end on the device: one wait, after it."""

    def run() -> Out:
        with precision(job):
            out = work()
        if CUDA:
            torch.cuda.synchronize()
        return out

    return run


def load(job: Job, made: Module) -> Module:
    """A network with the weights that ours has left."""
    weights = pickle.loads(job.weights.read_bytes())
    made.load_state_dict(variables_to_torch(weights, registry.torch_names(job.config.name)))
    return made


def tensors(batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """On the host."""
    return {
        name: torch.from_numpy(x if x.dtype.kind == "f" else x.astype(np.int64))
        for name, x in batch.items()
    }


def peer_module(job: Job) -> ModuleType | None:
    """The module of `tests/peers` that a job is of; None where there is none.

    Raises:
      InapplicableError: MONAI's DynUNet beside a model that it is not.
    """
    name = job.config.name
    if job.side == "dynunet":
        if name != "unet3d":
            raise InapplicableError(f"--peer=dynunet: it is beside --model=unet3d, {name} found")
        name = "dynunet"
    if importlib.util.find_spec(f"peers.{name}") is None:
        return None
    return importlib.import_module(f"peers.{name}")
