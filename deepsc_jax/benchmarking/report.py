"""The rows of a benchmark, as JSON and as text."""

import statistics
from collections.abc import Sequence

from deepsc_jax.benchmarking import jobs
from deepsc_jax.benchmarking.measure import Measured
from deepsc_jax.runtime.types import JsonObject

Row = JsonObject
PERCENTILES = (50, 90, 99)  # of the seconds of a step, over all calls
MEMORY = (
    "MiB: the most a process held during its timed runs, of the device where it tells, else of\n"
    "the host beyond what it held after its imports, without the pages of libraries."
)
ENERGY = "joules: of all processors and GPUs that tell, those of others and idle ones included."


def rows(measured: Sequence[Measured], repeats: int) -> list[Row]:
    """A row for every pair of ours (the first) and a peer, and one for the best of a side's.

    A row of ours alone where there is no peer.
    """
    ours, *peers = measured
    own = _ours(ours, repeats)
    if not peers:
        return [own | _peer(None, own)]
    table = [own | _peer(peer, own) for peer in peers]
    for side in dict.fromkeys(peer.job.side for peer in peers):
        variants = [row for row in table if row["peer"].split()[0] == side]
        if len(variants) > 1:
            best = min(variants, key=lambda row: row["peer_s"])
            name = best["peer"].removeprefix(f"{side} ")
            table.append(best | {"peer": f"{side}, the best of {len(variants)}", "best": name})
    return table


def _ours(ours: Measured, repeats: int) -> Row:
    depths = ours.end["depths"] or [ours.job.scan_size[0]]
    steps = [jobs.counts(jobs.of_depth(ours.job, depth)) for depth in depths]
    scans, tiles = (statistics.fmean(n) for n in zip(*steps, strict=True))
    seconds, flops = ours.times.median, sum(ours.end["flops"].values())
    return {
        "work": ours.job.title,
        "ours_s": seconds,
        "ours_min_s": ours.times.low,
        "ours_max_s": ours.times.high,
        "ours_turns_s": list(ours.times.turns),
        **{f"ours_p{percent}_s": ours.times.percentile(percent) for percent in PERCENTILES},
        "ours_calls": len(ours.times.calls),
        "ours_peak_mib": ours.peak_mib,
        "ours_idle_mib": ours.end["idle_bytes"] / 2**20,
        "ours_host_peak_mib": ours.end["peak_bytes"] / 2**20,
        "ours_settings": ours.end["settings"],
        "compile_s": ours.compile_s,
        "scans_per_s": scans / seconds,
        "tiles_per_s": tiles / seconds,
        "flops": flops,
        "tflops_per_s": flops / seconds / 1e12,
        "share_of_peak": _share_of_peak(ours),
        "peak_from": ours.end["rates_from"],
        "energy_j": ours.joules,
        "repeats": repeats,
        "devices": _devices(ours),
    }


def _share_of_peak(ours: Measured) -> float | None:
    """The least time that the chips' peaks allow, over the time it took; None if none is known."""
    rates, flops = ours.end["rates"], ours.end["flops"]
    if not rates or not flops:
        return None
    # A CPU's rate is that of all its cores, however many devices they were made into.
    chips = 1 if ours.environment["platform"] == "cpu" else _devices(ours)
    return sum(n / rates[kind] for kind, n in flops.items()) / chips / ours.times.median


def _devices(ours: Measured) -> int:
    """Devices that the work uses; inference and loading take one."""
    if ours.job.work in ("inference", "loading", "surface"):
        return 1
    platform = ours.job.config.platform
    return platform.data_devices * platform.space or ours.environment["devices"]


def _peer(peer: Measured | None, own: Row) -> Row:
    if peer is None:
        names = ("peer", "peer_s", "peer_min_s", "peer_max_s", "peer_turns_s")
        ratios = ("ratio", "ratio_min", "ratio_max", "memory_ratio")
        known = ("peer_peak_mib", "peer_idle_mib", "peer_compile_s", "peer_flops", "peer_energy_j")
        return dict.fromkeys((*names, *ratios, *known, "peer_settings"))
    rounds = [a / b for a, b in zip(own["ours_turns_s"], peer.times.turns, strict=True)]
    return {
        "peer": peer.job.name,
        "peer_s": peer.times.median,
        "peer_min_s": peer.times.low,
        "peer_max_s": peer.times.high,
        "peer_turns_s": list(peer.times.turns),
        "ratio": own["ours_s"] / peer.times.median,
        "ratio_min": min(rounds),
        "ratio_max": max(rounds),
        "peer_peak_mib": peer.peak_mib,
        "peer_idle_mib": peer.end["idle_bytes"] / 2**20,
        "peer_settings": peer.end["settings"],
        "memory_ratio": own["ours_peak_mib"] / peer.peak_mib,
        "peer_compile_s": peer.compile_s,
        # The reference is the same network (what it resamples at greater cost is not counted);
        # another network is counted.
        "peer_flops": sum(peer.end["flops"].values()) or own["flops"],
        "peer_energy_j": peer.joules,
    }


def table(rows: Sequence[Row]) -> str:
    """The pairs as text, and below them what ours alone does."""
    lines = [
        f"{'work':22}{'peer':26}{'ours s':>9}{'(min - max)':>18}{'peer s':>9}{'(min - max)':>18}"
        f"{'ratio':>7}{'(each round)':>15}{'ours MiB':>10}{'peer MiB':>10}"
    ]
    for row in rows:
        ours = f"{row['ours_s']:9.4g}{_span(row, 'ours'):>18}"
        peer = f"{'-':>9}{'':18}{'-':>7}{'':15}"
        if row["peer"]:
            peer = f"{row['peer_s']:9.4g}{_span(row, 'peer'):>18}{row['ratio']:7.2f}"
            peer += f"{'({ratio_min:.2f} - {ratio_max:.2f})'.format(**row):>15}"
        memory = f"{row['ours_peak_mib']:10.0f}{_or_dash(row['peer_peak_mib'], '.0f'):>10}"
        lines.append(f"{row['work']:22}{row['peer'] or '-':26}{ours}{peer}{memory}")
    lines += [
        MEMORY,
        "",
        f"{'ours':22}{'compile s':>10}{'scans/s':>9}{'tiles/s':>9}{'GFLOP':>9}{'GFLOP/s':>9}"
        f"{'of peak':>9}{'joules':>8}{'p50 s':>9}{'p90 s':>9}{'p99 s':>9}  {'peer GFLOP':>20}",
    ]
    for row in {row["work"]: row for row in rows}.values():
        beside = [r for r in rows if r["work"] == row["work"] and r["peer"]]
        others = {r["peer"].split()[0].strip(","): r["peer_flops"] for r in beside}
        peers = ", ".join(f"{name} {n / 1e9:.1f}" for name, n in others.items())
        lines.append(
            f"{row['work']:22}{row['compile_s']:10.1f}{row['scans_per_s']:9.3g}"
            f"{row['tiles_per_s']:9.3g}{row['flops'] / 1e9:9.1f}{row['tflops_per_s'] * 1e3:9.1f}"
            f"{_or_dash(row['share_of_peak'], '.0%'):>9}{_or_dash(row['energy_j'], '.0f'):>8}"
            + "".join(f"{row[f'ours_p{percent}_s']:9.4g}" for percent in PERCENTILES)
            + f"  {peers or '-':>20}"
        )
    sources = {row["peak_from"] for row in rows if row["flops"]}
    energy = [ENERGY] if any(row["energy_j"] is not None for row in rows) else []
    return "\n".join([*lines, *(f"of peak: {source}" for source in sorted(sources)), *energy])


def _span(row: Row, side: str) -> str:
    return f"({row[f'{side}_min_s']:.3g} - {row[f'{side}_max_s']:.3g})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
