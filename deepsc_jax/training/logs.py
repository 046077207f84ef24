"""What a training run writes down: metrics.jsonl, TensorBoard, and a line on the terminal."""

import importlib
import json
import math
import pathlib
import sys
import time
from typing import Any

from tensorboard.summary.writer.event_file_writer import EventFileWriter

from deepsc_jax.runtime.files import aside

# Generated modules, in which type checkers see no names.
events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")


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

    def resume(self, stage: str, step: int) -> None:
        """Forget what `stage` logged after `step`."""
        if not self.writer or not self.path.exists():
            return
        kept = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # the last one, cut when the run was killed
                continue
            if line["stage"] != stage or line["step"] <= step:
                kept.append(line)
        with aside(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Append one line, and one TensorBoard event."""
        if not self.writer:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step} | scalars) + "\n")
        if stage not in self._writers:
            self._writers[stage] = EventFileWriter(str(self._tensorboard / stage))
        values = [summaries.Summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        event = events.Event(
            wall_time=time.time(), step=step, summary=summaries.Summary(value=values)
        )
        self._writers[stage].add_event(event)

    def say(self, text: str) -> None:
        """Print a line."""
        if self.writer:
            print(text, flush=True)

    def close(self) -> None:
        """Flush TensorBoard's files."""
        for writer in self._writers.values():
            writer.close()


class Progress:
    """One line of progress with the time left.

    On a terminal it is rewritten in place; elsewhere a line comes every ten seconds at most, or
    none where it is `quiet`.
    """

    def __init__(self, label: str, total: int, start: int = 0, *, quiet: bool = False):
        self._quiet = quiet
        self._label, self._total, self._start = label, total, start
        self._begun = time.monotonic()
        self._live = sys.stdout.isatty()
        self._shown = -math.inf

    def show(self, step: int, **values: Any) -> None:
        """Report `step` of the total, with some values."""
        now = time.monotonic()
        if self._quiet:
            return
        if not self._live and step < self._total and now - self._shown < 10:
            return
        self._shown = now
        rate = (time.monotonic() - self._begun) / max(step - self._start, 1)
        left = rate * (self._total - step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        minutes, seconds = divmod(round(left), 60)
        line = f"{self._label} {step}/{self._total}  {text}  {minutes}:{seconds:02d} left"
        end = "" if self._live and step < self._total else "\n"
        print(("\r\033[K" if self._live else "") + line, end=end, flush=True)
