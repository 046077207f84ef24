"""What matters in how DeepSC-COVID learns, one change at a time: `make learns`.

    python -m deepsc_jax.models.deepsc.arms --out=runs/learns [--only=NAME,NAME] [--seeds=0,1,2]

Each arm is the segmentation stage of configs/phantom.flags with some flags changed, trained on the
same phantoms and evaluated on the same held-out ones, by the commands that real data takes. A run
is kept as OUT/NAME-SEED.json and never made twice: a stopped command goes on where it was. Prints a
table, and writes OUT/arms.json and OUT/arms.png, the curves of DSC against falsely marked volume.
Phantom results say nothing about patients.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from deepsc_jax.metrics.comparison import Difference, paired_bootstrap
from deepsc_jax.models.trials import kept, program, require_known, settings
from deepsc_jax.report.figures import save_png
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.files import own, write_json, write_own_json
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.places import output_folder
from deepsc_jax.runtime.types import JsonObject

SETTINGS = "--flagfile=configs/phantom.flags"
STAGE = "segmentation"
MOST_ML = (80, 160, 250)  # of falsely marked volume a scan without lesions, in the table


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing that is tried.

    Attributes:
      title: what it is, for the table.
      train: flags of training.
      data: flags of preprocessing, which the store is made with.
    """

    title: str
    train: tuple[str, ...] = ()
    data: tuple[str, ...] = ()


ARMS: dict[str, Arm] = {
    "default": Arm("as configs/phantom.flags has it"),
    "no_scales": Arm("S_1 to S_3 not supervised", ("--deepsc.scale_supervision=0",)),
    "no_free": Arm("no term for scans without lesions", ("--deepsc.lesion_free_weight=0",)),
    "wide": Arm("twice the channels at full resolution", ("--deepsc.lesion_channels=16,32,64",)),
    "plain": Arm(
        "the paper's optimiser, without warm-up, cosine, clipping and averages",
        ("--schedule=linear", "--warmup_steps=0", "--clip_norm=0", "--average_decay=0"),
    ),
    "no_level": Arm("lungs as dense as they come", data=("--lung_level_hu=0",)),
    "augmented": Arm(
        "turns, sizes, contrast, noise, lung masks jittered",
        (
            "--rotation_degrees=15",
            "--zoom=0.9,1.1",
            "--elastic_mm=4",
            "--contrast=0.8,1.25",
            "--noise=0.02",
            "--lung_rim_mm=4",
        ),
    ),
    "fine": Arm(
        "voxels of 5 x 4 x 4 mm",
        data=(
            "--working_spacing_mm=5,4,4",
            "--working_size=56,80",
            "--tile=56,56,80",
            "--depth_bucket=56",
        ),
    ),
}


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("out", "runs/learns", "Folder for data, runs and results.")
    flags.DEFINE_list("only", [], f"Some of {', '.join(ARMS)}; by default all.")
    flags.DEFINE_list("seeds", ["0"], "Of training, one run each.")
    flags.DEFINE_integer("steps", 600, "Of each run.", lower_bound=1)
    flags.DEFINE_string("phantoms", "150,45,60", "Phantoms for training, validation and test.")


def main() -> None:
    """Make what is not there yet, and print what there is."""
    options = flags.FLAGS
    require_known(ARMS, options.only, options.seeds)
    out = output_folder("out", options.out, "arms.json", "arms.png")
    results: dict[str, list[JsonObject]] = {}
    for seed in options.seeds:
        for name in options.only or ARMS:
            results.setdefault(name, []).append(run_arm(name, seed, out))
            rows = summarised(results)
            write_own_json({"arms": rows}, out / "arms.json")  # after each: the whole takes long
            with own(out / "arms.png") as partial:
                draw(results, partial)
    print(table(rows))
    print(f"wrote {shown(out / 'arms.json')} and {shown(out / 'arms.png')}")


def run_arm(name: str, seed: str, out: pathlib.Path) -> JsonObject:
    """The result of one run, made unless it is there.

    Raises:
      InputError: what is there was made with other settings, or a program failed.
    """
    arm, options = ARMS[name], flags.FLAGS
    training = (*arm.train, f"--deepsc.{STAGE}.steps={options.steps}", f"--seed={seed}")
    asked = settings([SETTINGS, *arm.data], training, options.phantoms)
    file = out / f"{name}-{seed}.json"
    if file.exists():
        return kept(file, asked, ("metrics", "dsc", "seconds"))
    data, begun = store(arm, out), time.monotonic()
    workdir = out / "runs" / f"{name}-{seed}"
    given = [*asked["data"], *asked["train"]]
    program("train", *given, f"--stage={STAGE}", f"--data_dir={data}", f"--workdir={workdir}")
    seconds = time.monotonic() - begun
    place = out / "evaluated" / f"{name}-{seed}"
    program("evaluate", f"--checkpoint={workdir}", f"--data_dir={data}", f"--out={place}")
    metrics, scans = (
        json.loads((place / f"{part}.json").read_text("utf-8")) for part in ("metrics", "scans")
    )
    scores = {row["case"]: row.get("dsc") for row in scans}
    result = {"settings": asked, "seconds": seconds, "metrics": metrics, "dsc": scores}
    write_json(result, file)
    return result


def store(arm: Arm, out: pathlib.Path) -> pathlib.Path:
    """The folder of the arm's store; all are made from the same phantoms."""
    phantoms = flags.FLAGS.phantoms
    first = out / f"data-{phantoms.replace(',', '-')}"
    if not (first / "store").exists():
        program("prepare", SETTINGS, f"--phantoms={phantoms}", f"--out={first}")
    if not arm.data:
        return first
    name = hashlib.sha256(" ".join(arm.data).encode()).hexdigest()[:8]
    data = out / f"{first.name}-{name}"
    if not (data / "store").exists():
        cases = f"--cases={first / 'cases.csv'}"
        program("prepare", SETTINGS, *arm.data, cases, f"--out={data}")
    return data


def best_dsc(curve: JsonObject, most_ml: float = np.inf) -> float | None:
    """The best mean DSC of a threshold that marks at most so many ml in a scan without lesions."""
    pairs = zip(curve["dsc"], curve["false_ml"], strict=True)
    return max((dsc for dsc, ml in pairs if ml <= most_ml), default=None)


def summarised(results: dict[str, list[JsonObject]]) -> list[JsonObject]:
    """A row of the table for each arm, means over its seeds."""
    first = next(iter(results.values()))
    rows = []
    for name, runs in results.items():
        lesions = [run["metrics"]["lesions"] for run in runs]
        row: JsonObject = {
            "arm": name,
            "title": ARMS[name].title,
            "seeds": len(runs),
            "minutes": _mean([run["seconds"] / 60 for run in runs]),
            "best_dsc": _mean([best_dsc(run["metrics"]["curve"]) for run in runs]),
            "dsc": _mean([figures["dsc"]["mean"] for figures in lesions]),
            "nsd": _mean([figures["nsd"]["mean"] for figures in lesions]),
        }
        for ml in MOST_ML:
            row[f"dsc_at_{ml}_ml"] = _mean([best_dsc(r["metrics"]["curve"], ml) for r in runs])
        if runs is not first and len(runs) == len(first):
            found = against(runs, first)
            row["difference"] = [found.difference, found.interval.low, found.interval.high]
        rows.append(row)
    return rows


def against(runs: Sequence[JsonObject], first: Sequence[JsonObject]) -> Difference:
    """The mean DSC less that of `first`, of means over seeds, resampled over scans together."""
    cases = [name for name, score in first[0]["dsc"].items() if score is not None]
    ours, theirs = (
        np.mean([[run["dsc"][name] for name in cases] for run in of], axis=0)
        for of in (runs, first)
    )
    return paired_bootstrap(
        lambda rows: float(ours[rows].mean()),
        lambda rows: float(theirs[rows].mean()),
        np.arange(len(cases)),
    )


def table(rows: Sequence[JsonObject]) -> str:
    """The rows as text."""
    heads = ["best", *(f"{ml} ml" for ml in MOST_ML), "DSC", "NSD", "minutes"]
    keys = ["best_dsc", *(f"dsc_at_{ml}_ml" for ml in MOST_ML), "dsc", "nsd", "minutes"]
    lines = [f"{'arm':54}{'seeds':>6}" + "".join(f"{head:>9}" for head in heads)]
    for row in rows:
        cells = [f"{row[key]:9.3f}" if row[key] is not None else f"{'-':>9}" for key in keys[:-1]]
        line = f"{row['title']:54}{row['seeds']:6}{''.join(cells)}{row['minutes']:9.1f}"
        if "difference" in row:
            line += "  DSC {:+.3f} ({:+.3f} to {:+.3f})".format(*row["difference"])
        lines.append(line)
    return "\n".join(lines)


def draw(results: dict[str, list[JsonObject]], path: pathlib.Path) -> None:
    """The curves of all arms' first runs."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in results.items():
        curve = runs[0]["metrics"]["curve"]
        axes.plot(curve["false_ml"], curve["dsc"], label=ARMS[name].title)
    axes.set(
        xlabel="ml marked in a scan without lesions",
        ylabel="mean DSC of scans with lesions",
        xlim=(0, 400),
        title="phantoms, segmentation stage, every threshold",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_png(figure, path)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, computes=False)


if __name__ == "__main__":
    run()
