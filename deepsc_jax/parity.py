"""The parity report: how far this installation's numbers are from the PyTorch reference's.

    deepsc parity [--json=FILE] [--tf32] [--quick]

Run it in a checkout, with the extra `test`, on the device that will train: it runs the parity tests
there and prints the largest error of every part and type beside its bound. On GPUs that have it,
`--tf32` lets float32 products use TensorFloat-32, which is fast and exceeds the float32 bounds;
without it they are float32 throughout.
"""

from deepsc_jax.runtime import entry

if __name__ == "__main__":
    entry.import_jax()  # before the imports below, which need it

import importlib
import importlib.metadata
import pathlib
import platform

import jax
from absl import flags

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_own_json
from deepsc_jax.runtime.places import output_file
from deepsc_jax.runtime.types import JsonObject, Untyped

TESTS = pathlib.Path(__file__).parents[1] / "tests"


class Recorder:
    """A pytest plugin that keeps what the tests measured, whether or not it is within bounds."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], JsonObject] = {}

    def pytest_runtest_logreport(self, report: Untyped) -> None:
        """Keep the largest error of each part, type and quantity."""
        if report.when != "call":
            return
        for name, row in report.user_properties:
            if name != "parity":
                continue
            key = (row["part"], row["dtype"], row["quantity"])
            if key not in self.rows or not row["max_error"] <= self.rows[key]["max_error"]:
                self.rows[key] = row


def environment(tf32: bool) -> JsonObject:
    """What the numbers depend on: device, versions, precision of products."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch")}
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "tf32": tf32,
        "python": platform.python_version(),
    } | versions


def table(rows: list[JsonObject]) -> str:
    """The rows as text, those beyond their bound marked."""
    lines = [f"{'part':28}{'dtype':10}{'quantity':24}{'max error':>10}{'bound':>10}"]
    for row in rows:
        beyond = "" if row["max_error"] <= row["bound"] else "  beyond"
        lines.append(
            f"{row['part']:28}{row['dtype']:10}{row['quantity']:24}"
            f"{row['max_error']:10.1e}{row['bound']:10.0e}{beyond}"
        )
    return "\n".join(lines)


def define_flags() -> None:
    """Define the flags of this command."""
    flags.DEFINE_string("json", None, "File for the table, with the environment.")
    flags.DEFINE_bool("tf32", False, "Let float32 products use TensorFloat-32 where there is one.")
    flags.DEFINE_bool("quick", False, "Leave out what takes minutes: training and joint variants.")


def main() -> int:
    """Run the parity tests and report; 1 if a bound is exceeded or a test fails."""
    options = flags.FLAGS
    precision = "tensorfloat32" if options.tf32 else "highest"
    jax.config.update("jax_default_matmul_precision", precision)
    try:
        pytest = importlib.import_module("pytest")
        importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            f"{error}: the parity report needs the extra: pip install -e '.[test]'"
        ) from error
    target = output_file("json", options.json)
    files = sorted(map(str, TESTS.rglob("test_parity_*.py")))
    if not files:
        raise InputError(f"{TESTS}: no parity tests found: run in a checkout of the repository")
    recorder = Recorder()
    chosen = ["-m", "not slow"] if options.quick else []
    code = pytest.main([*files, *chosen, "-q", "--no-header", "--tb=line"], plugins=[recorder])
    rows = list(recorder.rows.values())
    computed_with = environment(options.tf32)
    print("\n" + "  ".join(f"{name} {value}" for name, value in computed_with.items()))
    print(table(rows))
    if target is not None:
        write_own_json({"environment": computed_with, "rows": rows}, target)
        print(f"wrote {target}")
    return int(code)


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags)


if __name__ == "__main__":
    run()
