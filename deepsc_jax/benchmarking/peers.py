"""The peers: PyTorch, as `tests/peers` or `tests/reference` has it; MONAI; surface-distance.

`tests/peers` has networks as an expert of PyTorch would time them: scans and tiles of one shape in
a batch, matrices kept on the device, fused Adam, no wait within a step. The variants are the ways
of `torch_ways`. A model that is not there is timed as its reference, which was written to be read,
in three of these. Where ours computes in bfloat16, so do they (AMP).
"""

import contextlib
import importlib
import itertools
import pathlib
import sys
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from deepsc_jax.benchmarking import jobs, monai_loading, monai_networks, torch_processes
from deepsc_jax.benchmarking.jobs import InapplicableError, Job
from deepsc_jax.benchmarking.torch_ways import (
    CUDA,
    DEVICE,
    WAYS,
    as_variant,
    load,
    peer_module,
    synchronised,
    tensors,
)
from deepsc_jax.benchmarking.works import Built
from deepsc_jax.config import Config
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject, Untyped

Predicted = tuple[dict[str, Tensor], Tensor | None]  # volumes, classes
TESTS = pathlib.Path(__file__).parents[2] / "tests"
ON_HOST = ("depth", "origins")  # what the reference reads as Python numbers
OF_REFERENCES = ("eager", "channels_last", "compiled")


def import_late(job: Job) -> None:
    """Import what torch and MONAI would at their first use."""
    if job.work == "train":
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        torch.optim.Adam([parameter]).step()
    late = []
    if WAYS[job.variant].compiled:
        late = ["torch._dynamo", "torch._inductor.compile_fx"]
    if job.side == "monai":
        late += ["monai.networks.nets.unet", "monai.losses.dice", "monai.inferers.utils"]
    for name in late:
        with contextlib.suppress(ImportError):  # `build` says what is missing
            importlib.import_module(name)


def build(job: Job) -> Built:
    """Build a peer's side of `job`, from the weights that ours has left.

    Raises:
      InputError: `tests/reference` is not there, or MONAI is not installed.
      InapplicableError: the variant is none of this work.
    """
    torch.backends.cudnn.benchmark = True  # XLA tries algorithms too
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as XLA by default
    if job.side == "monai":
        return monai_loading.build(job) if job.work == "loading" else monai_networks.build(job)
    if job.side == "surface_distance":
        return _surface_distance(job)
    if not (TESTS / "reference").is_dir():
        raise InputError(f"{TESTS / 'reference'}: not found: run in a checkout of the repository")
    sys.path.insert(0, str(TESTS))
    way = WAYS[job.variant]
    if job.work != "train" and (way.recompute or way.processes > 1):
        raise InapplicableError(f"--work={job.work}: {job.variant} is a way of training")
    peer = peer_module(job)
    if peer is None:
        return _of_reference(job)
    if way.processes > 1:
        return torch_processes.build(job)
    if job.work == "inference":
        return _inference(job, peer)
    return _on_batch(job, peer)


def _surface_distance(job: Job) -> Built[dict[str, float]]:
    """DeepMind's own of the same masks; its two mean distances pooled by area, as ours are."""
    package = importlib.import_module("surface_distance")
    pred, truth = jobs.draw_masks(job.scan_size)

    def run() -> dict[str, float]:
        found = package.compute_surface_distances(truth, pred, jobs.MASK_SPACING_MM)
        areas = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
        average = package.compute_average_surface_distance(found)
        nsd = {
            f"NSD {mm:g}": package.compute_surface_dice_at_tolerance(found, mm)
            for mm in jobs.TOLERANCES_MM
        }
        return nsd | {
            "HD95": package.compute_robust_hausdorff(found, 95),
            "ASSD": float(np.dot(average, areas) / sum(areas)),
        }

    return Built(run, dict)


def environment(_config: Config) -> JsonObject:
    """How torch computes here."""
    return {"torch_threads": torch.get_num_threads()}


def peak_device_bytes() -> int | None:
    """Most device memory that torch's tensors took at once."""
    return torch.cuda.max_memory_allocated() if CUDA else None


def reset_peak_device_bytes() -> None:
    """Forget the most that was taken so far: cuDNN's trials, too, took some."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def give_back_device() -> None:
    """Give the device the memory that torch keeps for its next tensors."""
    if CUDA:
        torch.cuda.empty_cache()


def peak_rates() -> tuple[str, dict[str, float]]:
    """Ours says it."""
    return "", {}


def _on_batch(job: Job, peer: ModuleType) -> Built:
    """A train step or the forward pass of a batch that lies on the device."""
    parts = importlib.import_module("peers.parts")
    config, stage, way = job.config, job.stage, WAYS[job.variant]
    batch = tensors(jobs.batch(job))
    asked = parts.Parts(way.at_once, way.recompute)
    given = {k: x.to(DEVICE) for k, x in peer.inputs(config, stage, batch).items()}
    made = load(job, peer.network(config))
    if job.work == "forward":
        forward = as_variant(peer.Forward(made, config, stage, batch, asked), job)
        return Built(synchronised(job, lambda: forward(given)), _first)
    weights = torch.ones(len(config.data.classes))
    objective = as_variant(peer.Objective(made, config, stage, batch, weights, asked), job)
    step = parts.make_step(objective, config, stage, given)
    return Built(synchronised(job, step), lambda terms: {"loss": float(terms["loss"])})


def _first(out: dict[str, Tensor]) -> dict[str, float]:
    first = {"lesion": lambda x: x.mean(), "logits": lambda x: x[0, 0]}
    return {name: float(first[name](x)) for name, x in out.items()}


def _inference(job: Job, peer: ModuleType) -> Built:
    parts = importlib.import_module("peers.parts").Parts(WAYS[job.variant].at_once)
    made = load(job, peer.network(job.config))
    predictor = as_variant(peer.Predictor(made, job.config, job.scan_size, parts), job)
    return _of_scan(job, predictor)


def _of_scan(job: Job, predictor: Untyped) -> Built:
    """A scan through `predictor`, from and to the host, as ours."""
    drawn, _ = jobs.draw_scan(job.scan_size, 0)

    def predict() -> Predicted:
        volumes, classes = predictor(torch.from_numpy(drawn).to(DEVICE))
        return (
            {name: volume.cpu() for name, volume in volumes.items()},
            None if classes is None else classes.cpu(),
        )

    def summary(predicted: Predicted) -> dict[str, float]:
        volumes, classes = predicted
        means = {"lesion": float(volumes["lesion"].mean())} if "lesion" in volumes else {}
        return means if classes is None else means | {"probability": float(classes[0])}

    return Built(synchronised(job, predict), summary)


def _of_reference(job: Job) -> Built:
    """The model as `tests/reference` has it."""
    try:
        reference = importlib.import_module(f"reference.{job.config.name}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"--peer=torch: {TESTS / 'reference'} has no {job.config.name}: leave --peer out"
        ) from error
    if job.variant not in OF_REFERENCES:
        raise InapplicableError(
            f"--peer=torch: {TESTS / 'peers'} has no {job.config.name}: of its reference there are "
            f"{','.join(OF_REFERENCES)}"
        )
    config, stage = job.config, job.stage
    network = as_variant(load(job, reference.timed(config)), job)
    if job.work == "inference":
        return _of_scan(job, lambda volume: reference.predict(network, config, volume))
    batch = tensors(jobs.batch(job))
    batch = {name: x if name in ON_HOST else x.to(DEVICE) for name, x in batch.items()}
    if job.work == "forward":

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return reference.forward(network, config, batch, stage)

        return Built(synchronised(job, forward), _first)
    weights = torch.ones(len(config.data.classes), device=DEVICE)
    steps = reference.train(network, config, stage, itertools.repeat(batch), weights)
    step = synchronised(job, lambda: next(steps))
    return Built(step, lambda means: {"loss": means["loss"]})
