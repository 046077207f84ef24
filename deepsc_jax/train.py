"""Train a network, in the stages of its model.

    deepsc train --flagfile=configs/deepsc.flags --data_dir=DIR --workdir=DIR

DIR of --data_dir is what `deepsc prepare` wrote.

On many hosts, started once per process (launch/ has scripts): the folders are on a disk that all of
them see, process 0 writes and prints, and where one process dies all end. On SIGTERM or Ctrl-C the
job saves at a step that all processes agree on and exits with 75 or 130 (docs/exit-codes.md).
However it ended, the same command goes on from the last checkpoint, to the same parameters bit by
bit, or on another number of devices or processes from the same step (see `data/pipeline.py` for the
data's order).
"""

from deepsc_jax.runtime.signals import signals

if __name__ == "__main__":
    signals.listen()  # before the imports below

from absl import flags

from deepsc_jax.models import registry
from deepsc_jax.runtime import entry, job_flags
from deepsc_jax.runtime.files import local_path

CONFIG = registry.config_flags()
MOST_SECONDS = 1e8


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    job_flags.define_flags()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string(
        "workdir", None, "Where checkpoints and logs go; a stopped run goes on.", required=True
    )
    flags.DEFINE_string("stage", "all", "Stage to run, by name; all runs them in order.")
    flags.DEFINE_list(
        "init_from",
        [],
        "Another run, its --workdir, or several, whose pre-trainings take the place of this one's: "
        "they are not trained here. Of the same model, network and preprocessing.",
    )
    flags.DEFINE_float(
        "step_timeout",
        3600.0,
        "Seconds after which a step that has not ended hangs: the job ends, to be started again; "
        "compiling and validating do not count. 0 waits for ever.",
    )
    flags.DEFINE_string(
        "profile_steps",
        None,
        "FIRST:LAST, such as 20:25: these steps of each stage are traced, for xprof, into "
        "WORKDIR/profile/STAGE.",
    )
    flags.register_validator(
        "profile_steps",
        lambda text: text is None or _steps(text) is not None,
        "expected FIRST:LAST, two whole numbers from 1 on, the first no greater",
    )
    flags.register_validator(
        "step_timeout",
        lambda seconds: 0 <= seconds <= MOST_SECONDS,  # and a number
        f"expected seconds, at most {MOST_SECONDS:g}; 0 waits for ever",
    )


def _steps(text: str) -> tuple[int, int] | None:
    """The first and the last step; None if `text` does not say them."""
    first, _, last = text.partition(":")
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit()):
        return None
    return (int(first), int(last)) if 1 <= int(first) <= int(last) else None


def main() -> int:
    """Run the stages that the flags name."""
    from deepsc_jax.training import job  # JAX, which a wrong flag need not wait for

    options, config = flags.FLAGS, CONFIG.config()
    asked = job.Asked(
        config,
        CONFIG.flags(config),
        options.stage,
        data_dir=local_path("data_dir", options.data_dir),
        workdir=local_path("workdir", options.workdir),
        step_timeout=options.step_timeout,
        init_from=tuple(local_path("init_from", run) for run in options.init_from),
        profile=None if options.profile_steps is None else _steps(options.profile_steps),
    )
    return job.run(asked, options.coordinator, options.num_processes, options.process_id)


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, CONFIG.parse, trains=True)


if __name__ == "__main__":
    run()
