"""What all tests share: eight CPU devices, parsed flags, and no compilation cache on disk."""

import importlib.util
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import pytest
from absl import flags
from drawn import draw_params

# Under nohup, or in the background of a script, these are ignored, by all processes below as well;
# what the tests start must be told of them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# The extra `test` brings XLA's CUDA compiler, for plans, without the rest of CUDA: where there is
# no GPU, JAX would say so at length in every process.
if not pathlib.Path("/dev/nvidiactl").exists() and not importlib.util.find_spec("libtpu"):
    jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
# Before any test touches a device: tests of the mesh split batches over these.
jax.config.update("jax_num_cpu_devices", 8)
# A cache kept between runs would hide recompilation from the tests that count it.
jax.config.update("jax_enable_compilation_cache", False)
# Grain's workers and absl's flags raise UnparsedFlagAccessError outside app.run.
flags.FLAGS.mark_as_parsed()

TORCH = importlib.util.find_spec("torch") is not None
# Without PyTorch, test_golden.py still compares the network with the reference's outputs.
collect_ignore_glob = [] if TORCH else ["*test_parity_*.py", "*test_interop_*.py"]


def pytest_report_header() -> str:
    """Say what is left out."""
    return "" if TORCH else "PyTorch is not installed: parity and interop tests are left out"


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Assert that relative errors are within bounds, and leave them for the parity report."""

    def check(part: str, dtype: str, measured: dict[str, tuple[float, float]]) -> None:
        for quantity, (error, bound) in measured.items():
            row = {"part": part, "dtype": dtype, "quantity": quantity}
            record_property("parity", row | {"max_error": error, "bound": bound})
        for quantity, (error, bound) in measured.items():
            assert error <= bound, f"{part}, {dtype}: {quantity} off by {error:.2g}"

    return check


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Any]:
    """Parameters drawn by numpy: none starts at zero, and no initialiser is compiled."""
    return draw_params


# The files that take longest, which begin first: no process is left with one of them at the end.
LONGEST = (
    *("step", "loop", "scale", "interrupted", "comparators", "network", "plan", "watch", "train"),
    *("resuming", "pretrained", "predict", "predictor", "qchc_unet", "parity_qchc_unet"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files before all others."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
