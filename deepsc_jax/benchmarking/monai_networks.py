"""MONAI's 3D U-Net with as many FLOPs as ours: its train step and its sliding-window inference."""

import bisect
import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable

import torch
from torch.nn import Module

from deepsc_jax.benchmarking import jobs, works
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.torch_ways import CUDA, DEVICE, as_variant, synchronised
from deepsc_jax.benchmarking.works import Built
from deepsc_jax.config import Ints3
from deepsc_jax.systems.whole_scan import chunk_tiles

WIDTHS = range(1, 257)


def build(job: Job) -> Built:
    """Build MONAI's side of a train step or of inference."""
    # Counted in a process of its own: JAX's traces must not be in this one's memory.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        wanted = sum(pool.submit(works.count_flops, job).result().values())
    trains = job.work == "train"
    tile = job.config.data.tile
    tiles = jobs.counts(job)[1]
    width, flops = nearest_width(tile, tiles, wanted, trains=trains)
    torch.manual_seed(job.config.train.seed)
    network = _unet(width)
    network = as_variant(network, job)
    run = _monai_step(job, network) if trains else _sliding_window(job, network)
    return Built(synchronised(job, run), lambda _: {"width": width}, lambda: {"float32": flops})


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


def _monai_step(job: Job, network: Module) -> Callable[[], torch.Tensor]:
    from monai.losses.dice import DiceCELoss

    batch = jobs.batch(job)
    tiles, lesions = (
        torch.from_numpy(batch[name].reshape(-1, 1, *job.config.data.tile)).to(DEVICE)
        for name in ("tiles", "lesions")
    )
    objective = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    rate = job.config.stage(job.stage).learning_rate
    optimizer = torch.optim.Adam(network.parameters(), rate, fused=True)

    def step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        loss = objective(network(tiles), lesions)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

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
