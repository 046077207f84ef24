"""What a program's exit code says, to shells and to the scripts in launch/: docs/exit-codes.md.

Of several processes launchers report the highest code, so that the order matters: that another
process is gone says less than any other code but bad input, which all processes find alike.
"""

DONE = 0
BAD_INPUT = 1  # a file, a value or a folder that the user can mend
BAD_FLAG = 2
LOST_PROCESS = 69  # sysexits.h's EX_UNAVAILABLE: another process of the job is gone
UNCAUGHT = 70  # EX_SOFTWARE: an error of ours
OUT_OF_MEMORY = 71  # EX_OSERR
FILE_SYSTEM = 74  # EX_IOERR: a full disk, a file server that went away
PREEMPTED = 75  # EX_TEMPFAIL: work is saved or there was none; start it again
WATCHDOG = 124  # as of timeout(1): no step ended in time
INTERRUPTED = 130  # as shells say of Ctrl-C

CLOSED_OUTPUT = 141  # as shells say of SIGPIPE: nobody reads what is printed

# What the kernel or a launcher did to a process, as shells report it: 128 and the signal's number.
ABORTED, KILLED, SEGMENTATION_FAULT, TERMINATED = 134, 137, 139, 143

# What is queued again, and how often: `restarts` is what SLURM counts of a job for any reason.
MOST_RESTARTS = 3
REQUEUED_ALWAYS = (PREEMPTED,)
REQUEUED_AT_MOST = (
    LOST_PROCESS,
    UNCAUGHT,
    FILE_SYSTEM,
    WATCHDOG,
    ABORTED,
    KILLED,
    SEGMENTATION_FAULT,
    TERMINATED,
)


def requeued(code: int, restarts: int = 0) -> bool:
    """Whether what ended with `code` is worth starting again after so many restarts."""
    return code in REQUEUED_ALWAYS or (code in REQUEUED_AT_MOST and restarts < MOST_RESTARTS)
