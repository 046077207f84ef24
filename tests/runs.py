"""Training runs of a tiny network as processes of their own, for the tests that stop them."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from deepsc_jax import workdir as workdirs
from deepsc_jax.config import Config
from deepsc_jax.models import deepsc
from deepsc_jax.training import checkpoint, state

ROOT = pathlib.Path(__file__).parent.parent
STAGE = "classification"  # the one that compiles fastest
STEPS = 40
FLAGS = [
    f"--flagfile={ROOT / 'configs/tiny.flags'}",
    f"--stage={STAGE}",
    "--inception_channels=4",
    "--inception_branches=1/1,3",
    "--lesion_channels=4,4,4",
    "--classifier_stem_channels=4",
    "--encoder_channels=4,4,4",
    "--norm_groups=2",
    "--classification_batch=4",
    f"--classification_steps={STEPS}",
    "--evaluate_every=10",
    "--checkpoint_every=1",
    "--adam_eps=1e-2",  # Adam then divides no rounding error by its own size
]


class Runs:
    """Runs of `FLAGS` on one store: their folders are `folder / name`."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        command = [sys.executable, "-m", "deepsc_jax.prepare", FLAGS[0], f"--out={folder / 'data'}"]
        command += ["--phantoms=8,3,0", "--phantom_size=48", "--workers=1"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    def start(self, name: str) -> subprocess.Popen:
        """One process with four devices."""
        return self._start(name, [sys.executable, "-m", "deepsc_jax.train", "--data=4"])

    def start_two(self, name: str) -> subprocess.Popen:
        """Two processes of two devices each, by the launcher."""
        return self._start(name, [str(ROOT / "launch/local.sh"), "2"], JAX_NUM_CPU_DEVICES="2")

    def _start(self, name: str, command: list[str], **more: str) -> subprocess.Popen:
        folders = [f"--data_dir={self.folder / 'data'}", f"--workdir={self.folder / name}"]
        compiled = {  # spares restarts the compilation
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        env = os.environ | compiled | {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable} | more
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                [*command, *FLAGS, *folders],
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _log(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.log"

    def said(self, name: str) -> str:
        """What all runs of a folder have printed, errors included."""
        return self._log(name).read_text()

    def wait_until(self, condition: Callable[[], bool], run: subprocess.Popen, name: str) -> None:
        """Wait for something to be true of a run that goes on."""
        while not condition():
            assert run.poll() is None, f"ended with {run.returncode}:\n{self.said(name)}"
            time.sleep(0.002)

    def finish(self, name: str) -> pathlib.Path:
        """Run to the end, and return the run's folder."""
        code = self.start(name).wait()
        assert code == 0, self.said(name)
        return self.folder / name


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def reached(workdir: pathlib.Path) -> int:
    """The last step in metrics.jsonl."""
    return max((line["step"] for line in lines(workdir)), default=0)


def losses(workdir: pathlib.Path) -> list[float]:
    """The training loss of every step."""
    return [line["loss"] for line in lines(workdir) if "loss" in line]


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters, optimizer state and step of the newest checkpoint, by name."""
    config: Config = workdirs.read(workdir).config
    model = deepsc.build(config, "cpu")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(
        lambda: state.create(config, STAGE, state.initial_params(config, model))
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    checkpoints = checkpoint.Checkpoints(workdir / STAGE)
    step = checkpoints.latest_step()
    assert step is not None
    contents = checkpoints.load(like, step)
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path((contents["state"], contents["data"]))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
