"""What becomes of a program whose standard output nobody reads, or cannot be written.

Most end. A training goes on: what it computes does not end with its terminal or pipe.
"""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

from deepsc_jax.runtime.exit_codes import CLOSED_OUTPUT, FILE_SYSTEM


@contextlib.contextmanager
def ended_quietly() -> Iterator[None]:
    """Exit with CLOSED_OUTPUT and no word where a reader has gone, as `head` does.

    Otherwise the interpreter would say so at its end, after everything else. Where standard output
    cannot be written, as to a file on a full disk, it is one line and FILE_SYSTEM.
    """
    try:
        try:
            yield
        finally:
            for stream in _streams():
                stream.flush()
    except BrokenPipeError:
        _discard()
        sys.exit(CLOSED_OUTPUT)
    except OSError as error:
        _discard()
        print(f"error: standard output: {error.strerror}: write it elsewhere", file=sys.stderr)
        sys.exit(FILE_SYSTEM)


def is_unread() -> bool:
    """Whether standard output or error is a pipe whose reader has gone."""
    poll = select.poll()
    for stream in _streams():
        poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _discard() -> None:
    """Have what is left to be written go nowhere."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


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
