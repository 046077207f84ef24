"""Throughput, measured side by side with PyTorch and MONAI.

    deepsc benchmark --flagfile=configs/phantom.flags --work=train_joint --peer=torch

Every work and every peer runs in a process of its own. Each is built and warmed up, compilation
apart (in a process before it, whose programs it reads), and then they take turns, `--repeats` of a
timed, synchronised run, after an untimed one unless it is long; the table gives medians, and the
ratio of ours to each peer, below 1 where ours is faster. Peers start from the same weights and
inputs, and the first results must agree. All have the allocator settings of `train`
(`entry.ALLOCATOR`), with which PyTorch is faster too, but for our inference: `predict` has none.
On a GPU they share its memory, so XLA takes none ahead.

`--peer=torch` is PyTorch (extra `torch`, in a checkout) in all ways of `benchmarking/torch_ways.py`
or some of them (`--variants`): the network of `tests/peers`, which computes what the reference does
and was written to be fast, or the reference where there is none. `--screen=2` times each way once
and gives turns to the best two. `--peer=monai` is MONAI's 3D U-Net with as many FLOPs as ours,
trained by its own loss, and its sliding-window inference (extra `monai`);
`--peer=forms` ours with each form of its convolutions (`models/layers/convolution.py`);
`--peer=surface_distance`, of `--work=surface`, DeepMind's measures of masks (extra
`surface_distance`).
Loading and the loop read `--data_dir`, or phantoms made for the occasion; what they read is in the
cache of decoded chunks then.

`--work=unet3d` is the 3D U-Net that MLPerf Training had, as configs/mlperf_unet3d.flags has it: a
step on synthetic data and, apart, the loop with its loader. `--peer=dynunet` is MONAI's of the same
shape. It is unverified, the benchmark is retired, and the figures are not comparable as an MLPerf
result. A smaller one: --tile=64,64,64 --working_size=64,64 --depth_bucket=64
--working_spacing_mm=5,5,5.

Instead of a table of works: `--devices=1,2,4,8`, weak and strong scaling of the train steps;
`--growth=voxels,channels,scans,devices --out=DIR`, how a train step's time grows, as growth.json
and growth.png with the exponents; `--first_prediction=SCAN --checkpoint=RUN`, what a first
prediction spends its seconds on, with an empty and with a filled compilation cache. `make
benchmark` runs the comparisons of `benchmarking/bars.py`.
"""

from deepsc_jax.runtime import entry

if __name__ == "__main__":
    entry.import_jax()  # before the imports below, which need it

import dataclasses
import importlib.util
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import TypeVar

from absl import flags

from deepsc_jax.benchmarking import cold_start, growth, jobs, mlperf, report, scaling
from deepsc_jax.benchmarking.environment import environment
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.measure import Measured, measure
from deepsc_jax.config import Config
from deepsc_jax.models import registry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, own, write_own_json
from deepsc_jax.runtime.places import output_file, output_folder
from deepsc_jax.runtime.types import JsonObject
from deepsc_jax.systems.building import stages_of
from deepsc_jax.systems.system import Stage

Name = TypeVar("Name", bound=str)

CONFIG = registry.config_flags()


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    flags.DEFINE_list(
        "work",
        ["train"],
        f"What to time: of {', '.join(jobs.WORKS)}; train_STAGE is a train step of that stage; "
        f"{mlperf.WORK}, alone, is MLPerf's 3D U-Net.",
    )
    flags.DEFINE_list("peer", [], f"Whom to time beside it: of {', '.join(jobs.PEERS)}.")
    flags.DEFINE_list(
        "variants",
        None,
        "Some of a peer's, by default all: "
        + "; ".join(f"{side}: {', '.join(names)}" for side, names in jobs.VARIANTS.items()),
    )
    flags.DEFINE_integer("repeats", 5, "Timed turns of each, at least 5.", lower_bound=5)
    flags.DEFINE_integer(
        "screen",
        0,
        "Time each variant once, alone, and give turns to so many of the fastest of each peer; 0: "
        "to all.",
        lower_bound=0,
    )
    flags.DEFINE_list(
        "scan_size",
        None,
        "Depth, height and width of a scan, of inference and of batches of whole scans; also sets "
        "working_size. By default one depth bucket of the working grid.",
    )
    flags.DEFINE_string("stage", None, "Of the works that do not name one; default: the last one.")
    flags.DEFINE_string(
        "data_dir", None, "Folder that `prepare` wrote, for loading and loop; by default phantoms."
    )
    flags.DEFINE_list("devices", [], "Numbers of devices, for scaling tables and growth.")
    flags.DEFINE_list("growth", [], f"Some of {', '.join(scaling.QUANTITIES)}.")
    flags.DEFINE_string("out", None, "Folder for growth.json and growth.png.")
    flags.DEFINE_string("first_prediction", None, "A scan to predict from nothing.")
    flags.DEFINE_string("checkpoint", None, "A training run's --workdir, for that.")
    flags.DEFINE_string("mlperf_log", None, "Of unet3d: file for events of mlperf-logging.")
    flags.DEFINE_string("json", None, "File for the rows, with the environment.")


def main() -> None:
    """Measure what the flags name."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # folders are removed
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output_file("json", flags.FLAGS.json)
    if flags.FLAGS.mlperf_log:
        if flags.FLAGS.work != [mlperf.WORK]:
            raise InputError(f"--mlperf_log: it is of --work={mlperf.WORK}")
        output_file("mlperf_log", flags.FLAGS.mlperf_log)
        mlperf.require_logging()
    document: JsonObject = {"environment": environment()}
    if flags.FLAGS.first_prediction:
        if (
            not flags.FLAGS.checkpoint
            or flags.FLAGS.peer
            or flags.FLAGS.growth
            or flags.FLAGS.devices
        ):
            raise InputError(
                "--first_prediction: give --checkpoint, a training run's --workdir, and no --peer, "
                "--growth or --devices"
            )
        document["first_prediction"] = cold_start.measure(
            flags.FLAGS.first_prediction, flags.FLAGS.checkpoint
        )
        print(cold_start.table(document["first_prediction"]))
    else:
        config, size = _config_and_size()
        works = _works(config)
        sides = [_known(name, tuple(jobs.PEERS), "peer") for name in flags.FLAGS.peer]
        if not works:
            raise InputError(f"--work=: give some of {','.join(jobs.WORKS)}")
        if sides and flags.FLAGS.devices and not flags.FLAGS.growth:
            raise InputError("--devices: scaling tables are of ours alone: leave out --peer")
        _require_peers(sides, [work for work, _ in works])
        _require_variants(sides)
        with tempfile.TemporaryDirectory() as folder:
            made = [
                Job(
                    work,
                    config,
                    size,
                    stage.name,
                    stage.reads,
                    "ours",
                    "",
                    _folder(folder, str(number)),
                )
                for number, (work, stage) in enumerate(works)
            ]
            if flags.FLAGS.growth:
                _growth(made, sides, document)
            elif flags.FLAGS.devices:
                _scaling(made, document)
            else:
                _compare(made, sides, document)
    if flags.FLAGS.json:
        _save(document)
        print(f"wrote {flags.FLAGS.json}")


def _save(document: JsonObject) -> None:
    """Write what is known so far: the next may take long, and fail."""
    if flags.FLAGS.json:
        write_own_json(document, local_path("json", flags.FLAGS.json))


def _compare(made: list[Job], sides: list[str], document: JsonObject) -> None:
    """The table of works, and of peers beside them."""
    document["rows"] = []
    data_dir = _data_dir(made)
    for job in made:
        measured = _measure_beside(dataclasses.replace(job, data_dir=data_dir), sides, document)
        rows = report.rows(measured, flags.FLAGS.repeats)
        if flags.FLAGS.work == [mlperf.WORK]:
            rows = [row | mlperf.sample_rates(row) for row in rows]
        document["rows"] += rows
        _save(document)
    print("  ".join(f"{name}: {value}" for name, value in document["environment"].items()))
    print(report.table(document["rows"]))
    if flags.FLAGS.work == [mlperf.WORK]:
        print(mlperf.table(document["rows"]))
        if flags.FLAGS.mlperf_log:
            path = local_path("mlperf_log", flags.FLAGS.mlperf_log)
            mlperf.write_log(path, made[0].config, made[0].stage, document["rows"])


def _scaling(made: list[Job], document: JsonObject) -> None:
    counts, trains = _devices(), _train_steps(made, "devices")
    document["scaling"] = []
    for job in trains:
        document["scaling"] += growth.scaling_rows(job, counts, flags.FLAGS.repeats, _tell)
        _save(document)
    print(scaling.scaling_table(document["scaling"]))


def _growth(made: list[Job], sides: list[str], document: JsonObject) -> None:
    quantities = [_known(name, scaling.QUANTITIES, "growth") for name in flags.FLAGS.growth]
    job, *others = _train_steps(made, "growth")
    if not flags.FLAGS.out or others:
        raise InputError("--growth: give --out, a folder for it, and one --work")
    if set(sides) - {"torch"}:
        raise InputError("--growth: --peer=torch is the one that is drawn beside ours")
    out = output_folder("out", flags.FLAGS.out, "growth.json", "growth.png")
    counts = _devices() or list(scaling.DOUBLINGS)

    def beside(point: Job, peers: bool) -> list[Measured]:
        return _measure_beside(point, sides if peers else [], document)

    drawn: list[growth.Curve] = []
    document |= {"work": job.title, "repeats": flags.FLAGS.repeats, "growth": drawn}
    for curves in growth.curves(job, quantities, counts, beside):
        drawn += curves
        with own(out / "growth.png") as partial:
            growth.draw(drawn, job.title, partial)
        write_own_json(document, out / "growth.json")
    for curve in drawn:
        pairs = zip(curve["sizes"], curve["seconds"], strict=True)
        measured = "  ".join(f"{size}: {seconds:.3g} s" for size, seconds in pairs)
        print(
            f"{curve['quantity']:9}{curve['side']:6}exponent {curve['exponent']:5.2f}  {measured}"
        )
    print(f"wrote {out / 'growth.json'} and {out / 'growth.png'}")


def _devices() -> list[int]:
    for text in flags.FLAGS.devices:
        if not text.isdigit() or not int(text):
            raise InputError(f"--devices={text}: give whole numbers with commas between them")
    return [int(text) for text in flags.FLAGS.devices]


def _train_steps(made: list[Job], flag: str) -> list[Job]:
    for job in made:
        if job.work != "train":
            raise InputError(f"--work={job.work}: --{flag} is of train steps: give train")
    return made


def _folder(parent: str, name: str) -> pathlib.Path:
    folder = pathlib.Path(parent, name)
    folder.mkdir()
    return folder


def _measure_beside(job: Job, sides: list[str], document: JsonObject) -> list[Measured]:
    """Ours and the variants of its peers; the document is told where, and what is left out."""
    beside = [
        dataclasses.replace(job, side=side, variant=variant)
        for side in sides
        if job.work in jobs.PEERS[side]
        for variant in jobs.variants(job, side, flags.FLAGS.variants)
    ]
    _tell(f"{job.title}: ours" + "".join(f", {other.name}" for other in beside))
    table = measure([job, *beside], flags.FLAGS.repeats, _tell, flags.FLAGS.screen)
    document.setdefault("screened", []).extend(table.screened)
    for name, reason in table.left_out.items():
        _tell(f"{job.title}: {name} is left out: {reason}")
        left = {"work": job.title, "peer": name, "reason": reason}
        document.setdefault("left_out", []).append(left)
    for one in table.measured:
        document["environment"] |= one.environment
    return table.measured


def _config_and_size() -> tuple[Config, jobs.Ints3]:
    config = CONFIG.config()
    if flags.FLAGS.scan_size is None:
        return config, (config.data.depth_bucket, *config.data.working_size)
    text = ",".join(flags.FLAGS.scan_size)
    try:
        depth, height, width = map(int, flags.FLAGS.scan_size)
        if depth < 1:
            raise ValueError("a scan has at least 1 slice")
        data = dataclasses.replace(config.data, working_size=(height, width))
    except ValueError as error:
        raise InputError(
            f"--scan_size={text}: {error}: give depth,height,width, such as 128,256,256"
        ) from error
    return dataclasses.replace(config, data=data), (depth, height, width)


def _works(config: Config) -> list[tuple[jobs.Work, Stage]]:
    """What to time, and of which stage."""
    stages = {stage.name: stage for stage in stages_of(config)}
    chosen = stages_of(config, flags.FLAGS.stage or "all")[-1]
    known = (*jobs.WORKS, *(f"train_{name}" for name in stages))
    works: list[tuple[jobs.Work, Stage]] = []
    asked = flags.FLAGS.work
    for text in mlperf.WORKS if asked == [mlperf.WORK] else asked:
        of_stage = stages.get(_known(text, known, "work").removeprefix("train_"))
        works.append(
            ("train", of_stage) if of_stage else (_known(text, jobs.WORKS, "work"), chosen)
        )
    return works


def _known(name: str, names: Sequence[Name], flag: str) -> Name:
    if name not in names:
        raise InputError(f"--{flag}={name}: expected some of {','.join(names)}")
    return names[names.index(name)]


def _require_peers(sides: list[str], works: list[jobs.Work]) -> None:
    for side in sides:
        package = jobs.PACKAGES.get(side, side)
        if side != "forms" and importlib.util.find_spec(package) is None:
            raise InputError(
                f"--peer={side}: {package} was not found: pip install 'deepsc_jax[{package}]'"
            )
        if not set(works) & set(jobs.PEERS[side]):
            raise InputError(
                f"--peer={side}: it has none of --work={','.join(works)}: give some of "
                f"{','.join(jobs.PEERS[side])}"
            )


def _require_variants(sides: list[str]) -> None:
    if flags.FLAGS.variants is None:
        return
    if not sides:
        raise InputError("--variants: they are a peer's: give --peer")
    given: list[str] = flags.FLAGS.variants
    for side in sides:
        known = jobs.VARIANTS[side]
        if not given or not set(given) <= set(known) or len(set(given)) < len(given):
            raise InputError(
                f"--variants={','.join(given)}: give some of {','.join(known)}, those of "
                f"--peer={side}, each once"
            )


def _data_dir(made: list[Job]) -> pathlib.Path | None:
    """Where the works that read a store find it: in phantoms of ours, if none is given."""
    if not {job.work for job in made} & set(jobs.STORED):
        return None
    if flags.FLAGS.data_dir:
        return local_path("data_dir", flags.FLAGS.data_dir)
    _tell("making 9 phantoms ...")
    out = made[0].folder / "phantoms"
    command = [sys.executable, "-m", "deepsc_jax.prepare", "--phantoms=9,0,0", f"--out={out}"]
    command += CONFIG.flags(made[0].config)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"no phantoms could be made: {done.stderr.strip().splitlines()[-1]}")
    return out


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, lambda argv: CONFIG.parse(mlperf.expanded(argv)), trains=True)


if __name__ == "__main__":
    run()
