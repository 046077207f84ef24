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
]


def make_data(folder: pathlib.Path) -> pathlib.Path:
    """A store of eight training and three validation phantoms for `FLAGS`."""
    command = [sys.executable, "-m", "deepsc_jax.prepare", FLAGS[0], f"--out={folder}"]
    command += ["--phantoms=8,3,0", "--phantom_size=48", "--workers=1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def environment(cache: pathlib.Path, **more: str) -> dict[str, str]:
    """What a run's process needs: `cache` spares its restarts the compilation."""
    compilation = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return os.environ | compilation | {"PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"} | more


def start(command: list[str], env: dict[str, str], output: pathlib.Path) -> subprocess.Popen:
    """Start a run; what it says is added to `output`."""
    with output.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def wait_until(condition: Callable[[], bool], run: subprocess.Popen, output: pathlib.Path) -> None:
    """Wait for something to be true of a run that goes on."""
    while not condition():
        assert run.poll() is None, f"ended with {run.returncode}:\n{output.read_text()}"
        time.sleep(0.002)


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
