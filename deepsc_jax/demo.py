"""The whole system on phantoms, in minutes: `make demo`, or `make demo MODEL=qchc_unet`.

Writes a phantom data set, trains, evaluates on held-out phantoms beside simple baselines, predicts
one of them (and --scan, if given), and names the files to open.
Everything is a call of the programs that real data takes. Phantom results say nothing about
patients.
"""

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from types import FrameType

from absl import flags

from deepsc_jax.data.datasets import read_cases
from deepsc_jax.data.scans import load_scan
from deepsc_jax.data.store import Store
from deepsc_jax.models import registry
from deepsc_jax.report.curves import loss_curves
from deepsc_jax.report.scan_page import PAGE
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.places import output_folder


def flag_file(model: str) -> str:
    """The model's settings for phantoms."""
    return f"configs/{'' if model == registry.DEFAULT else f'{model}_'}phantom.flags"


def step(title: str, module: str, *arguments: str) -> None:
    """Run one of the programs and say what it does; ends the demo if it fails."""
    command = [sys.executable, "-m", f"deepsc_jax.{module}", *arguments]
    called = shown(f"python -m deepsc_jax.{module} {shlex.join(arguments)}")
    print(f"\n== {title}\n   {called}", flush=True)
    begun = time.monotonic()
    code = run_passing_signals(command)
    if code:
        sys.exit(code if code > 0 else 128 - code)
    print(f"   {time.monotonic() - begun:.0f} s", flush=True)


def run_passing_signals(command: list[str]) -> int:
    """Run a program to its end, as `Popen.returncode` says it, and pass on what this one is sent.

    The program may have to save: it is waited for. It is in a group of its own, so that a
    terminal's Ctrl-C comes here alone, and to the program once.
    """
    sent: list[int] = []
    started: list[subprocess.Popen] = []

    def hear(number: int, _: FrameType | None) -> None:
        sent.append(number)
        for program in started:
            program.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in (number for number in numbers if before[number] != signal.SIG_IGN):
        signal.signal(number, hear)
    try:
        program = subprocess.Popen(command, process_group=0)
        for number in sent:  # before there was a program to hear it
            program.send_signal(number)
        started.append(program)
        return program.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_enum("model", registry.DEFAULT, list(registry.MODELS), "The network.")
    flags.DEFINE_string(
        "out", None, "Folder for everything the demo writes: runs/demo, or runs/demo-MODEL."
    )
    flags.DEFINE_string("scan", None, "A scan of your own to predict too.")
    flags.DEFINE_string("phantoms", "150,45,60", "Phantoms for training, validation and test.")


def main() -> None:
    """Run the demo into --out."""
    model, settings = flags.FLAGS.model, f"--flagfile={flag_file(flags.FLAGS.model)}"
    place = "runs/demo" if model == registry.DEFAULT else f"runs/demo-{model}"
    out = output_folder("out", flags.FLAGS.out or place)
    data, workdir, predictions = out / "data", out / "run", out / "predictions"
    begun = time.monotonic()
    if flags.FLAGS.scan:
        load_scan(flags.FLAGS.scan)  # what is wrong with it is better known now
    print(f"{registry.row(model).title} on phantoms; results go to {out}.", flush=True)
    if not (data / "store").exists():
        step(
            "Write phantoms and preprocess them",
            "prepare",
            settings,
            f"--phantoms={flags.FLAGS.phantoms}",
            f"--out={data}",
        )
    step(
        f"Train {registry.row(model).title}, stage by stage",
        "train",
        settings,
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
    predict = ("predict", f"--checkpoint={workdir}", f"--out={predictions}", "--overwrite")
    patches = Store(data / "store").data.patches != "none"
    lesions = [f"--lesion_mask={example.lesion_mask}"] if patches else []
    step("Predict a held-out phantom", *predict, f"--scan={example.scan}", *lesions)
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
    pages = [out / PAGE, *sorted(predictions.rglob(PAGE))]
    masks = sorted(predictions.rglob("lesion_mask.nii.gz"))
    for path in [out / "metrics.json", out / "curves.png", *pages, *pictures, *masks]:
        print(f"  {path}")


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
