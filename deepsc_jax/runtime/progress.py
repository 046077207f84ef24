"""How far long work is, and how long the rest will take."""

import math
import sys
import time
from types import TracebackType
from typing import Self

import rich.console
import rich.progress as bars

from deepsc_jax.runtime.output import tell, without_output

_SECONDS_BETWEEN_LINES = 10


class Progress:
    """Shows how many steps of a total are done, some values, and the time left; on stdout.

        with Progress("evaluate test", len(cases), lines=True) as progress:
            for case in cases:
                progress.advance(dsc=score(case))

    On a terminal it is a bar, above which what is printed meanwhile scrolls. Elsewhere it is a line
    every ten seconds at most, and one at the end, if `lines` asks for them. The time left is from
    the first report on: what comes before it may have been compiling.

    Args:
      title: what is done.
      total: its steps.
      start: how many of them were done before.
      quiet: show nothing anywhere, as in all processes of a job but one.
      lines: print lines where there is no terminal.
    """

    def __init__(
        self, title: str, total: int, start: int = 0, *, quiet: bool = False, lines: bool = False
    ):
        self._title, self._total, self._step = title, total, start
        self._printed = -math.inf
        self._first: tuple[int, float] | None = None  # the step and the time of the first report
        console = rich.console.Console()
        live = sys.stdout.isatty() and not console.is_dumb_terminal
        self._lines = lines and not quiet and not live
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[values]}", markup=False),
            bars.TimeRemainingColumn(),
            console=console,
            # What goes to a file must not go to the terminal instead.
            redirect_stderr=sys.stderr.isatty(),
            disable=quiet or not live,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, values="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._bar.stop()
        except OSError as gone:
            without_output(gone)

    def advance(self, **values: float) -> None:
        """Report one more step, with some numbers by name."""
        self.show(self._step + 1, **values)

    def show(self, step: int, **values: float) -> None:
        """Report that `step` of the total is reached, with some numbers by name."""
        self._step = step
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._bar.update(self._task, completed=step, values=text)
        now = time.monotonic()
        since, begun = self._first = self._first or (step, now)
        soon = now - self._printed < _SECONDS_BETWEEN_LINES
        if not self._lines or (soon and step < self._total):
            return
        self._printed = now
        left = ""
        if step == self._total:
            left = "  0:00 left"
        elif step > since:
            rate = (now - begun) / (step - since)
            minutes, seconds = divmod(round(rate * (self._total - step)), 60)
            left = f"  {minutes}:{seconds:02d} left"
        tell(f"{self._title} {step}/{self._total}  {text}{left}")
