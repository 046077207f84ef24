"""The one exception that programs turn into a line for the user."""


class InputError(ValueError):
    """Bad input: a file, flag or value that the user can mend.

    The message is one line that names the file or flag, what was found, what was expected and
    what to do. Programs print it without a traceback.
    """
