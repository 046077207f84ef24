"""The one exception that programs turn into a line for the user."""


class InputError(ValueError):
    """Bad input: a file, flag or value that the user can mend.

    The message is one line that names the file or flag, what was found, what was expected and
    what to do. Programs print it without a traceback.
    """


class AbortError(InputError):
    """What ends all jobs of many, since no other could do better."""


class FileSystemError(AbortError):
    """A full disk, or a disk or file server that fails: the exit code is FILE_SYSTEM."""
