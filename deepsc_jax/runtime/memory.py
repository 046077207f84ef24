"""What this process holds of memory."""

import pathlib
import resource
import sys


def held(resident: str) -> int:
    """Bytes of memory, now (`VmRSS`) or at most (`VmHWM`), that are no pages of files.

    Where the system does not tell, the most that was ever resident.
    """
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    whole, files = (int(fields[name].split()[0]) for name in (resident, "RssFile"))
    return (whole - files) * 1024


def reset_peak() -> None:
    """Have the high-water mark begin anew, where the system can."""
    if sys.platform != "linux":
        return
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:  # a container may forbid it
        print(f"the peak memory is that of the whole process: {error}", file=sys.stderr)


def peak_bytes() -> int:
    """Most memory in use at once: of the first device, where it tells, else of the host."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or held("VmHWM")
