"""All commands as one: `deepsc train`, or `python -m deepsc_jax train`."""

import importlib
import sys

COMMANDS = (
    "prepare",
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
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        importlib.import_module(f"deepsc_jax.{name}").run()
    if name in ("--help", "-h", "help"):
        for command in COMMANDS:
            document = importlib.import_module(f"deepsc_jax.{command}").__doc__ or ""
            print(f"deepsc {command:10}{document.splitlines()[0]}")
        return
    print(f"error: {name}: expected one of {', '.join(COMMANDS)}, or --help", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run()
