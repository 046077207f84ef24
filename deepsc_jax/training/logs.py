"""What a training run writes down: metrics.jsonl, TensorBoard, and a line on the terminal."""

import importlib
import io
import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside
from deepsc_jax.runtime.output import tell
from deepsc_jax.runtime.types import JsonObject, Untyped

# Generated modules, in which type checkers see no names.
events: Untyped = importlib.import_module("tensorboard.compat.proto.event_pb2")
summaries: Untyped = importlib.import_module("tensorboard.compat.proto.summary_pb2")

CLOCK_JUMP_SECONDS = 60.0


class MetricsLog:
    """Scalars of every stage, in `workdir/metrics.jsonl` and `workdir/tensorboard/STAGE`.

    A line is `{"stage", "step", ...scalars}`; those of training are means over the steps since the
    line before. On resuming a stage at some step, its later lines are dropped: they are written
    again. Of the processes of a job one is the writer; in the others this writes and says nothing.
    """

    def __init__(self, workdir: pathlib.Path, *, writer: bool = True):
        self.writer = writer
        self.path = workdir / "metrics.jsonl"
        self._tensorboard = workdir / "tensorboard"
        self._writers: dict[str, EventFileWriter] = {}
        self._ahead = time.time() - time.monotonic()

    def resume(self, stage: str, step: int, *, scored: bool = True) -> None:
        """Forget what `stage` logged after `step`, and, unless `scored`, of its validation then.

        A line that is cut off, as a kill leaves the last one, is dropped. Where others are not
        ours, a copy of the file is kept first, and a line says so.
        """
        if not self.writer or not os.path.lexists(self.path):
            return
        if not self.path.is_file():  # a pipe would be waited for
            raise InputError(f"{self.path}: expected a file, and it is none: move it away")
        kept: list[str] = []
        foreign: list[int] = []
        texts = self.path.read_bytes().split(b"\n")
        for number, text in enumerate(texts, start=1):
            line = _parsed(text)
            if line is not None:
                validation = any(name.startswith("validation_") for name in line)
                later = line["step"] > step or (line["step"] == step and validation and not scored)
                if line["stage"] != stage or not later:
                    kept.append(json.dumps(line) + "\n")
            elif text.strip() and number < len(texts):  # what follows the last newline is cut off
                foreign.append(number)
        if foreign:
            names = (
                self.path.with_name(f"metrics-damaged{i}.jsonl") for i in ("", *range(2, 1000))
            )
            aside_as = next(path for path in names if not path.exists())
            shutil.copyfile(self.path, aside_as)
            self.say(
                f"{self.path}: {len(foreign)} lines are not of this log, the first is line "
                f"{foreign[0]}: left out; the file as it was is kept as {aside_as.name}"
            )
        with aside(self.path) as partial:
            partial.write_text("".join(kept), "utf-8")

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Append one line, and one TensorBoard event."""
        if not self.writer:
            return
        self._watch_clock()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step} | scalars) + "\n")
        values = [summaries.Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        self._add(stage, step, values)

    def show(self, stage: str, step: int, pictures: Mapping[str, UInt8[np.ndarray, "h w"]]) -> None:
        """Have TensorBoard show pictures, of grey from 0 to 255, by name."""
        if not self.writer or not pictures:
            return
        values = []
        for name, picture in pictures.items():
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "png")
            height, width = picture.shape
            image = summaries.Summary.Image(
                height=height, width=width, colorspace=1, encoded_image_string=png.getvalue()
            )
            values.append(summaries.Summary.Value(tag=f"validation/{name}", image=image))
        self._add(stage, step, values)

    def _add(self, stage: str, step: int, values: list[Untyped]) -> None:
        """Add an event to those of a stage."""
        if stage not in self._writers:
            self._writers[stage] = EventFileWriter(str(self._tensorboard / stage))
        summary = summaries.Summary(value=values)
        event = events.Event(wall_time=time.time(), step=step, summary=summary)
        self._writers[stage].add_event(event)

    def _watch_clock(self) -> None:
        """Say where the clock was set; nothing that is measured here goes by it."""
        ahead = time.time() - time.monotonic()
        jump = ahead - self._ahead
        if abs(jump) > CLOCK_JUMP_SECONDS:
            self.say(
                f"the clock jumped by {jump:+.0f} s: times in tensorboard/ jump with it, those of "
                "steps do not"
            )
            self._ahead = ahead

    def say(self, text: str) -> None:
        """Print a line."""
        if self.writer:
            tell(text)

    def close(self) -> None:
        """Flush TensorBoard's files."""
        for writer in self._writers.values():
            writer.close()


def _parsed(text: bytes) -> JsonObject | None:
    """A line of the log; None where it is none."""
    try:
        line = json.loads(text)
        known = isinstance(line["stage"], str) and isinstance(line["step"], int)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return line if known else None
