"""What every program does around its main: parse flags, and turn bad input into one line."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from deepsc_jax import config
from deepsc_jax.errors import InputError


def run(main: Callable[[], int | None]) -> None:
    """Run `main` as a program and exit.

    Exits with 2 for a bad flag and 1 for bad input, each after one line on stderr; otherwise with
    what `main` returns.
    """
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}: options begin with --")
        if "working_size" in flags.FLAGS:
            config.from_flags()
    except (flags.Error, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return rest


def _guarded(main: Callable[[], int | None]) -> int | None:
    logging.set_verbosity(logging.ERROR)  # Orbax logs its internals
    try:
        return main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
