"""From nothing to the first prediction: a fresh process, with an empty compilation cache and again.

`measure` starts this file as a program twice on one cache folder; each prints its phases as JSON.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from deepsc_jax.data.prediction import Prediction
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError

if TYPE_CHECKING:
    from deepsc_jax.inference.predictor import Predictor

PHASES = {
    "imports": "Python's and JAX's start",
    "load": "the checkpoint",
    "prepare": "scan read, lungs found, resampled",
    "first_call": "network, compilation included",
    "write": "NIfTI, picture, result.json",
    "total": "the sum of these",
    "second_call": "network, of the same scan again",
}


def measure(scan: str, checkpoint: str) -> dict[str, dict[str, float]]:
    """Seconds of each of `PHASES` with an empty (`cold`) and a filled (`warm`) compilation cache.

    Raises:
      InputError: the scan cannot be predicted.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        return {
            kind: _measure_once(scan, checkpoint, f"{folder}/{kind}", cache)
            for kind in ("cold", "warm")
        }


def _measure_once(scan: str, checkpoint: str, out: str, cache: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "deepsc_jax.benchmarking.cold_start", f"--scan={scan}"),
            *(f"--checkpoint={checkpoint}", f"--out={out}", f"--begun={time.time()}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in entry.ALLOCATOR} | cache,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise InputError(f"--first_prediction: {lines[-1].removeprefix('error: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def table(measured: dict[str, dict[str, float]]) -> str:
    """The phases as text, in seconds."""
    lines = [f"{'first prediction, s':22}" + "".join(f"{kind:>8}" for kind in measured)]
    for phase, what in PHASES.items():
        values = "".join(f"{seconds[phase]:8.2f}" for seconds in measured.values())
        lines.append(f"{phase:22}{values}  {what}")
    return "\n".join(lines)


class Watched:
    """A predictor that notes when it was called, on what, and when it was done."""

    def __init__(self, predictor: "Predictor"):
        self._predictor = predictor
        self.volume = np.zeros(0)
        self.called = self.done = 0.0

    def __call__(self, volume: np.ndarray) -> Prediction:
        """Predict."""
        self.volume, self.called = volume, time.time()
        prediction = self._predictor(volume)
        self.done = time.time()
        return prediction

    def __getattr__(self, name: str) -> Any:
        """What else is asked of a predictor."""
        return getattr(self._predictor, name)


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("scan", None, "NIfTI file or DICOM folder.", required=True)
    flags.DEFINE_string("checkpoint", None, "A training run's --workdir.", required=True)
    flags.DEFINE_string("out", None, "Folder for the result.", required=True)
    flags.DEFINE_float("begun", None, "time.time() at the start.", required=True)


def main() -> None:
    """Predict a scan, run the network on it once more, and print the seconds of the phases."""
    from deepsc_jax.inference import (
        predictor as inference,  # not above: whoever measures has no use for it
    )
    from deepsc_jax.inference import requests
    from deepsc_jax.inference.results import predict_scan

    options, imported = flags.FLAGS, time.time()
    watched = Watched(inference.load(pathlib.Path(options.checkpoint)))
    loaded = time.time()
    (request,) = requests.of_paths([pathlib.Path(options.scan)], [])
    predict_scan(request, pathlib.Path(options.out), watched.network, watched)
    written = time.time()
    seconds = {
        "imports": imported - options.begun,
        "load": loaded - imported,
        "prepare": watched.called - loaded,
        "first_call": watched.done - watched.called,
        "write": written - watched.done,
    }
    seconds["total"] = sum(seconds.values())
    watched(watched.volume)
    print(json.dumps(seconds | {"second_call": watched.done - watched.called}))


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
