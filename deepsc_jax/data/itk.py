"""NRRD and MetaImage files, through SimpleITK (the extra `dicom`).

ITK fills in what such a header leaves out (1 mm, axes to the left, backward and up) and takes the
memory that it asks for. So the header's text is read here too: what is missing in it is said, and
what it promises is held against what the file has, before ITK reads a voxel.
"""

import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from deepsc_jax.data.source import Doubt, Source, require_bounded, require_regular, scanner_header
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import Untyped

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")

_HEADER_BYTES = 1 << 20
_CHUNK = 1 << 20
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SPACES = {"left-posterior-superior", "right-anterior-superior", "left-anterior-superior"}
_SPACES |= {"lps", "ras", "las"}

_UNORIENTED = (
    "its header records no orientation: its axes are taken to run left, backward and up, as ITK "
    "does"
)
_UNMEASURED = Doubt(
    "voxels", "its header records no voxel size; taken would be 1 mm", "write it into the header"
)

Fields = dict[str, str]


def simpleitk(path: Path) -> ModuleType:
    """The module SimpleITK, to read `path`.

    Raises:
        InputError: it is not installed; the line says how to.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(
            f"{path}: DICOM, NRRD and MetaImage need SimpleITK, which is not installed: "
            "pip install 'deepsc_jax[dicom]'"
        ) from error
    return SimpleITK


@contextmanager
def itk_errors(path: Path, advice: str) -> Iterator[ModuleType]:
    """SimpleITK without its warnings on stderr; what it raises becomes one line that ends so."""
    sitk = simpleitk(path)
    showed_warnings = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield sitk
    except RuntimeError as error:
        # The last line of an ITK message is the one that says what happened.
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        reason = re.sub(r"(ITK ERROR: )?\w+\(0x\w+\): ", "", lines[-1]) if lines else "no reason"
        raise InputError(f"{path}: cannot be read ({reason[:200]}): {advice}") from error
    except MemoryError as error:
        raise InputError(
            f"{path}: too large for this machine's memory: use another, or crop the scan"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(showed_warnings)


@contextmanager
def openable(paths: Sequence[Path]) -> Iterator[list[str]]:
    """The paths as SimpleITK can take them: a name that is not UTF-8 would end the process.

    Where there is one, links of plain names stand for all of them.
    """
    try:
        for path in paths:
            os.fspath(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            ends = [path.suffix if path.suffix.isascii() else "" for path in paths]
            links = [Path(folder, f"{index}{end}") for index, end in enumerate(ends)]
            for link, path in zip(links, paths, strict=True):
                link.symlink_to(path.absolute())
            yield [os.fspath(link) for link in links]
    else:
        yield [os.fspath(path) for path in paths]


def read_itk(path: Path) -> Source:
    """Read a 3D NRRD (.nrrd, .nhdr) or MetaImage file (.mha, .mhd), its data attached or beside it.

    Trailing axes of length 1 are dropped. Of the voxels nothing is read before `voxels()`.

    Raises:
        InputError: SimpleITK is absent; missing, unreadable, empty, truncated, damaged or foreign
            file, or no regular file; not 3D, or too large; several numbers in a voxel; another
            unit than mm; an encoding other than raw or gzip; a scaling, which ITK does not apply.
    """
    require_regular(path)
    advice = "copy the file afresh, or convert it to NIfTI"
    try:
        fields, begins = _header(path)
        data, begins = _data_file(path, fields, begins)
        held = _size(path, data) - begins
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read ({error}): {advice}") from error
    notes, doubts = (_meta_geometry if _is_meta(path) else _nrrd_geometry)(path, fields)
    with itk_errors(path, advice) as sitk, _reader(sitk, path, attached=data == path) as reader:
        reader.ReadImageInformation()
        shape = tuple(int(n) for n in reader.GetSize())
        components = reader.GetNumberOfComponents()
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        axes = len(shape)
        direction = np.asarray(reader.GetDirection()).reshape(axes, axes)[:3, :3]
        spacing, origin = reader.GetSpacing()[:3], reader.GetOrigin()[:3]
    if axes < 3 or any(n != 1 for n in shape[3:]):
        raise InputError(
            f"{path}: a {axes}D volume of shape {shape}, expected 3D: give one volume, split from "
            "the series"
        )
    x, y, z = shape[:3]
    require_bounded(path, (x, y, z))
    if components != 1 or "complex" in kind or "vector" in kind:
        raise InputError(
            f"{path}: its voxels are of type {kind} with {components} numbers, expected one number "
            "in each: write it as int16"
        )
    itemsize = _itemsize(kind)
    unpacked, slice_bytes = x * y * z * itemsize, x * y * itemsize
    gzipped = _encoding(path, fields) == "gzip"
    if not gzipped:
        _require_held(path, unpacked, held, slice_bytes)

    def voxels() -> np.ndarray:
        if gzipped:
            held = _unpacks_to(path, data, begins, unpacked + slice_bytes)
            _require_held(path, unpacked, held, slice_bytes)
        with itk_errors(path, advice) as sitk, _reader(sitk, path, attached=data == path) as reader:
            array = sitk.GetArrayFromImage(reader.Execute())
        return array.reshape(z, y, x).T

    affine = np.eye(4)
    affine[:3, :3] = direction * np.asarray(spacing)
    affine[:3, 3] = origin
    header, affine = scanner_header(path, _LPS_TO_RAS @ affine, (x, y, z))
    return Source(
        shape=(x, y, z),
        slope=1.0,
        intercept=0.0,
        affine=affine,
        header=header,
        voxels=voxels,
        packed=held + begins,
        unpacked=unpacked,
        notes=notes,
        doubts=doubts,
    )


@contextmanager
def _reader(sitk: ModuleType, path: Path, *, attached: bool) -> Iterator[Untyped]:
    with openable([path]) as (name,):
        if name != os.fspath(path) and not attached:
            raise InputError(f"{path}: its name is not UTF-8: rename it and the file of its voxels")
        reader = sitk.ImageFileReader()
        reader.SetFileName(name)
        reader.SetImageIO("MetaImageIO" if _is_meta(path) else "NrrdImageIO")
        yield reader


def _is_meta(path: Path) -> bool:
    return path.suffix.lower() in (".mha", ".mhd")


def _header(path: Path) -> tuple[Fields, int]:
    """The fields of the header by their names in small letters, and the byte that follows it."""
    with open(path, "rb") as file:
        text = file.read(_HEADER_BYTES)
    separator = b"=" if _is_meta(path) else b":"
    if not _is_meta(path) and not text.startswith(b"NRRD"):
        raise InputError(f"{path}: not an NRRD file by its content: convert it to NIfTI first")
    fields, place = {}, 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        line = line.strip()
        if not line and not _is_meta(path):
            return fields, place
        name, separated, value = line.partition(separator)
        if separated and not line.startswith(b"#"):
            key = " ".join(name.decode("latin-1").lower().split())
            fields[key] = value.lstrip(b"=").decode("utf-8", "surrogateescape").strip()
        if _is_meta(path) and "elementdatafile" in fields:
            return fields, place
    if _is_meta(path):
        raise InputError(
            f"{path}: not a MetaImage file by its content (no ElementDataFile): convert it to "
            "NIfTI first"
        )
    return fields, len(text)


def _data_file(path: Path, fields: Fields, begins: int) -> tuple[Path, int]:
    """The file that holds the voxels, and the byte of it where they may begin."""
    if _is_meta(path):
        name = fields["elementdatafile"]
        attached = name.lower() == "local"
    else:
        name = fields.get("data file", fields.get("datafile", ""))
        attached = not name
    if attached:
        return path, begins
    if name.upper().startswith("LIST") or "%" in name:
        raise InputError(
            f"{path}: its voxels lie in several files ({name}), expected one: convert it to NIfTI"
        )
    return path.parent / name, 0


def _size(path: Path, data: Path) -> int:
    if data == path:
        return require_regular(path)
    try:
        return require_regular(data)
    except InputError as error:
        raise InputError(f"{path}: its voxels: {error}") from error


def _encoding(path: Path, fields: Fields) -> str:
    if _is_meta(path):
        text = fields.get("binarydata", "false").lower() != "true"
        packed = fields.get("compresseddata", "false").lower() == "true"
        encoding = "text" if text else "gzip" if packed else "raw"
    else:
        encoding = fields.get("encoding", "none").lower()
        encoding = "gzip" if encoding == "gz" else encoding
    if encoding not in ("raw", "gzip"):
        raise InputError(
            f"{path}: its voxels are encoded as {encoding}, expected raw or gzip: write it afresh"
        )
    return encoding


def _itemsize(kind: str) -> int:
    """Bytes of ITK's pixel type, such as '16-bit signed integer'."""
    bits = kind.split("-")[0]
    return int(bits) // 8 if bits.isdecimal() else 8


def _require_held(path: Path, promised: int, held: int, slice_bytes: int) -> None:
    if held < promised:
        raise InputError(
            f"{path}: truncated or damaged (its header promises {promised} bytes, it holds "
            f"{held}), expected a whole file: copy it afresh"
        )
    if held - promised >= slice_bytes:
        raise InputError(
            f"{path}: more voxels follow the {promised} bytes that its header promises, expected "
            "the file's end: its dimensions or their type are wrong; correct the header"
        )


def _unpacks_to(path: Path, data: Path, begins: int, most: int) -> int:
    """Bytes that the compressed data unpack to, counted to `most`; its checksum is compared."""
    unpacker, count = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32), 0
    try:
        with open(data, "rb") as file:
            file.seek(begins)
            while count < most and not unpacker.eof and (chunk := file.read(_CHUNK)):
                while chunk and count < most:
                    count += len(unpacker.decompress(chunk, _CHUNK))
                    chunk = unpacker.unconsumed_tail
    except (OSError, zlib.error) as error:
        raise InputError(
            f"{path}: truncated or damaged ({error}), expected a whole file: copy it afresh"
        ) from error
    return count


def _nrrd_geometry(path: Path, fields: Fields) -> tuple[tuple[str, ...], tuple[Doubt, ...]]:
    """Notes and doubts about what ITK fills in."""
    notes, doubts = [], []
    space = fields.get("space", "").lower()
    if space and space not in _SPACES:
        raise InputError(
            f"{path}: its space is {space}, expected left-posterior-superior or another of "
            f"{', '.join(sorted(_SPACES))}: ITK would take it for the first; convert it to NIfTI"
        )
    units = {unit for unit in fields.get("space units", "").replace('"', " ").split() if unit}
    if units - {"mm", "millimeter", "millimeters"}:
        raise InputError(
            f"{path}: its space units are {', '.join(sorted(units))}, expected mm: ITK reads none; "
            "write its geometry in mm"
        )
    if "space directions" not in fields:
        notes.append(_UNORIENTED)
        sizes = fields.get("spacings", "").split()
        if not sizes or not all(map(math.isfinite, map(_number, sizes))):
            doubts.append(_UNMEASURED)
    else:
        if re.search(r"none|nan", fields["space directions"], re.I):  # ITK: 1 mm along that axis
            doubts.append(_UNMEASURED)
        if not space:
            notes.append(_UNORIENTED)
    return tuple(notes), tuple(doubts)


def _meta_geometry(path: Path, fields: Fields) -> tuple[tuple[str, ...], tuple[Doubt, ...]]:
    """Notes and doubts about what ITK fills in."""
    for name, neutral in (("slope", 1.0), ("offset", 0.0)):
        value = fields.get(f"elementtointensityfunction{name}", str(neutral))
        if _number(value) != neutral:
            raise InputError(
                f"{path}: its header scales voxels (ElementToIntensityFunction{name.capitalize()} "
                f"= {value}), which ITK does not: write its voxels in HU"
            )
    unit = fields.get("distanceunits", "mm")
    if unit not in ("mm", "?"):
        raise InputError(
            f"{path}: its DistanceUnits are {unit}, expected mm: ITK reads none; write its "
            "geometry in mm"
        )
    for name in ("elementspacing", "elementsize"):
        sizes = [_number(size) for size in fields.get(name, "1 1 1").split()]
        if len(sizes) < 3 or not all(math.isfinite(size) and size > 0 for size in sizes):
            raise InputError(
                f"{path}: its {name.replace('element', 'Element').replace('s', 'S', 1)} is "
                f"{fields[name]!r}, expected a positive number for each axis: "
                "correct the header"
            )
    notes, doubts = [], []
    if not {"transformmatrix", "rotation", "orientation"} & set(fields):
        notes.append(_UNORIENTED)
    sizes = [fields[name] for name in ("elementspacing", "elementsize") if name in fields]
    if not sizes:
        doubts.append(_UNMEASURED)
    elif len({tuple(map(_number, size.split())) for size in sizes}) > 1:
        notes.append(
            f"its ElementSpacing is {sizes[0]}, its ElementSize {sizes[1]}: the first is read, as "
            "ITK does"
        )
    return tuple(notes), tuple(doubts)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
