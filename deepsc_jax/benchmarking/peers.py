"""The peers: the PyTorch reference of `tests/reference`, MONAI's 3D U-Net, surface-distance.

Of each network there are three variants: eager; channels-last; and compiled, in which every subnet
went through `torch.compile`. Where ours computes in bfloat16, so do they (AMP). The reference takes
the scans of a batch one after another, as it was written to be read; but it pools as PyTorch does.
"""

import bisect
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import pathlib
import pickle
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch.nn import Module

from deepsc_jax.benchmarking import jobs, monai_loading, works
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.works import Built
from deepsc_jax.config import Config, Ints3
from deepsc_jax.interop.torch import variables_to_torch
from deepsc_jax.models import registry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject, Untyped
from deepsc_jax.systems.whole_scan import chunk_tiles

Out = TypeVar("Out")
Predicted = tuple[dict[str, torch.Tensor], torch.Tensor | None]  # volumes, classes
TESTS = pathlib.Path(__file__).parents[2] / "tests"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ON_HOST = ("depth", "origins")  # what the reference reads as Python numbers
WIDTHS = range(1, 257)


def import_late(job: Job) -> None:
    """Import what torch and MONAI would at their first use."""
    if job.work == "train":
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        torch.optim.Adam([parameter]).step()
    late = {"compiled": ["torch._dynamo", "torch._inductor.compile_fx"]}.get(job.variant, [])
    if job.side == "monai":
        late += ["monai.networks.nets.unet", "monai.losses.dice", "monai.inferers.utils"]
    for name in late:
        with contextlib.suppress(ImportError):  # `build` says what is missing
            importlib.import_module(name)


def build(job: Job) -> Built:
    """Build a peer's side of `job`, from the weights that ours has left.

    Raises:
      InputError: `tests/reference` is not there, or MONAI is not installed.
    """
    torch.backends.cudnn.benchmark = True  # XLA tries algorithms too
    if job.side == "monai":
        return _monai(job)
    if job.side == "surface_distance":
        return _surface_distance(job)
    if not (TESTS / "reference").is_dir():
        raise InputError(f"{TESTS / 'reference'}: not found: run in a checkout of the repository")
    sys.path.insert(0, str(TESTS))
    reference = _reference(job)
    network = reference.timed(job.config)
    weights = pickle.loads(job.weights.read_bytes())
    table = registry.torch_names(job.config.name)
    network.load_state_dict(variables_to_torch(weights, table))
    network = _as_variant(network, job, network.children())
    if job.work == "forward":
        return _forward(job, reference, network)
    if job.work == "inference":
        return _inference(job, reference, network)
    return _train(job, reference, network)


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


def _reference(job: Job) -> ModuleType:
    """The model in plain PyTorch, of `tests/reference`."""
    try:
        return importlib.import_module(f"reference.{job.config.name}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"--peer=torch: {TESTS / 'reference'} has no {job.config.name}: leave --peer out"
        ) from error


def _as_variant(network: Untyped, job: Job, subnets: Iterable[Module]) -> Module:
    network = network.to(DEVICE)
    if job.variant == "channels_last":
        network = network.to(memory_format=torch.channels_last_3d)
    if job.variant == "compiled":
        for subnet in subnets:
            subnet.compile()
    return network


def _precision(job: Job) -> contextlib.AbstractContextManager:
    """AMP where ours computes in bfloat16."""
    wanted = job.config.platform.compute_dtype
    if wanted == "bfloat16" or (wanted == "auto" and CUDA):
        return torch.autocast(DEVICE.type, torch.bfloat16)
    return contextlib.nullcontext()


def _synchronised(job: Job, work: Callable[[], Out]) -> Callable[[], Out]:
    def run() -> Out:
        with _precision(job):
            out = work()
        if CUDA:
            torch.cuda.synchronize()
        return out

    return run


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tensors = {
        name: torch.from_numpy(x if x.dtype.kind == "f" else x.astype(np.int64))
        for name, x in batch.items()
    }
    return {name: x if name in ON_HOST else x.to(DEVICE) for name, x in tensors.items()}


def _train(job: Job, reference: ModuleType, network: Module) -> Built:
    batch = _tensors(jobs.batch(job))
    weights = torch.ones(len(job.config.data.classes), device=DEVICE)
    steps = reference.train(network, job.config, job.stage, itertools.repeat(batch), weights)
    return Built(_synchronised(job, lambda: next(steps)), lambda means: {"loss": means["loss"]})


def _forward(job: Job, reference: ModuleType, network: Module) -> Built:
    batch = _tensors(jobs.batch(job))

    def forward() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return reference.forward(network, job.config, batch, job.stage)

    def summary(out: dict[str, torch.Tensor]) -> dict[str, float]:
        first = {"lesion": lambda x: x.mean(), "logits": lambda x: x[0, 0]}
        return {name: float(first[name](x)) for name, x in out.items()}

    return Built(_synchronised(job, forward), summary)


def _inference(job: Job, reference: ModuleType, network: Module) -> Built:
    drawn, _ = jobs.draw_scan(job.scan_size, 0)

    def predict() -> Predicted:  # from and to the host, as ours
        drawn_here = torch.from_numpy(drawn).to(DEVICE)
        volumes, classes = reference.predict(network, job.config, drawn_here)
        return (
            {name: volume.cpu() for name, volume in volumes.items()},
            None if classes is None else classes.cpu(),
        )

    def summary(predicted: Predicted) -> dict[str, float]:
        volumes, classes = predicted
        means = {"lesion": float(volumes["lesion"].mean())} if "lesion" in volumes else {}
        return means if classes is None else means | {"probability": float(classes[0])}

    return Built(_synchronised(job, predict), summary)


def _monai(job: Job) -> Built:
    if job.work == "loading":
        return monai_loading.build(job)
    # Counted in a process of its own: JAX's traces must not be in this one's memory.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        wanted = sum(pool.submit(works.count_flops, job).result().values())
    trains = job.work == "train"
    tile = job.config.data.tile
    tiles = jobs.counts(job)[1]
    width, flops = nearest_width(tile, tiles, wanted, trains=trains)
    torch.manual_seed(job.config.train.seed)
    network = _unet(width)
    network = _as_variant(network, job, [network])
    run = _monai_step(job, network) if trains else _sliding_window(job, network)
    return Built(_synchronised(job, run), lambda _: {"width": width}, lambda: {"float32": flops})


def _unet(width: int) -> torch.nn.Module:
    """MONAI's U-Net of four levels, `width` channels at the first."""
    from deepsc_jax.interop.monai import make_unet

    return make_unet([width * 2**level for level in range(4)])


def nearest_width(tile: Ints3, tiles: int, wanted: int, *, trains: bool) -> tuple[int, int]:
    """The width whose U-Net's FLOPs are nearest to `wanted` for so many tiles, and those FLOPs."""

    @functools.cache
    def flops(width: int) -> int:
        return tiles * _unet_flops(width, tile, trains)

    above = bisect.bisect_left(WIDTHS, wanted, key=flops)
    near = WIDTHS[max(above - 1, 0) : above + 1]
    width = min(near, key=lambda width: abs(flops(width) - wanted))
    return width, flops(width)


def _unet_flops(width: int, tile: Ints3, trains: bool) -> int:
    """Of one tile, forward and, if it trains, backward; counted on shapes alone."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = _unet(width)(torch.zeros(1, 1, *tile))
        if trains:
            logits.sum().backward()
    return counter.get_total_flops()


def _monai_step(job: Job, network: Module) -> Callable[[], float]:
    from monai.losses.dice import DiceCELoss

    batch = jobs.batch(job)
    tiles, lesions = (
        torch.from_numpy(batch[name].reshape(-1, 1, *job.config.data.tile)).to(DEVICE)
        for name in ("tiles", "lesions")
    )
    objective = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    rate = job.config.stage(job.stage).learning_rate
    optimizer = torch.optim.Adam(network.parameters(), rate)

    def step() -> float:
        loss = objective(network(tiles), lesions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _sliding_window(job: Job, network: Module) -> Callable[[], torch.Tensor]:
    from monai.inferers.utils import sliding_window_inference

    drawn, _ = jobs.draw_scan(job.scan_size, 0)
    tile = job.config.data.tile
    at_once = chunk_tiles(tile, "gpu" if CUDA else "cpu")  # as ours

    def predict() -> torch.Tensor:
        with torch.no_grad():
            volume = torch.from_numpy(drawn[None, None]).to(DEVICE)
            logits = sliding_window_inference(volume, tile, at_once, network, overlap=0)
            assert isinstance(logits, torch.Tensor)
            return torch.softmax(logits, dim=1)[0, 1].cpu()

    return predict
