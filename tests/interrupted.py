"""A server of training runs that are sent a signal at a moment of one's choice.

    python tests/interrupted.py DATA

Reads a request a line, a JSON object of the arguments of `Trainings.run`, and trains in a child of
its own. That sends itself the signal when the moment comes, after so many that pass, or is sent it
after so many seconds; or something is done to it then (`DONE`); no file of its grows above so many
bytes. Answers with the exit code, and the
seconds from the signal to the end.

The children are forks of a process that has imported JAX and has not used it. What they train is a
system of six numbers, which compiles in no time; all else is the product's: flags, lock, store,
loop, checkpoints, log, signals.
"""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepsc_jax import train
from deepsc_jax.config import Config
from deepsc_jax.data.batch import Reads
from deepsc_jax.runtime import entry, lock
from deepsc_jax.runtime.signals import signals
from deepsc_jax.systems.building import build
from deepsc_jax.systems.system import Batch, Facts, Losses, Predict, Stage, System, Variables
from deepsc_jax.training import checksums, job, loop, stage
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
STAGE = "classification"
FLAGS = [
    f"--flagfile={ROOT / 'configs/tiny.flags'}",
    f"--stage={STAGE}",
    "--deepsc.classification.steps=100",
    "--deepsc.classification.batch=2",
    "--evaluate_every=5",
    "--checkpoint_every=2",
    "--data_devices=1",
]


class Means(System):
    """Classes from a scan's mean intensity."""

    def __init__(self, config: Config):
        super().__init__(config, build(config, "cpu").layout, sys)  # of the module nothing is used

    @property
    def stages(self) -> tuple[Stage, ...]:
        options = self.config.stage(STAGE)
        learns = ("lesions", "classes")  # of which lesions have a threshold
        return (Stage(STAGE, Reads(slices=True), learns, options.steps, options.batch),)

    def init(self, key: Any, batch: Batch) -> Variables:
        del key, batch
        return {"params": {"scale": jnp.ones(3), "shift": jnp.zeros(3)}}

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Any]:
        del stage
        params, mean = variables["params"], batch["slices"].mean((1, 2, 3))
        return {"logits": mean[:, None] * params["scale"] + params["shift"]}

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        del facts
        at("compile")
        logits = jax.nn.log_softmax(self.outputs(stage, variables, batch)["logits"])
        loss = -jnp.take_along_axis(logits, batch["label"][:, None], axis=1)[:, 0]
        return {"loss": loss}, {}

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Any]:
        logits = self.outputs(stage, variables, batch)["logits"]
        return {"probabilities": jax.nn.softmax(logits)}

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        del stage
        return ()

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        raise NotImplementedError


MOMENTS = ("start-up", "compile", "step", "validation", "save", "record", "threshold")
WANTED: dict[str, Any] = {"moment": None}


def at(moment: str) -> None:
    """Send this process the signal if this is the moment for it."""
    if WANTED["moment"] != moment:
        return
    if WANTED["passes"]:
        WANTED["passes"] -= 1
        return
    WANTED["moment"] = None
    os.write(WANTED["sent"], b"sent")
    if WANTED["done"]:
        DONE[WANTED["done"]]()
        return
    os.kill(os.getpid(), WANTED["signal"])
    time.sleep(0.1)  # in which the thread that listens hears it


def lose_output() -> None:
    """Close the other end of standard output."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)


HOLDER = """
import pathlib, sys, time
from deepsc_jax.runtime.lock import locked

with locked(pathlib.Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(20)
"""


def take_folder_over() -> None:
    """Remove the lock, and have another process take it."""
    pathlib.Path(WANTED["workdir"], lock.NAME).unlink()
    command = [sys.executable, "-c", HOLDER, WANTED["workdir"]]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert other.stdout is not None
    other.stdout.readline()


def be_infinite() -> None:
    """Let the loss be no number."""
    means = loop.take_means
    loop.take_means = lambda since: means(since) | {"loss": float("nan")}


# What is done to a training: by name.
DONE: dict[str, Callable[[], Any]] = {
    "its folder is moved": lambda: os.rename(WANTED["workdir"], f"{WANTED['workdir']}-moved"),
    "its store is removed": lambda: shutil.rmtree(pathlib.Path(WANTED["data"], "store")),
    "its lock is removed": lambda: pathlib.Path(WANTED["workdir"], lock.NAME).unlink(),
    "its folder is taken over": take_folder_over,
    "its output is gone": lose_output,
    "its loss is infinite": be_infinite,
    "it hangs": lambda: time.sleep(600),
}


def limit(owner: Any, name: str, file_bytes: int) -> None:
    """Let no file grow above so many bytes once `owner.name` is called."""
    called: Callable[..., Any] = getattr(owner, name)

    def limited(*arguments: Any, **named: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
        return called(*arguments, **named)

    setattr(owner, name, limited)


def hook(owner: Any, name: str, moment: str) -> None:
    """Let `at(moment)` come before every call of `owner.name`."""
    called: Callable[..., Any] = getattr(owner, name)

    def hooked(*arguments: Any, **named: Any) -> Any:
        at(moment)
        return called(*arguments, **named)

    setattr(owner, name, hooked)


def settle_threshold(workdir: pathlib.Path, stage: str, store: Any) -> float:
    """In place of the choice, which takes a network."""
    at("threshold")
    workdirs.save_threshold(workdir, stage, 0.5)
    return 0.5


def run(request: dict[str, Any], data: str, sent: int) -> None:
    """In the child: train, and write to `sent` when the signal is."""
    WANTED.update(request, sent=sent)
    if request["file_bytes"]:  # after the look at the folder, which writes 4 KiB
        limit(job, "Store", request["file_bytes"])

    def eval_step(*arguments: Any, **named: Any) -> Any:
        measure = make(*arguments, **named)

        def hooked(*inputs: Any) -> Any:
            at("validation")
            return measure(*inputs)

        return hooked

    make, stage.make_eval_step = stage.make_eval_step, eval_step
    hook(job, "Store", "start-up")
    hook(loop, "take_means", "step")
    hook(Checkpoints, "_write_sums", "save")
    hook(checksums, "add_record", "record")
    job.settle_threshold = settle_threshold
    job.build = Means
    job.stages_of = lambda config, _: Means(config).stages
    sys.argv = ["train", *FLAGS, f"--data_dir={data}", f"--workdir={request['workdir']}"]
    sys.argv += request["flags"]
    sys.orig_argv = sys.argv
    train.run()


def keep(heard: int, log: str) -> None:
    """Append to `log` what a child says."""
    with open(heard, "rb") as said, open(log, "ab") as file:
        file.write(said.read())


def serve(request: dict[str, Any], data: str) -> dict[str, Any]:
    """Train in a child, and say how it ended."""
    told, sent = os.pipe()
    heard, says = os.pipe()  # not a file, whose size may be limited
    child = os.fork()
    if child == 0:
        signals.listen()
        os.close(told)
        os.dup2(says, 1)
        os.dup2(says, 2)
        os.close(says)
        try:
            run(request, data, sent)
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 99)
        os._exit(98)
    os.close(sent)
    os.close(says)
    keeper = threading.Thread(target=keep, args=(heard, request["log"]))
    keeper.start()
    if request["after"] is not None:
        time.sleep(request["after"])
        os.kill(child, request["signal"])
        begun = time.monotonic()
    else:
        os.read(told, 4)  # or the end of a child that came to no such moment
        begun = time.monotonic()
    status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - begun
    os.close(told)
    keeper.join()
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds}


def main() -> None:
    """Serve."""
    os.environ |= entry.ALLOCATOR  # so that nothing is started over
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(serve(request, request["data"] or sys.argv[1])), flush=True)


if __name__ == "__main__":
    main()
