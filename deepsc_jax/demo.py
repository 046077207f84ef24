"""The whole system on phantoms, in minutes: `make demo`.

Writes a phantom data set, runs both training stages, evaluates on held-out phantoms beside simple
baselines, predicts one of them (and --scan, if given), and names the files to open. Everything is a
call of the programs that real data takes. Phantom results say nothing about patients.
"""

import hashlib
import os
import pathlib
import subprocess
import sys
import time

from absl import flags

from deepsc_jax.data.datasets import read_cases
from deepsc_jax.data.scans import load_scan
from deepsc_jax.report.curves import loss_curves
from deepsc_jax.runtime import entry

FLAGFILE = "configs/phantom.flags"


def step(title: str, module: str, *arguments: str) -> None:
    """Run one of the programs and say what it does; ends the demo if it fails."""
    command = [sys.executable, "-m", f"deepsc_jax.{module}", *arguments]
    print(f"\n== {title}\n   python -m deepsc_jax.{module} {' '.join(arguments)}", flush=True)
    begun = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        sys.exit(code)
    print(f"   {time.monotonic() - begun:.0f} s", flush=True)


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("out", "runs/demo", "Folder for everything the demo writes.")
    flags.DEFINE_string("scan", None, "A scan of your own to predict too.")
    flags.DEFINE_string("phantoms", "150,45,60", "Phantoms for training, validation and test.")


def main() -> None:
    """Run the demo into --out."""
    out = pathlib.Path(flags.FLAGS.out)
    data, workdir, predictions = out / "data", out / "run", out / "predictions"
    begun = time.monotonic()
    if flags.FLAGS.scan:
        load_scan(flags.FLAGS.scan)  # what is wrong with it is better known now
    print(f"The whole system on phantoms; results go to {out}.", flush=True)
    if not (data / "store").exists():
        step(
            "Write phantoms and preprocess them",
            "prepare",
            f"--flagfile={FLAGFILE}",
            f"--phantoms={flags.FLAGS.phantoms}",
            f"--out={data}",
        )
    step(
        "Train: segmentation and classification apart, then jointly",
        "train",
        f"--flagfile={FLAGFILE}",
        f"--data_dir={data}",
        f"--workdir={workdir}",
    )
    loss_curves(out / "curves.png", workdir / "metrics.jsonl")
    step(
        "Evaluate on held-out phantoms",
        "evaluate",
        f"--checkpoint={workdir}",
        f"--data_dir={data}",
        f"--out={out}",
        "--baselines",
    )
    held_out = [case for case in read_cases(data / "cases.csv") if case.split == "test"]
    example = next(case for case in held_out if case.label == 0)
    predict = ("predict", f"--checkpoint={workdir}", f"--out={predictions}")
    step("Predict a held-out phantom", *predict, f"--scan={example.scan}", "--overwrite")
    if flags.FLAGS.scan:
        # A folder for each: another scan's result would not be replaced.
        place = hashlib.sha256(os.fsencode(os.path.realpath(flags.FLAGS.scan))).hexdigest()[:8]
        step(
            "Predict your scan, with a network that has seen phantoms only",
            "predict",
            f"--checkpoint={workdir}",
            f"--out={predictions / place}",
            f"--scan={flags.FLAGS.scan}",
            "--overwrite",
        )
    minutes = (time.monotonic() - begun) / 60
    print(f"\nDone in {minutes:.1f} minutes. Look at:")
    pictures = sorted(predictions.rglob("picture.png"))
    masks = sorted(predictions.rglob("lesion_mask.nii.gz"))
    for path in [out / "metrics.json", out / "curves.png", *pictures, *masks]:
        print(f"  {path}")


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
