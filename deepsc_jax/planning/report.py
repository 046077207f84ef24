"""A plan as rows for a file, and as a table to read."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from deepsc_jax.planning import kernels
from deepsc_jax.planning.compiled import KINDS, Program
from deepsc_jax.planning.hlo import Collective
from deepsc_jax.planning.roofline import Bound, bound
from deepsc_jax.planning.targets import GIB, PRODUCTS, Chip
from deepsc_jax.runtime.types import JsonObject

UNKNOWN = (
    "Not known, so not in these figures: the workspace of cuDNN's algorithms and what autotuning "
    "would choose\n(on GPU), the runtime's own buffers (NCCL, CUDA context), hits in caches, the "
    "start of kernels, the latency of\ntransfers, the reading of data, stragglers. FLOPs are of "
    "convolutions and matrix products. Bounds assume the\npublished peaks below; a real step takes "
    "longer, and then transfers are a smaller share of it."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """The plan of one cluster.

    Attributes:
      platform: the chip's name.
      chip: its facts.
      devices: how many of them.
      space: over how many a scan's depth is split.
      scans: scans in a batch for each share of the `data` axis.
      remat: the configuration's.
      program: the compiled step.
    """

    platform: str
    chip: Chip
    devices: int
    space: int
    scans: int
    remat: str
    program: Program

    @property
    def fits(self) -> bool:
        """Whether the step's peak is within the limit."""
        return not self.program.refused and self.program.memory["peak"] <= self.chip.limit

    @property
    def bound(self) -> Bound:
        """The least seconds of a step."""
        program = self.program
        return bound(program.flops, program.bytes_moved, program.collectives, self.chip)

    @property
    def scans_per_second(self) -> float:
        """Of the whole cluster, at most."""
        return self.scans * self.devices // self.space / self.bound.step

    def document(self) -> JsonObject:
        """The row as JSON; per device, but for `scans_per_second_bound`."""
        program, bounds = self.program, self.bound
        return {
            "platform": self.platform,
            "devices": self.devices,
            "space": self.space,
            "scans_per_batch_share": self.scans,
            "remat": self.remat,
            "per_device_gib": {kind: program.memory.get(kind, 0) / GIB for kind in KINDS}
            if not program.refused
            else {"peak": program.memory["peak"] / GIB},
            "limit_gib": self.chip.limit / GIB,
            "fits": self.fits,
            "flops": sum(program.flops.values()),
            "flops_by_kind": program.flops,
            "bytes": program.bytes_moved,
            "collectives": grouped(program.collectives),
            "convolution_layouts": dict(Counter(c.labels for c in program.convolutions)),
            "program": counts(program),
            "step_seconds_bound": bounds.step,
            "seconds_by_reason": {
                "arithmetic": bounds.arithmetic,
                "memory": bounds.memory,
                "transfers": bounds.transfers,
            },
            "scans_per_second_bound": self.scans_per_second,
            "scaling_efficiency": bounds.efficiency,
            "refused": program.refused,
        }


def grouped(collectives: Sequence[Collective]) -> list[JsonObject]:
    """Collectives of one kind, type and loop together.

    `bytes` are of all `count` of them, each run once, and `largest` of one; `trips` is how often
    they run, None for a loop of unknown length.
    """
    groups: dict[tuple, list[Collective]] = {}
    for one in collectives:
        groups.setdefault((one.kind, one.dtype, one.in_loop, one.trips), []).append(one)
    return [
        {
            "kind": kind,
            "dtype": dtype,
            "count": len(members),
            "bytes": sum(member.bytes for member in members),
            "largest": max(member.bytes for member in members),
            "in_loop": in_loop,
            "trips": trips,
        }
        for (kind, dtype, in_loop, trips), members in groups.items()
    ]


def counts(program: Program) -> JsonObject:
    """What of a compiled program would be slow on its chip, and what is as it should be."""
    convolutions = program.convolutions
    return {
        "convolutions": {by: sum(c.by == by for c in convolutions) for by in kernels.COMPUTED_BY},
        "channel_last": sum(c.channel_last for c in convolutions),
        "channels_multiple_of_8": sum(map(kernels.aligned, convolutions)),
        "bfloat16": sum(c.dtype == "bf16" for c in convolutions),
        "dilated": sum(c.dilated for c in convolutions),
        "colliding_scatters": program.colliding_scatters,
        "relaid": kernels.moved(program.moves, relaid=True),
        "copied": kernels.moved(program.moves, relaid=False),
        "all_reduces": sum(
            one.trips or 1 for one in program.collectives if one.kind == "all-reduce"
        ),
    }


def table(rows: Sequence[Row]) -> str:
    """One column a row, for clusters of one chip."""
    lines: list[tuple[str, list[str]]] = [
        ("devices (data x space)", [_devices(row) for row in rows]),
        ("scans in a global batch", [str(row.scans * row.devices // row.space) for row in rows]),
    ]
    for kind in KINDS:
        cells = [
            _figure(row.program.memory[kind] / GIB) if kind in row.program.memory else "-"
            for row in rows
        ]
        lines.append((f"{kind}, GiB", cells))
    lines.append(
        ("fits", [f"{'yes' if row.fits else 'NO'}, of {row.chip.limit / GIB:.1f}" for row in rows])
    )
    for kind in PRODUCTS:
        figures = [_figure(row.program.flops.get(kind, 0) / 1e12) for row in rows]
        lines.append((f"TFLOP, {kind}", figures))
    lines += [
        ("device memory moved, GiB", [_figure(row.program.bytes_moved / GIB) for row in rows]),
        ("seconds: arithmetic", [_figure(row.bound.arithmetic) for row in rows]),
        ("seconds: memory", [_figure(row.bound.memory) for row in rows]),
        ("seconds: transfers", [_figure(row.bound.transfers) for row in rows]),
        ("a step takes at least, s", [_figure(row.bound.step) for row in rows]),
        ("scans a second, at most", [f"{row.scans_per_second:.3g}" for row in rows]),
        ("scaling efficiency", [f"{row.bound.efficiency:.4f}" for row in rows]),
    ]
    lines += _kernels([counts(row.program) for row in rows])
    width = max(len(cell) for _, cells in lines for cell in cells) + 2
    text = [f"{name:28}" + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in lines]
    for row in rows:
        text.append(f"transfers on {row.devices} devices:")
        text += _transfers(row.program.collectives)
        if row.program.refused:
            text.append(f"  the compiler gave up: {row.program.refused}")
    return "\n".join(text)


def search_line(row: Row) -> str:
    """A row of the search: the largest batch of one choice of remat, or 1 if that is too much."""
    batch = f"{row.scans} a device" if row.fits else "none: 1 a device"
    return (
        f"remat={row.remat}: {batch}, {row.program.memory['peak'] / GIB:.1f} GiB of "
        f"{row.chip.limit / GIB:.1f}, at least {row.bound.step / row.scans:.3f} s a scan"
    )


def _devices(row: Row) -> str:
    return f"{row.devices} ({row.devices // row.space} x {row.space})"


def _figure(value: float) -> str:
    return f"{value:.3f}" if value >= 0.1 else f"{value:.2g}"


def _kernels(rows: Sequence[JsonObject]) -> list[tuple[str, list[str]]]:
    def moved(kind: str) -> list[str]:
        return [
            f"{row[kind]['bytes'] / 2**20:.0f} ({row[kind]['largest'] / 2**20:.1f})" for row in rows
        ]

    computed = [row["convolutions"] for row in rows]
    lines = [("convolutions", [str(sum(by.values())) for by in computed])]
    lines.append(("  left to XLA", [str(by["xla"]) for by in computed]))
    for name in ("channel_last", "channels_multiple_of_8", "bfloat16", "dilated"):
        lines.append(("  " + name.replace("_", " "), [str(row[name]) for row in rows]))
    lines.append(("colliding scatters", [str(row["colliding_scatters"]) for row in rows]))
    lines.append(("relaid, MiB (the largest)", moved("relaid")))
    lines.append(("copied, MiB (the largest)", moved("copied")))
    return lines


def _transfers(collectives: Sequence[Collective]) -> list[str]:
    lines = []
    for group in grouped(collectives):
        size, count = group["bytes"], group["count"]
        largest = f", the largest {_size(group['largest'])}" if count > 1 else ""
        loop = f", in a loop, {group['trips'] or 'unknown'} times" if group["in_loop"] else ""
        lines.append(f"  {count} {group['kind']} of {group['dtype']}: {_size(size)}{largest}{loop}")
    return lines or ["  none"]


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**17 else f"{count} bytes"


def heading(chip: Chip) -> str:
    """What is assumed of a chip, and where that was published."""
    peaks = ", ".join(f"{chip.peaks[kind] / 1e12:.4g} {kind}" for kind in PRODUCTS)
    return (
        f"{chip.title}: {chip.memory / GIB:.1f} GiB, of which JAX takes {chip.share:.0%}; "
        f"{chip.bandwidth / 1e12:.3g} TB/s; TFLOP/s: {peaks};\n"
        f"{chip.link / 1e9:.4g} GB/s to the {chip.joined} chips that are joined, "
        f"{chip.network / 1e9:.4g} GB/s beyond. Source: {chip.source}."
    )
