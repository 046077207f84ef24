"""Whether a DICOM file's elements fit into it.

GDCM takes as much memory as an element's length says, and fills it: one flipped bit in a length of
4 bytes is up to 2 GiB. So lengths are followed here first, without reading a value.

Source: DICOM PS3.5, sections 7.1 (elements), 7.5 (sequences) and 10 (transfer syntaxes).
"""

import mmap
import re
import struct
from pathlib import Path

_IMPLICIT = b"1.2.840.10008.1.2"
_BIG_ENDIAN = b"1.2.840.10008.1.2.2"
_DEFLATED = b"1.2.840.10008.1.2.1.99"

# Value representations whose length has 2 bytes, and those of which it has 4.
_SHORT = re.compile("AE|AS|AT|CS|DA|DS|DT|FL|FD|IS|LO|LT|PN|SH|SL|SS|ST|TM|UI|UL|US")
_LONG = re.compile("OB|OD|OF|OL|OV|OW|SQ|SV|UC|UN|UR|UT|UV")
_UNDEFINED = 0xFFFFFFFF
_ITEM = (0xFFFE, 0xE000)


def misfit(path: Path) -> str | None:
    """What does not fit in a DICOM file, or None; of other files "not DICOM".

    Files without the preamble, as old ones are, begin with an element.
    """
    with path.open("rb") as file:
        if not file.read(1):
            return "not DICOM"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[128:132] == b"DICM":
                return _walk(data, 132)
            return "not DICOM" if _walk(data, 0) else None


def _walk(data: mmap.mmap, place: int) -> str | None:
    syntax, order, size = b"", "<", len(data)
    meta = True
    while size - place >= 8:
        if meta and struct.unpack_from("<H", data, place)[0] != 2:
            meta = False
            if syntax == _DEFLATED:
                return "its elements are deflated, expected another transfer syntax"
            order = ">" if syntax == _BIG_ENDIAN else "<"
        begin = place
        group, element = struct.unpack_from(f"{order}HH", data, place)
        vr = data[place + 4 : place + 6].decode("latin-1")
        explicit = group != _ITEM[0] and (meta or syntax != _IMPLICIT)
        if explicit and _SHORT.fullmatch(vr):
            (length,) = struct.unpack_from(f"{order}H", data, place + 6)
            place += 8
        elif explicit and _LONG.fullmatch(vr):
            if size - place < 12:
                return f"its element at byte {begin} is cut"
            (length,) = struct.unpack_from(f"{order}I", data, place + 8)
            place += 12
        else:
            (length,) = struct.unpack_from(f"{order}I", data, place + 4)
            place += 8
        if length == _UNDEFINED:
            continue  # what is inside comes next
        if length > size - place:
            return f"its element at byte {begin} has {length} bytes, the file {size}"
        if (group, element) == (2, 0x0010):
            syntax = data[place : place + length].strip(b"\0 ")
        if (explicit and vr == "SQ") or ((group, element) == _ITEM and _begins(data, place)):
            continue
        place += length
    return None


def _begins(data: mmap.mmap, place: int) -> bool:
    """Whether an explicit element begins here: in items of sequences, not in those of pixels."""
    vr = data[place + 4 : place + 6].decode("latin-1")
    return bool(_SHORT.fullmatch(vr) or _LONG.fullmatch(vr))
