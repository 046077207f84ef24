"""What two papers claim of their networks, as experiments on phantoms: `make claims`.

    python -m deepsc_jax.models.claims --out=runs/claims [--only=NAME,NAME] [--seeds=0,1,2]

Liang et al. 2021: a gate against none, and a student against its teachers and against the same
network without them. Zhang, Ren and Wei 2021: quick connections and hypercolumns, each on and off.
Each arm is trained on the same phantoms and evaluated on the same held-out ones as what it is
compared with, by the commands that real data takes. A run is kept as OUT/NAME-SEED.json and never
made twice: a stopped command goes on where it was. Signs come out as they do. Phantom results say
nothing about patients.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from deepsc_jax.config import CLASSES
from deepsc_jax.data.datasets import read_cases
from deepsc_jax.metrics.comparison import Difference, paired_bootstrap
from deepsc_jax.metrics.statistics import roc_area
from deepsc_jax.models.trials import kept, program, require_known, settings
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.files import write_json, write_own_json
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.places import output_folder
from deepsc_jax.runtime.types import JsonObject

POSITIVE = "covid-19"
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Task:
    """What several arms are trained for.

    Attributes:
      data: flags of preprocessing and of the network, which all arms have.
      figure: `auc` of COVID-19, or `dsc` of lesions.
    """

    data: tuple[str, ...]
    figure: str


@dataclasses.dataclass(frozen=True)
class Arm:
    """One network.

    Attributes:
      title: what it is, for the table.
      task: by name.
      against: the arm that it is compared with; empty for none.
      train: flags of training.
      teachers: how many it has, and of how many folds.
      seeds: at most so many of them.
    """

    title: str
    task: str
    against: str = ""
    train: tuple[str, ...] = ()
    teachers: tuple[int, int] = (0, 0)
    seeds: int | None = None


TASKS = {
    # COVID-19 against CAP at physical contrast, 64x64 pixels, a quarter of the channels.
    "xray": Task(
        (
            "--flagfile=configs/cnncf_phantom.flags",
            "--working_size=64,64",
            "--tile=1,64,64",
            f"--classes={POSITIVE},cap",
            "--lesion_free=",
        ),
        "auc",
    ),
    "ct": Task(("--flagfile=configs/qchc_unet_phantom.flags",), "dsc"),
}
# An open gate from the first step with a positive on, whose classifier is not trained.
OPEN = (
    "--cnncf.gate_window=1",
    "--cnncf.gate_count=1",
    "--cnncf.gate_sensitivity=0",
    "--cnncf.gate_weight=0",
)
QUICK = ("shortcut", "cascade", "projection")
OFF = {name: f"--qchc_unet.{name}=false" for name in (*QUICK, "hypercolumns")}
ARMS = {
    "student": Arm("CNNCF, hard labels alone", "xray"),
    "taught": Arm("the same, taught by four teachers", "xray", "student", teachers=(4, 5), seeds=1),
    "no_gate": Arm("the same without a gate", "xray", "student", OPEN),
    "qchc": Arm("QC-HC U-Net", "ct"),
    "no_quick": Arm("without quick connections", "ct", "qchc", tuple(OFF[n] for n in QUICK)),
    "no_hypercolumns": Arm("without hypercolumns", "ct", "qchc", (OFF["hypercolumns"],)),
    "plain": Arm("without both, a plain 3D U-Net", "ct", "qchc", tuple(OFF.values())),
}


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("out", "runs/claims", "Folder for data, runs and results.")
    flags.DEFINE_list("only", [], f"Some of {', '.join(ARMS)}; by default all.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Of training, one run each; distillation has one.")
    flags.DEFINE_string("phantoms", "300,60,120", "Phantoms for training, validation and test.")
    flags.DEFINE_list("more", [], "Further flags of train, such as fewer steps; of all runs.")


def main() -> None:
    """Make what is not there yet, and print what there is."""
    options = flags.FLAGS
    require_known(ARMS, options.only, options.seeds)
    out = output_folder("out", options.out, "claims.json")
    results: dict[str, dict[str, JsonObject]] = {}
    for name in options.only or ARMS:
        results[name] = {}
        for seed in options.seeds[: ARMS[name].seeds]:
            results[name][seed] = run_arm(name, seed, out)
            rows = summarised(results, out)
            write_own_json({"arms": rows}, out / "claims.json")  # after each: the whole takes long
    print(table(rows))
    print(f"wrote {shown(out / 'claims.json')}")


def run_arm(name: str, seed: str, out: pathlib.Path) -> JsonObject:
    """The result of one run, made unless it is there.

    Raises:
      InputError: what is there was made with other settings, or a program failed.
    """
    arm, options = ARMS[name], flags.FLAGS
    task = TASKS[arm.task]
    count, folds = arm.teachers
    taught = (f"--cnncf.teachers={count}", f"--cnncf.teacher_folds={folds}") if count else ()
    training = (*arm.train, *taught, *options.more, f"--seed={seed}")
    asked = settings(task.data, training, options.phantoms)
    file, needed = out / f"{name}-{seed}.json", ("seconds", "metrics", "cases", "teachers")
    if file.exists():
        return kept(file, asked, needed)
    data, begun = store(arm.task, out), time.monotonic()
    workdir = out / "runs" / f"{name}-{seed}"
    given = [*asked["data"], *asked["train"]]
    program("train", *given, f"--data_dir={data}", f"--workdir={workdir}")
    seconds = time.monotonic() - begun
    place = out / "evaluated" / f"{name}-{seed}"
    evaluate = ("evaluate", f"--checkpoint={workdir}", f"--data_dir={data}")
    program(*evaluate, f"--out={place}")
    teachers = {}
    for stage in (f"teacher{k + 1}.fold{i + 1}" for k in range(count) for i in range(folds)):
        program(*evaluate, f"--stage={stage}", f"--out={place / stage}")
        teachers[stage] = scores(place / stage, task.figure)
    metrics = json.loads((place / "metrics.json").read_text("utf-8"))
    result: JsonObject = {"settings": asked, "seconds": seconds, "metrics": metrics}
    result |= {"cases": scores(place, task.figure), "teachers": teachers}
    write_json(result, file)
    return result


def store(task: str, out: pathlib.Path) -> pathlib.Path:
    """The folder of a task's store."""
    phantoms = flags.FLAGS.phantoms
    data = out / f"data-{task}-{phantoms.replace(',', '-')}"
    if not (data / "store").exists():
        program("prepare", *TASKS[task].data, f"--phantoms={phantoms}", f"--out={data}")
    return data


def scores(evaluated: pathlib.Path, figure: str) -> Scores:
    """By case, the probability of COVID-19, or the DSC of those that have lesions."""
    rows = json.loads((evaluated / "scans.json").read_text("utf-8"))
    if figure == "auc":
        return {row["case"]: row["probabilities"][POSITIVE] for row in rows}
    return {row["case"]: row["dsc"] for row in rows if row.get("dsc") is not None}


class Figure:
    """The AUC or the mean DSC of some cases of a task, by the scores of a run.

    Attributes:
      patients: whose each case is.
    """

    def __init__(self, task: str, names: Sequence[str], data: pathlib.Path):
        listed = read_cases(data / "cases.csv", check_files=False)
        cases = {case.name: case for case in listed}
        self._names, self._figure = list(names), TASKS[task].figure
        self._truth = np.asarray([cases[name].label == CLASSES.index(POSITIVE) for name in names])
        self.patients = np.asarray([cases[name].patient for name in names])

    def __call__(self, runs: Sequence[Mapping[str, float]], rows: np.ndarray) -> float:
        """Its mean over runs, of the cases in these rows; nan where it is not defined."""
        truth = self._truth[rows]
        if self._figure == "auc" and truth.all() == truth.any():
            return float("nan")
        of_runs = (np.asarray([run[name] for name in self._names])[rows] for run in runs)
        if self._figure == "auc":
            return float(np.mean([roc_area(truth, values) for values in of_runs]))
        return float(np.mean([values.mean() for values in of_runs]))

    def of_all(self, runs: Sequence[Mapping[str, float]]) -> float:
        """The same of all cases."""
        return self(runs, np.arange(len(self._names)))

    def against(
        self, runs: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]
    ) -> Difference:
        """The figure of `runs` less that of `others`, by a paired bootstrap over patients."""
        return paired_bootstrap(
            lambda rows: self(runs, rows), lambda rows: self(others, rows), self.patients
        )


def summarised(
    results: Mapping[str, Mapping[str, JsonObject]], out: pathlib.Path
) -> list[JsonObject]:
    """A row of the table for each arm, means over its seeds, and one for its teachers."""
    rows = []
    for name, by_seed in results.items():
        arm, runs = ARMS[name], {seed: run["cases"] for seed, run in by_seed.items()}
        figure = Figure(arm.task, list(next(iter(runs.values()))), store(arm.task, out))
        row: JsonObject = {
            "arm": name,
            "title": arm.title,
            "figure": TASKS[arm.task].figure,
            "seeds": list(runs),
            "minutes": float(np.mean([run["seconds"] / 60 for run in by_seed.values()])),
            "mean": figure.of_all(list(runs.values())),
            "of_seeds": [figure.of_all([run]) for run in runs.values()],
        }
        shared = [seed for seed in runs if seed in results.get(arm.against, {})]
        if shared:
            others = [results[arm.against][seed]["cases"] for seed in shared]
            found = figure.against([runs[seed] for seed in shared], others)
            row |= {"against": arm.against, "difference": _ends(found)}
        rows.append(row)
        fused = [fuse(run["teachers"]) for run in by_seed.values() if run["teachers"]]
        if fused:
            found = figure.against(list(runs.values()), fused)
            row["teachers"] = {"mean": figure.of_all(fused), "difference": _ends(found)}
    return rows


def fuse(teachers: Mapping[str, Scores]) -> Scores:
    """The mean of all teachers' probabilities of each case."""
    of_all = list(teachers.values())
    return {case: float(np.mean([of[case] for of in of_all])) for case in of_all[0]}


def _ends(found: Difference) -> list[float]:
    return [found.difference, found.interval.low, found.interval.high]


def table(rows: Sequence[JsonObject]) -> str:
    """The rows as text."""
    lines = [f"{'arm':40}{'':>5}{'seeds':>6}{'mean':>8}{'minutes':>9}"]
    for row in rows:
        line = f"{row['title']:40}{row['figure'].upper():>5}{len(row['seeds']):6}"
        line += f"{row['mean']:8.3f}{row['minutes']:9.1f}"
        if "difference" in row:
            line += "  {:+.3f} ({:+.3f} to {:+.3f})".format(*row["difference"])
            line += f" against {row['against']}"
        lines.append(line)
        if "teachers" in row:
            of = row["teachers"]
            line = f"{'  its teachers, fused':40}{row['figure'].upper():>5}{'':6}{of['mean']:8.3f}"
            ends = "{:+.3f} ({:+.3f} to {:+.3f})".format(*of["difference"])
            lines.append(f"{line}{'':9}  {ends} of the student against them")
    return "\n".join(lines)


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, computes=False)


if __name__ == "__main__":
    run()
