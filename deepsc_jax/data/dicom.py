"""Reading a CT series from a folder of DICOM files, through SimpleITK and its GDCM.

Needs the `dicom` extra. SimpleITK's wheels decode the usual compressed transfer syntaxes, JPEG
Lossless among them. ITK fills in what a file does not record (positions, spacing: 1 mm), so each
file's tags are read here first, and slices are chosen, ordered and measured by them.
"""

import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float64

from deepsc_jax.data.dicom_elements import misfit
from deepsc_jax.data.itk import itk_errors, openable
from deepsc_jax.data.source import Doubt, Source, require_bounded, scanner_header
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.names import counted, shown
from deepsc_jax.runtime.types import Untyped

POSITION_TOLERANCE = 0.1
"""Largest deviation of one slice gap from the median gap, as a share of it. A missing slice doubles
a gap."""
COARSEST_ROUNDING_MM = 0.1
"""Scanners round positions to 0.01-0.1 mm, so a gap may be off by that much."""

_TAGS = {
    "uid": "0020|000e",
    "instance_uid": "0008|0018",
    "sop_class": "0008|0016",
    "modality": "0008|0060",
    "image_type": "0008|0008",
    "number": "0020|0013",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "pixel_spacing": "0028|0030",
    "step": "0018|0088",
    "thickness": "0018|0050",
    "slope": "0028|1053",
    "intercept": "0028|1052",
    "bits": "0028|0100",
    "signed": "0028|0103",
}
_MODALITIES = {"CT", "MR", "PT", "NM", "US", "CR", "DX", "OT", "SR", "SEG", "PR", "KO", "RTSTRUCT"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_EXPORT = "export the series afresh"
_FARTHEST_MM = 1e5  # of a slice from the scanner's origin; numbers beyond overflow later


@dataclass(frozen=True, eq=False)
class _Slice:
    """A DICOM file's tags, "" where it has none."""

    path: Path
    tags: dict[str, str]
    size: tuple[int, ...]
    components: int

    def numbers(self, tag: str) -> tuple[float, ...]:
        """The tag's numbers, () where it has none or text that is no number."""
        try:
            values = tuple(float(value) for value in self.tags[tag].split("\\"))
        except ValueError:
            return ()
        return values if all(map(math.isfinite, values)) else ()

    def is_ct_slice(self) -> bool:
        """Not a localizer, a screenshot or another modality."""
        return (
            self.tags["modality"] in ("", "CT")
            and "LOCALIZER" not in self.tags["image_type"].upper()
            and not self.tags["sop_class"].startswith(_SECONDARY_CAPTURE)
            and self.components == 1
        )


def read_series(folder: Path) -> Source:
    """Read the CT series with most slices in `folder` (subfolders are not searched).

    Slices are ordered by their position; rescale slope and intercept are applied, so voxels are HU.
    The slice axis of the affine is the mean step between slice positions, so a tilted gantry's
    shear is kept. What else lies in the folder is counted in a note.

    Raises:
        InputError: SimpleITK is absent; no DICOM series; not a CT; slices that differ in size,
            spacing or orientation, that are not evenly spaced, or of which some have no position.
            From `voxels()`: slices that cannot be decoded.
    """
    with itk_errors(folder, f"{_EXPORT}, one series to a folder") as sitk:
        slices, others = _read_tags(sitk, folder)
    series = defaultdict(list)
    for item in slices:
        if item.is_ct_slice():
            series[item.tags["uid"]].append(item)
    if not slices:
        raise InputError(
            f"{folder}: a folder without a DICOM series, expected one CT series: give the folder "
            "that holds the slices themselves, or an image file"
        )
    if not series:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(map(_kind, slices)).items())
        raise InputError(
            f"{folder}: no CT among its DICOM files (its modality is {kinds}), expected CT: "
            "give a CT series"
        )
    uid = max(series, key=lambda key: (len(series[key]), key))
    chosen = series[uid]
    rest = [item for item in slices if not (item.is_ct_slice() and item.tags["uid"] == uid)]
    notes = _left_out(chosen, rest, others)
    return _to_source(folder, chosen, notes)


def _read_tags(sitk: ModuleType, folder: Path) -> tuple[list[_Slice], list[Path]]:
    """The DICOM files of a folder, and the other files that lie there."""
    slices = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        files = [entry for entry in entries if not entry.name.startswith(".") and _is_file(entry)]
        paths = [Path(folder, entry.name) for entry in files if entry.name != "DICOMDIR"]
        misfits = {path: misfit(path) for path in paths if _may_be_dicom(path)}
    except OSError as error:
        place = error.filename or folder
        raise InputError(f"{place}: cannot be read ({error.strerror}): check it") from error
    damaged = [(path, what) for path, what in misfits.items() if what not in (None, "not DICOM")]
    if damaged:
        raise InputError(
            f"{damaged[0][0]}: damaged ({damaged[0][1]}), one of "
            f"{counted(len(damaged), 'such file')} among {len(paths)}, expected whole ones: copy "
            "the series afresh"
        )
    maybe = [path for path in misfits if misfits[path] is None]
    others = [path for path in paths if misfits.get(path, "not DICOM")]
    with openable(maybe) as names:
        for path, name in zip(maybe, names, strict=True):
            reader = sitk.ImageFileReader()
            reader.SetFileName(name)
            reader.SetImageIO("GDCMImageIO")
            try:
                reader.ReadImageInformation()
                tags = {name: _tag(reader, key) for name, key in _TAGS.items()}
            except (RuntimeError, UnicodeDecodeError):
                others.append(path)
                continue
            size = tuple(int(n) for n in reader.GetSize())
            slices.append(_Slice(path, tags, size, reader.GetNumberOfComponents()))
    return slices, others


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # a link to nowhere
        return False


def _may_be_dicom(path: Path) -> bool:
    if path.suffix.lower() in (".dcm", ".ima", ""):
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _tag(reader: Untyped, key: str) -> str:
    text = reader.GetMetaData(key) if reader.HasMetaDataKey(key) else ""
    return text.strip().strip("\0").strip()


def _kind(item: _Slice) -> str:
    kind = item.tags["modality"]
    kind = kind if kind in _MODALITIES else "another modality" if kind else "unknown"
    return kind if item.is_ct_slice() or kind != "CT" else "localizer or screenshot"


def _left_out(chosen: list[_Slice], rest: list[_Slice], others: list[Path]) -> tuple[str, ...]:
    """The note on which series is read and what else lies beside it; none where nothing does."""
    # It goes into stores and results: no text of a tag or a file's name, which may name a patient.
    counts = Counter((_kind(item), item.tags["uid"]) for item in rest)
    parts = [f"{counted(number, 'slice')} of {kind}" for (kind, _), number in counts.most_common(5)]
    if len(counts) > 5:
        parts.append(f"{len(counts) - 5} more series")
    if others:
        parts.append(f"{counted(len(others), 'file')} without a DICOM image")
    if not parts:
        return ()
    tags = chosen[0].tags
    return (
        f"its DICOM series …{shown(tags['uid'][-12:])} ({counted(len(chosen), 'slice')}) is read; "
        f"left out: {', '.join(parts)}",
    )


def _to_source(folder: Path, slices: list[_Slice], notes: tuple[str, ...]) -> Source:
    """Check, order and measure the slices of one series."""
    first = slices[0]
    if any(size != 1 for size in first.size[2:]) or len(first.size) < 2:
        raise InputError(
            f"{first.path}: holds an image of {' × '.join(map(str, first.size))} voxels, expected "
            "one slice: export the CT as one file per slice"
        )
    _require_alike(slices)
    columns, rows = first.size[:2]
    shape = (columns, rows, len(slices))
    require_bounded(folder, shape)
    pixel = first.numbers("pixel_spacing")
    if len(pixel) != 2 or min(pixel) <= 0:
        raise InputError(
            f"{first.path}: its PixelSpacing is {_listed(pixel)}, expected two positive numbers: "
            f"{_EXPORT}"
        )
    doubts: list[Doubt] = []
    axes = first.numbers("orientation")
    if len(axes) != 6:
        axes = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        doubts.append(_doubt("ImageOrientationPatient", "axial slices of a supine patient"))
    right, down = np.array(axes[:3]), np.array(axes[3:])
    normal = np.cross(right, down)
    if not np.isclose(np.linalg.norm(normal), 1, atol=0.01):
        raise InputError(
            f"{first.path}: its ImageOrientationPatient is {axes}, expected two unit vectors at a "
            f"right angle: {_EXPORT}"
        )
    placed = [item for item in slices if len(item.numbers("position")) == 3]
    if placed:
        ordered, step = _placed(folder, slices, placed, normal)
        origin = np.array(ordered[0].numbers("position"))
    else:
        ordered, length = _numbered(folder, slices)
        origin, step = np.zeros(3), length * normal
        doubts.append(
            _doubt(
                "ImagePositionPatient",
                f"slices in the order of their numbers, upwards, {length:g} mm apart",
            )
        )
    affine = np.eye(4)
    # Row spacing is written first, and lies along the columns' direction.
    affine[:3, :3] = np.stack([right * pixel[1], down * pixel[0], step], axis=1)
    affine[:3, 3] = origin
    header, affine = scanner_header(folder, _LPS_TO_RAS @ affine, shape)
    bits = first.numbers("bits")
    return Source(
        shape=shape,
        slope=1.0,
        intercept=0.0,
        affine=affine,
        header=header,
        voxels=lambda: _decode(folder, ordered),
        packed=sum(item.path.stat().st_size for item in ordered),
        unpacked=math.prod(shape) * (int(bits[0]) // 8 if bits and bits[0] > 8 else 1),
        notes=notes + _scaling_note(folder, slices),
        doubts=tuple(doubts),
        files=tuple(item.path for item in ordered),
    )


def _doubt(tag: str, taken: str) -> Doubt:
    return Doubt("voxels", f"its slices have no {tag}; taken would be {taken}", _EXPORT)


def _require_alike(slices: list[_Slice]) -> None:
    """Raise InputError where a slice's size, spacing or orientation is not the first one's."""
    first = slices[0]
    for item in slices[1:]:
        for name, mine, its in (
            ("image", first.size[:2], item.size[:2]),
            ("PixelSpacing", first.numbers("pixel_spacing"), item.numbers("pixel_spacing")),
            ("orientation", first.numbers("orientation"), item.numbers("orientation")),
        ):
            if len(mine) != len(its) or not np.allclose(mine, its, rtol=1e-3, atol=1e-3):
                raise InputError(
                    f"{item.path}: its {name} is {_listed(its)}, that of {first.path.name} "
                    f"{_listed(mine)}, expected a series of like slices: {_EXPORT}, one series to "
                    "a folder"
                )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "absent or no number"


def _placed(
    folder: Path, slices: list[_Slice], placed: list[_Slice], normal: np.ndarray
) -> tuple[list[_Slice], Float64[np.ndarray, "3"]]:
    """The slices in the order of their positions, and the mean step in mm (DICOM's LPS)."""
    if len(placed) < len(slices):
        without = [item.path.name for item in slices if len(item.numbers("position")) != 3]
        raise InputError(
            f"{folder}: {len(without)} of {len(slices)} slices ({without[0]}) have no "
            f"ImagePositionPatient that can be read, expected three numbers in each: {_EXPORT}"
        )
    ordered = sorted(slices, key=lambda item: (float(item.numbers("position") @ normal), item.path))
    positions = np.array([item.numbers("position") for item in ordered])
    if len(ordered) < 2:
        return ordered, normal
    if np.abs(positions).max() > _FARTHEST_MM:
        raise InputError(
            f"{folder}: its slices lie up to {np.abs(positions).max():g} mm from the origin, "
            f"expected at most {_FARTHEST_MM:g}: {_EXPORT}"
        )
    gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    if (gaps == 0).any():
        index = int(np.argmin(gaps))
        raise InputError(
            f"{folder}: {ordered[index].path.name} and {ordered[index + 1].path.name} lie at one "
            "position, expected one file for each slice: remove the copy, or export one series to "
            "a folder"
        )
    median = float(np.median(gaps))
    tolerance = max(POSITION_TOLERANCE * median, min(_rounding_mm(ordered), median / 2))
    if np.abs(gaps - median).max() > tolerance:
        index = int(np.argmax(np.abs(gaps - median)))
        raise InputError(
            f"{folder}: its slices lie {gaps.min():.2f} to {gaps.max():.2f} mm apart (the latter "
            f"beside {ordered[index].path.name}), expected even steps: a slice is missing or two "
            f"series are mixed; {_EXPORT}"
        )
    return ordered, (positions[-1] - positions[0]) / (len(ordered) - 1)


def _rounding_mm(slices: list[_Slice]) -> float:
    """By how much a gap may be off because positions are written with few decimals."""
    texts = [text for item in slices for text in item.tags["position"].split("\\")]
    if any("e" in text.lower() for text in texts):
        return 0.0
    decimals = max(len(text.strip().partition(".")[2]) for text in texts)
    return min(10.0**-decimals, COARSEST_ROUNDING_MM) * 1.01


def _numbered(folder: Path, slices: list[_Slice]) -> tuple[list[_Slice], float]:
    """The slices in the order of their numbers, and the distance that they record in mm."""
    numbers = [item.numbers("number") for item in slices]
    if any(len(number) != 1 for number in numbers) or len(set(numbers)) < len(slices):
        raise InputError(
            f"{folder}: its slices have no ImagePositionPatient, and no InstanceNumber that orders "
            f"them: {_EXPORT}"
        )
    for tag in ("step", "thickness"):
        lengths = {item.numbers(tag) for item in slices}
        if len(lengths) == 1 and len(length := lengths.pop()) == 1 and length[0] > 0:
            ordered = [
                item for _, item in sorted(zip(numbers, slices, strict=True), key=itemgetter(0))
            ]
            return ordered, length[0]
    raise InputError(
        f"{folder}: its slices have no ImagePositionPatient, and neither one SpacingBetweenSlices "
        f"nor one SliceThickness, expected their distance: {_EXPORT}"
    )


def _scaling_note(folder: Path, slices: list[_Slice]) -> tuple[str, ...]:
    """What is said of slices without a rescale slope and intercept; some of them are refused.

    GDCM takes 1 for a slope, and 0 for an intercept, that it cannot read, and 1 for a slope of 0.
    """
    without = []
    for item in slices:
        slope, intercept = item.numbers("slope"), item.numbers("intercept")
        if not (item.tags["slope"] or item.tags["intercept"]):
            without.append(item)
        elif len(slope) != 1 or len(intercept) != 1 or slope[0] == 0:
            raise InputError(
                f"{item.path}: its RescaleSlope is {_listed(slope)}, its RescaleIntercept "
                f"{_listed(intercept)}, expected a number other than 0 and a number: {_EXPORT}"
            )
    if without and len(without) < len(slices):
        raise InputError(
            f"{folder}: {len(without)} of {len(slices)} slices ({without[0].path.name}) have no "
            f"RescaleSlope and RescaleIntercept, expected all or none: {_EXPORT}"
        )
    if without:
        return ("its slices have no RescaleSlope and RescaleIntercept: voxels are taken as stored",)
    return ()


def _decode(folder: Path, slices: list[_Slice]) -> np.ndarray:
    paths = [item.path for item in slices]
    with itk_errors(folder, f"{_EXPORT}, alone") as sitk, openable(paths) as names:
        reader = sitk.ImageSeriesReader()
        reader.SetImageIO("GDCMImageIO")  # as for the tags: ITK does not know all files by itself
        reader.SetFileNames(names)
        kinds = ("slope", "intercept", "bits", "signed")
        if any(len({item.numbers(kind) for item in slices}) > 1 for kind in kinds):
            reader.SetOutputPixelType(sitk.sitkFloat32)  # else the first slice's type is all's
        array = sitk.GetArrayFromImage(reader.Execute())
    expected = (len(slices), *slices[0].size[1::-1])
    if array.shape != expected:
        raise InputError(f"{folder}: it holds {array.shape} voxels, not {expected}: {_EXPORT}")
    return array.T
