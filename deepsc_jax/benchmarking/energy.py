"""Energy, where the machine tells it: Intel's and AMD's RAPL counters, and NVIDIA's."""

import importlib
import pathlib
from collections.abc import Callable

RAPL = pathlib.Path("/sys/class/powercap")


class Meter:
    """Joules that this machine's packages and GPUs have taken, idle or not, since some moment."""

    def __init__(self, rapl: pathlib.Path = RAPL):
        # Packages (intel-rapl:0), not their parts (intel-rapl:0:1), which they contain.
        self._packages = [p for p in sorted(rapl.glob("*rapl:*")) if p.name.count(":") == 1]
        self._turns = dict.fromkeys(self._packages, 0)
        self._last: dict[pathlib.Path, int] = {}
        self._gpus = _gpus()

    def joules(self) -> float | None:
        """The sum of all counters that can be read; None where there is none."""
        counted = [value for value in map(self._package, self._packages) if value is not None]
        counted += [gpu() for gpu in self._gpus]
        return sum(counted) if counted else None

    def _package(self, package: pathlib.Path) -> float | None:
        try:
            value = int((package / "energy_uj").read_text())
            around = int((package / "max_energy_range_uj").read_text())
        except (OSError, ValueError):  # most systems let only root read it
            return None
        if value < self._last.get(package, 0):
            self._turns[package] += around
        self._last[package] = value
        return (self._turns[package] + value) / 1e6


def _gpus() -> list[Callable[[], float]]:
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, or a card too old to count
        return []
    return [lambda h=h: nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3 for h in handles]
