"""Standard output that may go away: what is computed does not end with its terminal or pipe."""

import contextlib
import os
import sys


def tell(text: str) -> None:
    """Print a line now; where standard output is gone, `without_output`."""
    try:
        print(text, flush=True)
    except OSError as error:
        without_output(error)


def without_output(error: OSError) -> None:
    """Go on without standard output, which failed with `error`, after a line on standard error.

    What is left in its buffer would fail again at exit: it goes to the null device.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # one that is no file, or closed
        os.dup2(null, sys.stdout.fileno())
    os.close(null)
    with contextlib.suppress(OSError):
        print(
            f"standard output is gone ({error.strerror}): going on without it; what a training "
            "logs is in metrics.jsonl",
            file=sys.stderr,
            flush=True,
        )
