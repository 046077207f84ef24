"""What training needs of a cluster, found without it.

    deepsc plan --flagfile=configs/deepsc.flags --platform=h100 --devices=8,64,512

compiles the joint train step for 8, 64 and 512 H100 on this machine, whose own devices it leaves
alone, and prints for each device: memory, arithmetic, transfers, and the least time of a step. GPUs
need the extra `plan` (XLA's CUDA compiler), TPUs the extra `tpu` (libtpu).
"""

from deepsc_jax.runtime import entry

if __name__ == "__main__":
    entry.import_jax()  # before the imports below, which need it

import dataclasses
import functools
import sys
import time

import jax
from absl import flags

from deepsc_jax.config import Config
from deepsc_jax.models import registry
from deepsc_jax.planning import report, search, targets
from deepsc_jax.planning.compiled import compile_step
from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_own_json
from deepsc_jax.runtime.places import output_file
from deepsc_jax.systems.building import stages_of

CONFIG = registry.config_flags()


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    flags.DEFINE_enum("platform", "h100", list(targets.CHIPS), "Chip of the cluster.")
    flags.DEFINE_list("devices", ["1"], "Numbers of chips, one plan for each.")
    flags.DEFINE_string("stage", None, "Stage to plan, by name; default: the last one.")
    flags.DEFINE_integer("depth", 304, "Slices of the deepest scan.", lower_bound=1)
    flags.DEFINE_integer(
        "scans_per_device",
        1,
        "Scans of a batch for each device of the data axis: with --space=8, for eight devices.",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "search", False, "Also find the largest batch that fits, under every choice of remat."
    )
    flags.DEFINE_float(
        "memory_share",
        None,
        "Share of a chip's memory that JAX may take: what XLA_PYTHON_CLIENT_MEM_FRACTION will be "
        "on GPUs. By default JAX's own, 0.75 there and all on TPUs.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_string("json", None, "File for the plans, as rows.")


def main() -> None:
    """Plan every cluster that the flags name."""
    jax.config.update("jax_platforms", "cpu")  # before its first device: none of ours is used
    # What is compiled for machines that are not here cannot be read back here.
    jax.config.update("jax_enable_compilation_cache", False)
    target = output_file("json", flags.FLAGS.json)
    config = CONFIG.config()
    stage = stages_of(config, flags.FLAGS.stage or "all")[-1].name
    sizes = _sizes(config)
    rows = [_plan(config, stage, size, flags.FLAGS.scans_per_device) for size in sizes]
    depth, tile = config.data.bucket(flags.FLAGS.depth), "x".join(map(str, config.data.tile))
    print(
        f"{stage} stage, {flags.FLAGS.depth} slices padded to {depth}, tiles of {tile}; per device:"
    )
    print(report.table(rows))
    document = {"rows": [row.document() for row in rows]}
    if flags.FLAGS.search:
        searched = _search(config, stage, sizes[0])
        document["search"] = [row.document() for row in searched]
    print(f"\n{report.UNKNOWN}\n{report.heading(_chip())}")
    if target is not None:
        write_own_json(document, target)
        print(f"wrote {target}")


def _chip() -> targets.Chip:
    chip = targets.CHIPS[flags.FLAGS.platform]
    share = chip.share if flags.FLAGS.memory_share is None else flags.FLAGS.memory_share
    return dataclasses.replace(chip, share=share)


def _sizes(config: Config) -> list[int]:
    space = config.platform.space
    if config.platform.data_devices:
        raise InputError(
            f"--data_devices={config.platform.data_devices}: the data axis is --devices over "
            "--space here: leave --data_devices out"
        )
    sizes = []
    for text in flags.FLAGS.devices:
        if not text.isdigit() or not int(text) or int(text) % space:
            raise InputError(
                f"--devices={text}: give whole numbers above 0, multiples of --space={space}, "
                "with commas between them"
            )
        sizes.append(int(text))
    return sizes


@functools.cache  # a search begins with batches of one scan, which may be planned already
def _plan(config: Config, stage: str, size: int, scans: int) -> report.Row:
    space, remat = config.platform.space, config.platform.remat
    mesh = device_mesh.make_mesh(config.platform, targets.devices(flags.FLAGS.platform, size))
    _tell(f"compiling for {size} {flags.FLAGS.platform}, {scans} scans a device, remat={remat} ...")
    begun = time.monotonic()
    compiled = compile_step(config, stage, mesh, scans * size // space, flags.FLAGS.depth)
    _tell(f"... took {time.monotonic() - begun:.0f} s")
    return report.Row(flags.FLAGS.platform, _chip(), size, space, scans, remat, compiled)


def _search(config: Config, stage: str, size: int) -> list[report.Row]:
    """The largest batch under every choice of remat, the fewest FLOPs first."""
    print(f"\nlargest batch that fits, for {size} devices, the fewest FLOPs first:")

    def flops(choice: Config) -> int:
        return sum(_plan(choice, stage, size, 1).program.flops.values())

    rows = []
    for choice in sorted(search.remat_choices(config), key=flops):

        def peak(scans: int, choice: Config = choice) -> int:
            return _plan(choice, stage, size, scans).program.memory["peak"]

        best = search.largest_batch(peak, _chip().limit)
        rows.append(_plan(choice, stage, size, best or 1))
        print("  " + report.search_line(rows[-1]))
    chosen = next((row for row in rows if row.fits), None)
    print(f"  cheapest that fits: {f'--remat={chosen.remat}' if chosen else 'none'}")
    return rows


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, CONFIG.parse)


if __name__ == "__main__":
    run()
