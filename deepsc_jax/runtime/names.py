"""How a name of a user's file, scan or class is shown: the same everywhere, and never an error.

A file name is bytes. It may hold a newline, a terminal's control sequences, marks that turn the
direction of writing round, or bytes that are no text at all.
"""

import contextlib
import io
import os
import sys
import unicodedata

_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the start of a formula; the wide forms too, in Japanese settings."""


def shown(name: str | bytes | os.PathLike[str]) -> str:
    r"""A name, or a message with names in it, as one line of text that any UTF-8 output takes.

    What cannot be seen is escaped: control characters, line breaks and marks of direction as `\n`,
    `\x1b` or `\u202e`; a byte that is no text as `\xe9`. All else stays as it is, backslashes and
    earlier escapes too, so what is shown already is not changed by showing it again.
    """
    text = os.fsdecode(name) if isinstance(name, bytes | os.PathLike) else name
    return text if text.isprintable() else "".join(map(_visible, text))


def cell(name: str | os.PathLike[str]) -> str:
    """A name as a cell of a table: shown, and with an apostrophe before what would be a formula."""
    text = shown(name)
    return f"'{text}" if text.startswith(_FORMULA) else text


def counted(number: int, noun: str) -> str:
    """How many there are of something: `1 file`, `2 files`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_any_name() -> None:
    """Have standard output and error escape what their encoding lacks, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a descriptor that became a pipe cannot be asked
                stream.reconfigure(errors="backslashreplace")


def _visible(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # PEP 383: the byte 0x80..0xff of an undecodable name
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
