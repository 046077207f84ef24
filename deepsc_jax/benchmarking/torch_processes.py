"""Two processes of PyTorch by DDP and gloo, each with half of the scans and of the cores.

Ours makes as many devices of a CPU as it has cores: this is the peer's counterpart.
"""

import datetime
import importlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from deepsc_jax.benchmarking import jobs
from deepsc_jax.benchmarking.jobs import InapplicableError, Job
from deepsc_jax.benchmarking.torch_ways import CUDA, WAYS, load, peer_module, synchronised, tensors
from deepsc_jax.benchmarking.works import Built
from deepsc_jax.runtime import device_mesh, memory
from deepsc_jax.systems.building import stages_of

TIMEOUT = datetime.timedelta(minutes=10)
STEP, BYTES = "step", "bytes"
WARM = 2  # steps after which the other process's peak counts, as in `worker`


def build(job: Job) -> Built:
    """A train step of two processes, this one and one that it starts.

    Raises:
      InapplicableError: on a GPU, on one core, or of a batch that two processes cannot share.
    """
    count = WAYS[job.variant].processes
    if CUDA or device_mesh.usable_cores() < count or job.scans % count:
        raise InapplicableError(
            f"--variants={job.variant}: they share {count} cores and a batch of an even number of "
            f"scans, {job.scans} found"
        )
    meeting = job.folder / f"{job.name}.meeting"
    meeting.unlink(missing_ok=True)
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=_serve, args=(job, there), daemon=True).start()
    step = _step(job, 0)

    def run() -> dict[str, Tensor]:
        here.send(STEP)
        return step()

    def more_bytes() -> int:
        here.send(BYTES)
        return here.recv()

    return Built(
        synchronised(job, run),
        lambda terms: {"loss": float(terms["loss"])},
        more_bytes=more_bytes,
    )


def _serve(job: Job, connection: Connection) -> None:
    """Be the second process, until the first one ends."""
    before, step, taken = memory.held("VmRSS"), _step(job, 1), 0
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if asked == BYTES:
            connection.send(memory.held("VmHWM") - before)
            continue
        synchronised(job, step)()
        taken += 1
        if taken == WARM:
            memory.reset_peak()


def _step(job: Job, rank: int) -> Callable[[], dict[str, Tensor]]:
    """A step on this process's scans; the terms are means over those of all."""
    count = WAYS[job.variant].processes
    torch.set_num_threads(max(device_mesh.usable_cores() // count, 1))
    meeting = (job.folder / f"{job.name}.meeting").absolute().as_uri()
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=count, timeout=TIMEOUT
    )
    peer = peer_module(job)
    assert peer is not None
    parts = importlib.import_module("peers.parts")
    batch = {name: x[rank::count] for name, x in tensors(jobs.batch(job)).items()}
    given = peer.inputs(job.config, job.stage, batch)
    made = load(job, peer.network(job.config))
    weights = torch.ones(len(job.config.data.classes))
    (stage,) = stages_of(job.config, job.stage)
    objective = peer.Objective(made, job.config, job.stage, batch, weights, parts.Parts()).float()
    both = DistributedDataParallel(
        objective,
        broadcast_buffers=False,  # matrices, which no step changes
        gradient_as_bucket_view=True,
        find_unused_parameters=not stage.after,  # a pre-training leaves other parts alone
    )
    step = parts.make_step(both, job.config, job.stage, given)

    def averaged() -> dict[str, Tensor]:
        terms = step()
        means = torch.stack(list(terms.values()))
        distributed.all_reduce(means)
        return dict(zip(terms, means / count, strict=True))

    return averaged
