"""How well a training uses its time and its devices.

Seconds are the host's. It runs ahead of the devices, so that while it waits for a batch these may
still compute: the share of waiting is the most that they idled for want of data.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping

from deepsc_jax.data.batch import Reads
from deepsc_jax.models import registry
from deepsc_jax.planning import model_flops
from deepsc_jax.runtime import memory
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_json
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Batch, Stage, System

STEPPING, COMPILING, WAITING, SAVING, EVALUATING, WATCHING, STARTING = KINDS = (
    *("stepping", "compiling", "waiting", "saving", "evaluating", "watching", "starting"),
)
SEEN = ("volume", "tiles", "slices")  # which arrays hold the voxels that a step reads


class Ledger:
    """Where the seconds of a run went, over all its starts.

    `path` has what was known when the newest checkpoint was saved. A run that is started again goes
    on from there: what came after it, and the time until then, is lost.

    Args:
      path: of the record; None keeps none.
      writer: whether this process writes it.

    Raises:
      InputError: there is another file at `path`.
    """

    def __init__(self, path: pathlib.Path | None = None, *, writer: bool = True):
        self._path, self._writer = path, writer
        begun, self.starts = time.time(), 1
        self._seconds = dict.fromkeys(KINDS, 0.0)
        record = _read(path)
        if record is not None:
            # A run that had come to its end, and is given more steps, did not wait for them.
            idle = 0.0 if record["ended"] is None else begun - record["ended"]
            begun, self.starts = record["begun"] + max(idle, 0), record["starts"] + 1
            self._seconds |= record["seconds"]
        self._begun = begun
        self._kinds, self._since = [STARTING], time.monotonic()

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """A time of `kind`; one within it is not part of it."""
        self._count()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._count()
            self._kinds.pop()

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self._kinds[-1]] += now - self._since
        self._since = now

    def shares(self) -> dict[str, float]:
        """The share of each of `KINDS`, and what was `lost`, in the time since the run began."""
        self._count()
        known = sum(self._seconds.values())
        whole = max(time.time() - self._begun, known, 1e-9)
        shares = {kind: seconds / whole for kind, seconds in self._seconds.items()}
        return shares | {"lost": 1 - known / whole}

    def seconds(self) -> float:
        """Since the run began."""
        return max(time.time() - self._begun, sum(self._seconds.values()))

    def keep(self, *, ended: bool = False) -> None:
        """Write the record: with a checkpoint, and once the run has come to its end."""
        self._count()
        if self._path is None or not self._writer:
            return
        record = {
            "begun": self._begun,
            "starts": self.starts,
            "ended": time.time() if ended else None,
            "seconds": self._seconds,
        }
        write_json(record, self._path)


def _read(path: pathlib.Path | None) -> JsonObject | None:
    """A record as `keep` leaves it; None where there is none."""
    if path is None or not os.path.lexists(path):
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        numbers = [record["begun"], record["starts"], record["ended"] or 0]
        numbers += record["seconds"].values()
        if not record["seconds"].keys() <= set(KINDS):
            raise ValueError(f"seconds of {', '.join(record['seconds'])}")
        if not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError("a number below 0")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: not the record of a run's time ({error!r}): move it elsewhere"
        ) from error
    return record


class Throughput:
    """What the steps of a stage compute.

    Args:
      system: whose.
      stage: of it.
      devices: among which a step is divided.
      counts: whether this process counts FLOPs, which takes tracing a step once a shape.
    """

    def __init__(self, system: System, stage: Stage, devices: int, *, counts: bool):
        self._system, self._stage, self._devices, self._counts = system, stage, devices, counts
        self._flops: dict[int, Mapping[str, float]] = {}
        self._chip = model_flops.published_chip()
        self._steps, self._voxels = 0, 0
        self._total: dict[str, float] = {}

    def learn(self, batch: Batch) -> None:
        """Count the FLOPs of a step on such a batch, if they are not known."""
        depth = _depth(batch, self._stage.reads, self._system)
        if self._counts and depth not in self._flops:
            self._flops[depth] = _flops(self._system, self._stage, depth)

    def add(self, batch: Batch) -> None:
        """A step on this batch was taken."""
        depth = _depth(batch, self._stage.reads, self._system)
        self._steps += 1
        self._voxels += next((math.prod(batch[n].shape) for n in SEEN if n in batch), 0)
        for kind, n in self._flops.get(depth, {}).items():
            self._total[kind] = self._total.get(kind, 0) + n

    def rates(self, seconds_per_step: float) -> dict[str, float]:
        """Of the steps since the last time; what is not known is left out.

        `mfu` is the time that the chips' published peak allows, over the time that was taken.
        """
        seconds = seconds_per_step * self._steps
        rates = {"voxels_per_second": self._voxels / seconds} if self._voxels else {}
        if self._total:
            rates["tflops_per_device"] = sum(self._total.values()) / seconds / self._devices / 1e12
            if self._chip is not None:
                least = model_flops.least_seconds(self._total, self._chip.peaks)
                rates["mfu"] = least / self._devices / seconds
        self._steps, self._voxels, self._total = 0, 0, {}
        return rates | {"peak_memory_mib": memory.peak_bytes() / 2**20}


def _depth(batch: Batch, reads: Reads, system: System) -> int:
    """The slices of a batch's scans, of which only whole scans' FLOPs depend."""
    if reads.tiles != "all" or "volume" not in batch:
        return system.config.data.depth_bucket
    return math.prod(batch["volume"].shape[1:3])


def _flops(system: System, stage: Stage, depth: int) -> Mapping[str, float]:
    """Of a step; nothing where they cannot be counted."""
    known = system.config.name in registry.MODELS
    if not known or type(build(system.config)) is not type(system):  # what no plan traces
        return {}
    try:
        return model_flops.of_step(system.config, stage.name, stage.batch, depth)
    except ValueError:  # a loop of unknown length
        return {}


def last_line(rates: Mapping[str, float], ledger: Ledger) -> str:
    """How well a stage ran, by its last rates, and where the run's time went."""
    forms = {
        "tflops_per_device": "{:.3g} TFLOP/s a device",
        "mfu": "{:.0%} of its peak",
        "scans_per_second": "{:.3g} scans/s",
        "voxels_per_second": "{:.3g} voxels/s",
        "peak_memory_mib": "at most {:.0f} MiB",
    }
    said = [form.format(rates[name]) for name, form in forms.items() if name in rates]
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in ledger.shares().items())
    starts = f"{ledger.starts} start{'s' * (ledger.starts > 1)}"
    return f"{', '.join(said)}; of {ledger.seconds():.0f} s in {starts}: {shares}"
