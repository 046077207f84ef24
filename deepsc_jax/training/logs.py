"""What a training run writes down: metrics.jsonl, TensorBoard, and a line on the terminal."""

import importlib
import json
import pathlib
import time
from typing import Any

from tensorboard.summary.writer.event_file_writer import EventFileWriter

from deepsc_jax.runtime.files import aside

# Generated modules, in which type checkers see no names.
events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")


class MetricsLog:
    """Scalars of every stage, in `workdir/metrics.jsonl` and `workdir/tensorboard/<stage>`.

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
