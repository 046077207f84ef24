"""What every command does around its main: parse flags, and turn bad input into one line.

A command is a module with `define_flags()` and `main()`, which reads `absl.flags.FLAGS`.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from deepsc_jax.runtime import failures, usage
from deepsc_jax.runtime.exit_codes import BAD_FLAG, BAD_INPUT, INTERRUPTED
from deepsc_jax.runtime.names import print_any_name, shown
from deepsc_jax.runtime.output import ended_quietly, is_unread
from deepsc_jax.runtime.signals import hold, signals

# glibc gives freed arrays back to the system and asks for them anew, page by page: half a million
# page faults a train step. So it keeps them, however large, and in huge pages.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def run(
    main: Callable[[], int | None],
    define_flags: Callable[[], None],
    parse: Callable[[Sequence[str]], list[str]] = flags.FLAGS,
    *,
    computes: bool = True,
    trains: bool = False,
) -> None:
    """Run `main` as a program and exit.

    Args:
      main: the command; it reads the parsed flags.
      define_flags: defines them.
      parse: parses arguments and gives back what is no flag; `ConfigFlags.parse` is for commands
        that take the configuration of a run.
      computes: whether it needs JAX, which is imported once the flags are parsed.
      trains: whether to start over with `ALLOCATOR`.

    Exits with a code of `exit_codes`: after one line on stderr where the user, the machine or the
    file system is the cause, otherwise with what `main` returns. A program that trains is started
    over with `ALLOCATOR` in its environment, which glibc reads at the start only, unless some of
    that is set already. Compiled programs are kept in `compilation_cache()` unless
    JAX_COMPILATION_CACHE_DIR names a folder.
    """
    with ended_quietly():
        _run(main, define_flags, parse, computes, trains)


def _run(
    main: Callable[[], int | None],
    define_flags: Callable[[], None],
    parse: Callable[[Sequence[str]], list[str]],
    computes: bool,
    trains: bool,
) -> None:
    print_any_name()
    if trains and sys.platform == "linux" and not ALLOCATOR.keys() & os.environ.keys():
        hold()  # what is sent meanwhile
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)
    if trains:
        signals.listen()
    define_flags()
    work = functools.partial(_with_jax, main) if computes else main
    app.run(lambda _: _guarded(work, trains=trains), flags_parser=lambda argv: _parsed(parse, argv))


def import_jax() -> None:
    """Import JAX, or exit with a line where it does not take a variable of the environment."""
    try:
        importlib.import_module("jax")
    except ValueError as error:  # an error of its own code would be another
        print(f"error: {shown(str(error))}: correct or unset it", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _with_jax(main: Callable[[], int | None]) -> int | None:
    """Run what needs JAX; it takes seconds to import, and so not before the flags are right."""
    import_jax()
    from deepsc_jax.runtime import compiler

    compiler.set_up()
    return main()


def _parsed(parse: Callable[[Sequence[str]], list[str]], argv: Sequence[str]) -> list[str]:
    usage.define_help()
    try:
        rest = parse(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}: options begin with --")
    except (flags.Error, ValueError) as error:
        print(f"error: {shown(usage.explained(error))}", file=sys.stderr)
        sys.exit(BAD_FLAG)
    return rest


def _guarded(main: Callable[[], int | None], *, trains: bool) -> int | None:
    failures.be_quiet()
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            raise
        code = failures.report(error)
        if trains:
            # At once: what a library's threads were about, a save to a full disk for one, would
            # otherwise be waited for, and their errors printed.
            with ended_quietly():
                pass  # to have written what was printed
            os._exit(code)
        return code
