"""Our side of every work: what a user of `train` and `predict` gets, built and ready to run."""

import collections
import dataclasses
import itertools
import pickle
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from deepsc_jax.benchmarking import jobs
from deepsc_jax.benchmarking.jobs import InapplicableError, Job
from deepsc_jax.config import Config
from deepsc_jax.data import pipeline
from deepsc_jax.data.batch import DEPTH_AXES
from deepsc_jax.data.batch import Batch as HostBatch
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.store import Store
from deepsc_jax.metrics.surface import surface_distances
from deepsc_jax.models.layers.layout import resolve_dtype
from deepsc_jax.planning import compiled, flops, model_flops, targets
from deepsc_jax.runtime import compiler, device_mesh
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.systems.building import build as build_system
from deepsc_jax.systems.decoding import decode
from deepsc_jax.systems.system import Batch, Stage, System, Variables, initial
from deepsc_jax.training import state as states
from deepsc_jax.training.step import Scalars, make_train_step

Out = TypeVar("Out")
BATCHES = 10  # that one call of a work with loading takes
OUTPUTS = ("lesion", "logits")  # of a network, that all peers have


@dataclasses.dataclass(frozen=True)
class Built(Generic[Out]):
    """A work, ready to be timed.

    Attributes:
      run: does it once, to the end, on every device.
      summary: of what `run` returned, numbers that a peer must find too.
      flops: counts those of one step, by kind of product (`targets.PRODUCTS`), or none.
      depths: where a call takes several steps, the slices of each one's scans; what is reported is
        per step.
      more_bytes: at most held by other processes that belong to it.
    """

    run: Callable[[], Out]
    summary: Callable[[Out], dict[str, float]]
    flops: Callable[[], Mapping[str, float]] = dict
    depths: tuple[int, ...] = ()
    more_bytes: Callable[[], int] = lambda: 0


def import_late(job: Job) -> None:
    """Import what a work would import at its first use: nothing."""


def build(job: Job) -> Built:
    """Build our side of `job`, and leave its weights for the peers and its compiled programs."""
    compiler.keep_compiled(str(job.programs))
    if job.side == "forms":
        platform = dataclasses.replace(job.config.platform, conv_form=job.variant)
        try:
            config = dataclasses.replace(job.config, platform=platform)
        except ValueError as error:  # a form may be another device's
            raise InapplicableError(str(error)) from error
        job = dataclasses.replace(job, config=config)
    if job.work not in ("inference", "loading", "surface"):  # as `predict` and `train` do
        device_mesh.use_cpu_cores(job.config.platform, [job.scans])
    if job.work == "loading":
        return _loading(job)
    if job.work in ("loop", "loop_without_loading"):
        return _loop(job, loads=job.work == "loop")
    others = {
        "forward": _forward,
        "inference": _inference,
        "decoding": _decoding,
        "surface": _surface,
    }
    return others.get(job.work, _train)(job)


def count_flops(job: Job) -> dict[str, int]:
    """The model's own FLOPs of one step of a work: once over the network, nothing recomputed.

    By kind of product; empty for a work that computes nothing. Whole-scan inference is counted as
    the forward pass of all tiles.
    """
    if job.work in ("loading", "decoding", "surface"):
        return {}
    depth = job.scan_size[0]
    if job.work not in ("forward", "inference"):
        return model_flops.of_step(job.config, job.stage, job.scans, depth)
    system, stage = _system(model_flops.plain(job.config), job.stage)
    whole = dataclasses.replace(stage, reads=stage.reads.whole())
    shapes = compiled.batch_shapes(system.config, whole, jobs.counts(job)[0], depth)
    variables = jax.eval_shape(lambda: initial(system))

    def program(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        batch = decode(batch, stage.reads, system.config.data, system.config.train)
        out = system.outputs(stage, variables, batch)
        return {name: out[name] for name in OUTPUTS if name in out}

    return dict(flops.count(jax.jit(program).trace(variables, shapes).jaxpr))


def environment(config: Config) -> JsonObject:
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
    first = jax.devices()[0]
    if first.platform == "cpu":
        rate = matrix_product_rate()
        return "a float32 matrix product on this machine", dict.fromkeys(targets.PRODUCTS, rate)
    chip = model_flops.published_chip()
    if chip is None:
        return f"unknown for {first.device_kind}", {}
    return f"published for {chip.title}", dict(chip.peaks)


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


def _system(config: Config, name: str) -> tuple[System, Stage]:
    """What trains the stage of that name, and the stage."""
    system = build_system(config)
    stage = system.stage(name)
    return system.of(stage), stage


def _surface(job: Job) -> Built[dict[str, float]]:
    """NSD at four tolerances, HD95 and ASSD of the masks of one scan."""
    pred, truth = jobs.draw_masks(job.scan_size)

    def run() -> dict[str, float]:
        found = surface_distances(pred, truth, jobs.MASK_SPACING_MM)
        nsd = {f"NSD {mm:g}": found.normalized_dice(mm) for mm in jobs.TOLERANCES_MM}
        return nsd | {"HD95": found.hausdorff_mm(), "ASSD": found.average_mm()}

    return Built(run, dict)


def _weights(job: Job, system: System) -> Variables:
    variables = initial(system)
    job.weights.write_bytes(pickle.dumps(jax.device_get(variables)))
    return variables


def _step(job: Job, mesh: Mesh) -> Callable[[Batch], Scalars]:
    """A function from a batch to the scalars, to come, of a step that trains on it."""
    config, (system, stage) = job.config, _system(job.config, job.stage)
    flag = config.stage_flag(stage.name, "batch")
    device_mesh.check_batch(flag, stage.batch, config.platform.accumulation, mesh)
    state = states.create(system, stage, _weights(job, system))
    where = states.sharding(state, mesh, shard_optimizer=config.platform.shard_optimizer)
    state = jax.device_put(state, where)
    step = make_train_step(system, stage, mesh, system.facts(stage, ()), where)

    def take(batch: Batch) -> Scalars:
        nonlocal state
        state, scalars = step(state, batch)
        return scalars

    return take


def _train(job: Job) -> Built:
    mesh = device_mesh.make_mesh(job.config.platform)
    step = _step(job, mesh)
    batch = device_mesh.put_batch(jobs.batch(job, travels=True), mesh, DEPTH_AXES)

    def run() -> Scalars:
        return jax.block_until_ready(step(batch))

    return Built(run, _loss, lambda: count_flops(job))


def _loss(scalars: Scalars) -> dict[str, float]:
    return {"loss": float(scalars["loss"])}


def _forward(job: Job) -> Built:
    mesh, (system, stage) = (
        device_mesh.make_mesh(job.config.platform),
        _system(job.config, job.stage),
    )
    flag = system.config.stage_flag(stage.name, "batch")
    device_mesh.check_batch(flag, stage.batch, system.config.platform.accumulation, mesh)

    def program(variables: Variables, _: Variables, batch: Batch) -> dict[str, jax.Array]:
        batch = decode(batch, stage.reads, system.config.data, system.config.train)
        out = system.outputs(stage, variables, batch)
        return {name: out[name] for name in OUTPUTS if name in out}

    forward = jax.jit(
        device_mesh.over_data(program, mesh, gathered=True),
        compiler_options=compiler.options(
            mesh.devices.flat[0].platform, system.config.data.tile, system.layout.form
        ),
    )
    variables = jax.device_put(_weights(job, system), device_mesh.replicated(mesh))
    batch = device_mesh.put_batch(jobs.batch(job, travels=True), mesh, DEPTH_AXES)

    def summary(out: dict[str, jax.Array]) -> dict[str, float]:
        first = {"lesion": lambda x: x.mean(), "logits": lambda x: x[0, 0]}
        return {name: float(first[name](x)) for name, x in out.items()}

    def run() -> dict[str, jax.Array]:
        return jax.block_until_ready(forward(variables, {}, batch))

    return Built(run, summary, lambda: count_flops(job))


def _decoding(job: Job) -> Built:
    """What of a train step goes before the network: decoding and augmentation of its batch."""
    mesh, (system, stage) = (
        device_mesh.make_mesh(job.config.platform),
        _system(job.config, job.stage),
    )
    config = system.config

    def program(own: Variables, shared: Variables, batch: Batch) -> Batch:
        del own, shared
        return decode(batch, stage.reads, config.data, config.train)

    decoded = jax.jit(device_mesh.over_data(program, mesh, gathered=True))
    batch = device_mesh.put_batch(jobs.batch(job, travels=True), mesh, DEPTH_AXES)
    return Built(lambda: jax.block_until_ready(decoded({}, {}, batch)), lambda _: {})


def _inference(job: Job) -> Built:
    alone = dataclasses.replace(job.config.platform, space=1)
    system, stage = _system(dataclasses.replace(job.config, platform=alone), job.stage)
    predict = system.predictor(stage, _weights(job, system))
    volume, _ = jobs.draw_scan(job.scan_size, 0)

    def summary(prediction: Prediction) -> dict[str, float]:
        means = {name: float(volume.mean()) for name, volume in prediction.volumes.items()}
        if prediction.classes is not None:
            means["probability"] = float(prediction.classes[0])
        return means

    return Built(lambda: predict(volume), summary, lambda: count_flops(job))


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
    step = _step(job, mesh)
    read = iter(_batches(job))
    first = next(read)
    others = itertools.islice(read if loads else itertools.repeat(first), BATCHES - 1)
    depths = tuple(_filled_depth(job, batch) for batch in itertools.chain([first], others))
    read.close()

    def run() -> Scalars:
        reading = iter(_batches(job)) if loads else None
        batches = itertools.repeat(first) if reading is None else reading
        scalars = [
            step(device_mesh.put_batch(next(batches), mesh, DEPTH_AXES)) for _ in range(BATCHES)
        ]
        if reading is not None:
            reading.close()
        return jax.block_until_ready(scalars)[0]

    def flops() -> dict[str, float]:
        counted: dict[str, float] = {}
        for depth, times in collections.Counter(depths).items():
            for kind, n in count_flops(jobs.of_depth(job, depth)).items():
                counted[kind] = counted.get(kind, 0) + n * times / len(depths)
        return counted

    return Built(run, _loss, flops, depths)


def _filled_depth(job: Job, batch: HostBatch) -> int:
    """What the depth of a batch's scans was filled up to; only whole scans depend on it."""
    if job.reads.tiles != "all":
        return job.scan_size[0]
    slabs, depth = batch["volume"].shape[1:3]
    return slabs * depth


def _batches(job: Job) -> pipeline.Batches:
    config, system = job.config, build_system(job.config)
    if not flags.FLAGS.is_parsed():  # grain's threads ask for flags
        flags.FLAGS.mark_as_parsed()
    assert job.data_dir is not None
    store = Store(job.data_dir / "store", config.data, config.train.cache_mib)
    none_said = np.zeros((job.reads.teachers, len(config.data.classes)), np.float32)
    return pipeline.batches(
        store,
        "train",
        job.reads,
        config,
        seed=system.seed(system.stage(job.stage)),
        batch_size=job.scans,
        taught={case.name: none_said for case in store.cases("train")},
    )
