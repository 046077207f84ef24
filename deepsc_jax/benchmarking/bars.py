"""The comparisons that this project sets itself, one after another: `make benchmark`.

    python -m deepsc_jax.benchmarking.bars --json=FILE [--only=NAME,NAME] [--conv_form=direct]

Each is one command of `python -m deepsc_jax.benchmark`, printed before it runs. Where
time counts, every variant of a peer is timed once, and the best two take turns with ours.
"""

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

from absl import flags

from deepsc_jax.benchmarking.jobs import VARIANTS
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, write_own_json
from deepsc_jax.runtime.places import output_file
from deepsc_jax.runtime.types import JsonObject

TILE = ("--tile=64,96,96", "--working_size=96,96", "--depth_bucket=64", "--tiles_per_scan=1")
CHANNELS = {
    16: ("--deepsc.inception_channels=16", "--deepsc.lesion_channels=16,32,64"),
    32: ("--deepsc.inception_channels=32", "--deepsc.lesion_channels=32,64,128"),
}
SEGMENTATION = ("--work=train_segmentation", "--peer=torch", "--deepsc.segmentation.batch=1", *TILE)

# The least memory is not the least time: those that may take it, all of them.
MEMORY = ("--remat=blocks", "--variants=eager,channels_last,compiled,checkpointed")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A comparison and what is expected of it.

    Attributes:
      flags: of `deepsc_jax.benchmark`.
      quantity: the ratio of a row that counts: `ratio` of times, or `memory_ratio`.
      bar: what it must not exceed, against the peer's best variant.
      aim: what it should be.
    """

    flags: tuple[str, ...]
    quantity: str
    bar: float
    aim: float


BARS: dict[str, Bar] = {
    "joint": Bar(
        ("--flagfile=configs/phantom.flags", "--work=train_joint", "--peer=torch"),
        "ratio",
        1.0,
        0.8,
    ),
    "segmentation_16": Bar((*SEGMENTATION, *CHANNELS[16]), "ratio", 1.25, 0.8),
    "segmentation_32": Bar((*SEGMENTATION, *CHANNELS[32]), "ratio", 1.25, 0.8),
    "inference": Bar(
        (
            "--work=inference",
            "--peer=torch",
            "--scan_size=128,256,256",
            "--tile=64,64,64",
            "--depth_bucket=64",
            *CHANNELS[16],
        ),
        "ratio",
        1.0,
        0.8,
    ),
    "memory_16": Bar((*SEGMENTATION, *CHANNELS[16], *MEMORY), "memory_ratio", 0.8, 0.7),
    "memory_32": Bar((*SEGMENTATION, *CHANNELS[32], *MEMORY), "memory_ratio", 0.8, 0.7),
    "surface": Bar(
        ("--work=surface", "--peer=surface_distance", "--scan_size=150,512,512"),
        "ratio",
        0.2,
        0.1,
    ),
    "monai": Bar(
        ("--flagfile=configs/phantom.flags", "--work=train_segmentation", "--peer=monai"),
        "ratio",
        1.5,
        1.0,
    ),
    "unet3d": Bar(
        (
            "--flagfile=configs/mlperf_unet3d.flags",
            "--work=train_segmentation",
            "--peer=torch,dynunet",
            *("--tile=64,64,64", "--working_size=64,64", "--depth_bucket=64"),
            *("--working_spacing_mm=5,5,5", "--unet3d.segmentation.batch=1"),
        ),
        "ratio",
        1.2,
        1.0,
    ),
}


def judge(bar: Bar, rows: list[JsonObject]) -> JsonObject:
    """The ratio that counts, against the variant that is best in it, beside bar and aim."""
    peers = [row for row in rows if row["peer"] and ", the best of" not in row["peer"]]
    best = max(peers, key=lambda row: row[bar.quantity])
    ratio = best[bar.quantity]
    names = {"quantity": bar.quantity, "against": best["peer"]}
    return names | {"found": ratio, "bar": bar.bar, "aim": bar.aim, "reached": ratio <= bar.bar}


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("json", "runs/benchmark.json", "File for all rows.")
    flags.DEFINE_list("only", [], f"Some of {', '.join(BARS)}; by default all.")
    flags.DEFINE_enum("conv_form", "auto", ["auto", *VARIANTS["forms"]], "Of our convolutions.")
    flags.DEFINE_integer(
        "screen",
        2,
        "As benchmark's: how many of a peer's variants take turns; 0: all.",
        lower_bound=0,
    )
    flags.DEFINE_integer("repeats", 5, "Timed turns of each, at least 5.", lower_bound=5)


def main() -> int:
    """Run the comparisons; 1 if one of them could not be made."""
    options = flags.FLAGS
    unknown = [name for name in options.only if name not in BARS]
    if unknown:
        raise InputError(f"--only={unknown[0]}: expected some of {','.join(BARS)}")
    chosen = {name: BARS[name] for name in options.only or BARS}
    document: JsonObject = {"environment": {}, "rows": [], "bars": {}}
    document |= {"left_out": [], "screened": []}
    path = local_path("json", options.json)
    output_file("json", options.json)
    failed = []
    for name, bar in chosen.items():
        rows = _run(bar, document)
        if rows is None:
            failed.append(name)
            continue
        document["rows"] += [{"bar": name, **row} for row in rows]
        document["bars"][name] = judge(bar, rows)
        write_own_json(document, path)  # after each: the whole takes long
    print(f"\n{'bar':26}{'quantity':14}{'against':22}{'found':>7}{'bar':>6}{'aim':>6}")
    for name, row in document["bars"].items():
        missed = "" if row["reached"] else "  not reached"
        print(
            f"{name:26}{row['quantity']:14}{row['against']:22}{row['found']:7.3f}{row['bar']:6.2f}"
            f"{row['aim']:6.2f}{missed}"
        )
    print(f"wrote {path}")
    return 1 if failed else 0


def _run(bar: Bar, document: JsonObject) -> list[JsonObject] | None:
    """The rows of one comparison, its environment added to the document; None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "rows.json"
        options = flags.FLAGS
        given = [*bar.flags, f"--repeats={options.repeats}", f"--conv_form={options.conv_form}"]
        if bar.quantity == "ratio":
            given.append(f"--screen={options.screen}")
        print(f"\npython -m deepsc_jax.benchmark {shlex.join(given)}", flush=True)
        command = [sys.executable, "-m", "deepsc_jax.benchmark", *given, f"--json={file}"]
        if subprocess.run(command, check=False).returncode:
            return None
        compared = json.loads(file.read_text())
    for name in ("left_out", "screened"):
        document[name] += [{"flags": given, **row} for row in compared.get(name, [])]
    document["environment"] |= {k: v for k, v in compared["environment"].items() if k != "flags"}
    return [{"flags": given, **row} for row in compared["rows"]]


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
