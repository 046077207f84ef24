"""Our side of every work: what a user of `train` and `predict` gets, built and ready to run."""

import collections
import dataclasses
import itertools
import pickle
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from deepsc_jax.benchmarking import jobs
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.config import CLASSES, STAGES, Config, PlatformConfig, Stage
from deepsc_jax.data import pipeline
from deepsc_jax.data.store import Store
from deepsc_jax.inference.predictor import Predictor
from deepsc_jax.models.deepsc import network as deepsc
from deepsc_jax.models.layers.layout import resolve_dtype
from deepsc_jax.planning import compiled, flops, targets
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.entry import keep_compiled
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training import state as states
from deepsc_jax.training.loop import STAGE_SEEDS
from deepsc_jax.training.step import make_train_step

BATCHES = 10  # that one call of a work with loading takes


@dataclasses.dataclass(frozen=True)
class Built:
    """A work, ready to be timed.

    Attributes:
      run: does it once, to the end, on every device.
      summary: of what `run` returned, numbers that a peer must find too.
      flops: counts those of one step, by kind of product (`targets.PRODUCTS`), or none.
      depths: where a call takes several steps, the slices of each one's scans; what is reported is
        per step.
    """

    run: Callable[[], Any]
    summary: Callable[[Any], dict[str, float]]
    flops: Callable[[], Mapping[str, float]] = dict
    depths: tuple[int, ...] = ()


def import_late(job: Job) -> None:
    """Import what a work would import at its first use: nothing."""


def build(job: Job) -> Built:
    """Build our side of `job`, and leave its weights for the peers and its compiled programs."""
    keep_compiled(str(job.programs))
    if job.side == "forms":
        platform = dataclasses.replace(job.config.platform, conv_form=job.variant)
        try:
            config = dataclasses.replace(job.config, platform=platform)
        except ValueError as error:
            raise InputError(str(error)) from error
        job = dataclasses.replace(job, config=config)
    stage = jobs.stage_of(job)
    if job.work not in ("inference", "loading"):  # as `predict` and `train` do
        device_mesh.use_cpu_cores(job.config, [stage])
    if job.work == "loading":
        return _loading(job)
    if job.work in ("loop", "loop_without_loading"):
        return _loop(job, loads=job.work == "loop")
    return {"forward": _forward, "inference": _inference}.get(job.work, _train)(job, stage)


def count_flops(job: Job) -> dict[str, int]:
    """The model's own FLOPs of one step of a work: once over the network, nothing recomputed.

    By kind of product; empty for a work that computes nothing. Whole-scan inference is counted as
    the forward pass of all tiles.
    """
    if job.work == "loading":
        return {}
    stage, platform = jobs.stage_of(job), job.config.platform
    plain = PlatformConfig(
        data=1, compute_dtype=platform.compute_dtype, conv_form="native", remat="none"
    )
    config, depth = dataclasses.replace(job.config, platform=plain), job.scan_size[0]
    if job.work not in ("forward", "inference"):
        mesh = device_mesh.make_mesh(plain)
        traced = compiled.trace(config, stage, mesh, config.train.batch(stage), depth)
        return dict(flops.count(traced.jaxpr))
    model = deepsc.build(config, jax.default_backend())
    shapes = compiled.batch_shapes(config, "joint", jobs.counts(job)[0], depth)
    params = jax.eval_shape(lambda: states.initial_params(config, model))

    def program(params: Any, batch: Any) -> Any:
        out: Any = model.apply({"params": params}, batch, "joint")
        return out["lesion"], out["logits"]

    return dict(flops.count(jax.jit(program).trace(params, shapes).jaxpr))


def environment(config: Config) -> dict[str, Any]:
    """The devices of this process, and the type that convolutions are computed in."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "compute_dtype": str(resolve_dtype(config.platform.compute_dtype, device.platform)),
    }


def peak_device_bytes() -> int | None:
    """Most device memory that was in use at once, on the first device, where it is told."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def reset_peak_device_bytes() -> None:
    """Nothing: XLA's count cannot be reset, and has what compiling and its trials took in it."""


def give_back_device() -> None:
    """Nothing: XLA gives nothing back before the process ends."""


def peak_rates() -> tuple[str, dict[str, float]]:
    """FLOP per second of each of `targets.PRODUCTS` on one device, and where the figure is from.

    Of a known chip as published; of a CPU, all its cores on a large float32 matrix product now.
    Empty for another chip.
    """
    kind, platform = jax.devices()[0].device_kind, jax.devices()[0].platform
    if platform == "cpu":
        rate = matrix_product_rate()
        return "a float32 matrix product on this machine", dict.fromkeys(targets.PRODUCTS, rate)
    words = kind.lower().replace("v5 lite", "v5e").split()
    for name, chip in targets.CHIPS.items():
        if any(word.startswith(name) for word in words):
            return f"published for {chip.title}", dict(chip.peaks)
    return f"unknown for {kind}", {}


def matrix_product_rate(side: int = 2048) -> float:
    """FLOP per second of the best of five float32 products of square matrices."""
    x = jnp.ones((side, side))
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds)


def _weights(job: Job, model: deepsc.DeepSC) -> Any:
    params = states.initial_params(job.config, model)
    job.weights.write_bytes(pickle.dumps(jax.device_get(params)))
    return params


def _step(job: Job, stage: Stage, mesh: Mesh) -> tuple[Callable[[Any], Any], deepsc.DeepSC]:
    """A function from a batch to the scalars, to come, of a step that trains on it."""
    config = job.config
    device_mesh.check_batch(config, stage, mesh)
    model = deepsc.build(config, jax.default_backend())
    state = states.create(config, stage, _weights(job, model))
    where = states.sharding(config, state, mesh)
    state = jax.device_put(state, where)
    step = make_train_step(config, stage, model, mesh, jnp.ones(len(CLASSES)), where)

    def take(batch: Any) -> Any:
        nonlocal state
        state, scalars = step(state, batch)
        return scalars

    return take, model


def _train(job: Job, stage: Stage) -> Built:
    mesh = device_mesh.make_mesh(job.config.platform)
    step, _ = _step(job, stage, mesh)
    batch = device_mesh.put_batch(jobs.batch(job.config, stage, job.scan_size), mesh)

    def run() -> Any:
        return jax.block_until_ready(step(batch))

    return Built(run, _loss, lambda: count_flops(job))


def _loss(scalars: Any) -> dict[str, float]:
    return {"loss": float(scalars["loss"])}


def _forward(job: Job, stage: Stage) -> Built:
    config, mesh = job.config, device_mesh.make_mesh(job.config.platform)
    device_mesh.check_batch(config, stage, mesh)
    model = deepsc.build(config, jax.default_backend())

    def program(params: Any, batch: Any) -> Any:
        out: Any = model.apply({"params": params}, batch, stage)
        return {"lesion": out["lesion"], "logits": out["logits"]}

    forward = jax.jit(
        device_mesh.over_data(program, mesh, gathered=True),
        compiler_options=device_mesh.compiler_options(
            mesh.devices.flat[0].platform, config.data, model.layout.form
        ),
    )
    params = jax.device_put(_weights(job, model), device_mesh.replicated(mesh))
    batch = device_mesh.put_batch(jobs.batch(config, stage, job.scan_size), mesh)

    def summary(out: Any) -> dict[str, float]:
        return {"lesion": float(out["lesion"].mean()), "logit": float(out["logits"][0, 0])}

    def run() -> Any:
        return jax.block_until_ready(forward(params, batch))

    return Built(run, summary, lambda: count_flops(job))


def _inference(job: Job, stage: Stage) -> Built:
    model = deepsc.build(job.config, jax.default_backend())
    predictor = Predictor(job.config, stage, _weights(job, model), 0.5, "unknown data")
    volume, _ = jobs.draw_scan(job.scan_size, 0)

    def summary(found: Any) -> dict[str, float]:
        return {"lesion": float(found.lesion.mean()), "probability": float(found.probabilities[0])}

    return Built(lambda: predictor(volume), summary, lambda: count_flops(job))


def _loading(job: Job) -> Built:
    def run() -> tuple[int, ...]:
        batches = iter(_batches(job))
        depths = tuple(_filled_depth(job, next(batches)) for _ in range(BATCHES))
        batches.close()
        return depths

    return Built(run, lambda depths: {"slices": sum(depths)}, dict, run())


def _loop(job: Job, *, loads: bool) -> Built:
    """Steps as the train loop takes them: the next is prepared and sent while one is computed.

    It begins to read with its first.
    """
    mesh = device_mesh.make_mesh(job.config.platform)
    step, _ = _step(job, job.stage, mesh)
    read: Any = iter(_batches(job))
    first = next(read)
    others = itertools.islice(read if loads else itertools.repeat(first), BATCHES - 1)
    depths = tuple(_filled_depth(job, batch) for batch in itertools.chain([first], others))
    read.close()

    def run() -> Any:
        batches: Any = iter(_batches(job)) if loads else itertools.repeat(first)
        scalars = [step(device_mesh.put_batch(next(batches), mesh)) for _ in range(BATCHES)]
        if loads:
            batches.close()
        return jax.block_until_ready(scalars)[0]

    def flops() -> dict[str, float]:
        found: dict[str, float] = {}
        for depth, times in collections.Counter(depths).items():
            for kind, n in count_flops(jobs.of_depth(job, depth)).items():
                found[kind] = found.get(kind, 0) + n * times / len(depths)
        return found

    return Built(run, _loss, flops, depths)


def _filled_depth(job: Job, batch: dict[str, Any]) -> int:
    """What the depth of a batch's scans was filled up to; only joint batches depend on it."""
    if job.stage != "joint":
        return job.scan_size[0]
    _, rows, columns = job.config.data.tile_counts(1)
    return batch["tiles"].shape[1] // (rows * columns) * job.config.data.tile[0]


def _batches(job: Job) -> Any:
    config = job.config
    if not flags.FLAGS.is_parsed():  # grain's threads ask for flags
        flags.FLAGS.mark_as_parsed()
    assert job.data_dir is not None
    store = Store(job.data_dir / "store", config.data, config.train.cache_mib)
    return pipeline.batches(
        store,
        "train",
        job.stage,
        config,
        seed=config.train.seed * len(STAGES) + STAGE_SEEDS[job.stage],
        batch_size=config.train.batch(job.stage),
    )
