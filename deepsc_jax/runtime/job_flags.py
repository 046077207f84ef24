"""The flags by which the processes of one job find each other; without JAX."""

from absl import flags

from deepsc_jax.runtime.types import JsonObject


def define_flags() -> None:
    """Define the flags by which the processes of one job find each other."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "host:port at which process 0 listens for the others. Not needed under SLURM, Open MPI, "
        "Kubernetes and on Cloud TPU, where JAX finds out, nor for one process.",
    )
    flags.DEFINE_integer("num_processes", None, "Processes of the job.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)

    @flags.multi_flags_validator(
        ["coordinator", "num_processes", "process_id"],
        "--coordinator=HOST:PORT, --num_processes and --process_id, below it, belong together",
    )
    def _(values: JsonObject) -> bool:
        address, count, index = values.values()
        if address is None:
            return count is None and index is None
        port = address.rpartition(":")[2]
        known = port.isdecimal() and 0 < int(port) < 2**16
        return known and None not in (count, index) and index < count
