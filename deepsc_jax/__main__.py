"""All commands as one: `deepsc train`, or `python -m deepsc_jax train`."""

import ast
import pathlib
import runpy
import sys

from deepsc_jax import __version__
from deepsc_jax.runtime.output import ended_quietly

COMMANDS = (
    "prepare",
    "analyze",
    "train",
    "evaluate",
    "predict",
    "plan",
    "benchmark",
    "demo",
    "gain",
    "parity",
)


def run() -> None:
    """Run the command that the first argument names."""
    with ended_quietly():
        _run(sys.argv[1] if len(sys.argv) > 1 else "--help")


def _run(name: str) -> None:
    if name in COMMANDS:
        del sys.argv[1]
        # As its own main module, by whose name absl finds the flags that --help shows.
        runpy.run_module(f"deepsc_jax.{name}", run_name="__main__", alter_sys=True)
    elif name in ("--help", "-h", "help"):
        print("usage: deepsc COMMAND [--FLAG=VALUE ...]\n")
        for command in COMMANDS:
            print(f"  {command:10}{_first_line(command)}")
        print("\n`deepsc COMMAND --help` says how one is called; `deepsc --version` which this is.")
    elif name == "--version":
        print(f"deepsc_jax {__version__}")
    else:
        expected = f"expected one of {', '.join(COMMANDS)}, --help or --version"
        print(f"error: {name}: {expected}", file=sys.stderr)
        sys.exit(2)


def _first_line(command: str) -> str:
    """What a command says of itself, without the seconds that importing it takes."""
    source = pathlib.Path(__file__).with_name(f"{command}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


if __name__ == "__main__":
    run()
