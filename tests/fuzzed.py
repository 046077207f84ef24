"""Damaged scan files, drawn from a seed, and what becomes of each.

    python tests/fuzzed.py KIND N [SEED]

KIND is nifti, itk (NRRD and MetaImage) or dicom. Each file is loaded in a process of its own, so
that a crash, a hang and the memory it takes are seen.
"""

import collections
import functools
import gzip
import io
import json
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from scan_files import elements, write_series

from deepsc_jax.data.scans import load_scan
from deepsc_jax.runtime.errors import InputError

SHAPE = (64, 56, 40)
MOST_SECONDS = 60
MOST_BYTES = 16 << 30  # of address space: more, and the case counts as an uncaught error

Edit = Callable[[np.random.Generator, bytearray], bytes]


def scan_voxels(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Something that a CT's checks let pass: air, tissue, noise."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1024, -800, shape).astype(np.int16)
    voxels[8:-8, 8:-8] += 850
    return voxels


def flipped(rng: np.random.Generator, data: bytearray, low: int, high: int, most: int = 4) -> bytes:
    """With 1 to `most` bits other between two bytes."""
    for place in rng.integers(low, min(high, len(data)), rng.integers(1, most + 1)):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _field(rng: np.random.Generator, data: bytearray) -> bytes:
    """With one header field, or an entry of it, that no one would write."""
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    name = str(rng.choice([n for n in header.keys() if header[n].dtype.kind in "iuf"]))  # noqa: SIM118
    value = float(
        rng.choice([0, -1, 1, 2, 7, 1000, 32767, -32768, 1e6, 1e30, -1e30, np.nan, np.inf])
    )
    kind = header[name].dtype
    if kind.kind != "f":
        limits = np.iinfo(kind.str)
        value = 0 if np.isnan(value) else int(np.clip(value, limits.min, limits.max))
    if header[name].ndim:
        header[name][rng.integers(header[name].size)] = value
    else:
        header[name] = value
    data[:348] = header.binaryblock
    return bytes(data)


def _slices_times(rng: np.random.Generator, data: bytearray) -> bytes:
    """With k times as many, or as thick, slices in the header."""
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    if rng.random() < 0.5:
        header["dim"][rng.integers(1, 4)] = int(rng.choice([800, 4000, 32000]))
    else:
        factor = 10.0 ** float(rng.integers(1, 7))
        header["pixdim"][3] *= factor
        header["srow_z"][2] *= factor
    data[:348] = header.binaryblock
    return bytes(data)


def _swapped_fields(rng: np.random.Generator, data: bytearray) -> bytes:
    """With two stretches of the header exchanged."""
    a, b = (4 * int(n) for n in rng.choice(86, 2, replace=False))
    data[a : a + 4], data[b : b + 4] = data[b : b + 4], data[a : a + 4]
    return bytes(data)


def _other_endian(rng: np.random.Generator, data: bytearray) -> bytes:
    header = nib.Nifti1Header(bytes(data[:348]), check=False).as_byteswapped()
    data[:348] = header.binaryblock
    if rng.random() < 0.5:  # the first field alone
        data[4:348] = data[4:348][::-1]
    return bytes(data)


def _cut(rng: np.random.Generator, data: bytearray) -> bytes:
    return bytes(data[: rng.integers(0, len(data))])


def _noise(rng: np.random.Generator, data: bytearray) -> bytes:
    place, size = int(rng.integers(0, len(data))), int(rng.integers(1, 400))
    data[place : place + size] = rng.bytes(size)
    return bytes(data)


NIFTI_EDITS: dict[str, Edit] = {
    "bits of the header": lambda rng, data: flipped(rng, data, 0, 348),
    "bits of the voxels": lambda rng, data: flipped(rng, data, 352, len(data), 40),
    "a field": _field,
    "slices times k": _slices_times,
    "fields exchanged": _swapped_fields,
    "another byte order": _other_endian,
    "cut": _cut,
    "noise": _noise,
    "more than is said": lambda rng, data: bytes(data) + rng.bytes(int(rng.integers(1, 1 << 18))),
}
GZIP_EDITS: dict[str, Edit] = {
    "bits of the stream": lambda rng, data: flipped(rng, data, 0, len(data)),
    "stream cut": _cut,
    "noise in the stream": _noise,
    "a bomb after it": lambda _, data: bytes(data) + _bomb(),
    "two streams": lambda _, data: bytes(data) * 2,
}


@functools.cache
def _bomb() -> bytes:
    return gzip.compress(bytes(1 << 28), 1)


def nifti_files(count: int, seed: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Damaged .nii and .nii.gz files."""
    stream = io.BytesIO()
    image = nib.Nifti1Image(scan_voxels(), np.diag([-5.0, -5, 6, 1]))
    image.header.set_xyzt_units("mm")
    image.to_stream(stream)
    whole = stream.getvalue()
    rng = np.random.default_rng(seed)
    kinds = [*NIFTI_EDITS, *GZIP_EDITS]
    for index in range(count):
        kind = kinds[index % len(kinds)]
        packed = kind in GZIP_EDITS or bool(rng.random() < 0.4)
        if kind in NIFTI_EDITS:
            data = NIFTI_EDITS[kind](rng, bytearray(whole))
            data = gzip.compress(data, 1) if packed else data
        else:
            data = GZIP_EDITS[kind](rng, bytearray(gzip.compress(whole, 1)))
        path = folder / ("case.nii.gz" if packed else "case.nii")
        path.write_bytes(data)
        yield kind, path


def itk_files(count: int, seed: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Damaged .nrrd and .mha files."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(scan_voxels().T))
    image.SetSpacing((5, 5, 6))
    wholes = []
    for name in ("a.nrrd", "a.mha"):
        for packed in (False, True):
            SimpleITK.WriteImage(image, str(folder / name), useCompression=packed)
            wholes.append((name, (folder / name).read_bytes()))
            (folder / name).unlink()
    rng = np.random.default_rng(seed)
    edits: dict[str, Edit] = {
        "bits of the header": lambda rng, data: flipped(rng, data, 0, 400),
        "bits of the voxels": lambda rng, data: flipped(rng, data, 420, len(data), 40),
        "a number of the header": _header_number,
        "a line left out": _header_line,
        "cut": _cut,
        "noise": _noise,
    }
    for index in range(count):
        name, whole = wholes[index % len(wholes)]
        kind = list(edits)[index // len(wholes) % len(edits)]
        (folder / name).write_bytes(edits[kind](rng, bytearray(whole)))
        yield kind, folder / name
        (folder / name).unlink()


def _header_number(rng: np.random.Generator, data: bytearray) -> bytes:
    head, _, rest = bytes(data).partition(b"ElementDataFile" if data[:1] == b"O" else b"\n\n")
    mark = bytes(data)[len(head) : len(data) - len(rest)]
    places = [i for i, byte in enumerate(head) if chr(byte).isdigit() and i > 8]
    place = int(rng.choice(places))
    new = rng.choice([b"0", b"-1", b"99999", b"1e30", b"nan", b"9", b"4294967296", b"x", b""])
    return head[:place] + bytes(new) + head[place + 1 :] + mark + rest


def _header_line(rng: np.random.Generator, data: bytearray) -> bytes:
    lines = bytes(data).split(b"\n", 12)
    del lines[int(rng.integers(1, 12))]
    return b"\n".join(lines)


def dicom_folders(count: int, seed: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Folders of slices of which one, or all, are damaged or do not belong."""
    base = folder / "base"
    write_series(base, np.ascontiguousarray(scan_voxels((48, 48, 12)).T), uid="1.2.3.4")
    foreign = folder / "foreign"
    write_series(foreign, np.full((3, 20, 30), -900, np.int16), uid="1.2.3.4", modality="PT")
    wholes = {path.name: path.read_bytes() for path in sorted(base.iterdir())}
    foreigners = [path.read_bytes() for path in sorted(foreign.iterdir())]
    rng = np.random.default_rng(seed)
    kinds = list(DICOM_EDITS)
    for index in range(count):
        kind = kinds[index % len(kinds)]
        case = Path(tempfile.mkdtemp(dir=folder))
        everywhere = bool(rng.random() < 0.25)
        chosen = list(wholes) if everywhere else [str(rng.choice(list(wholes)))]
        state = rng.bit_generator.state
        for name, data in wholes.items():
            if name in chosen:
                rng.bit_generator.state = state  # alike in all slices
                data = DICOM_EDITS[kind](rng, bytearray(data))
            (case / name).write_bytes(data)
        if kind == "mixed":
            for number, data in enumerate(foreigners):
                (case / f"foreign{number}.dcm").write_bytes(data)
        yield kind, case
        for path in case.iterdir():
            path.unlink()
        case.rmdir()


def _element(rng: np.random.Generator, data: bytearray) -> tuple[int, int]:
    """Beginning and end of one of the elements before the pixels."""
    _, begin, end = elements(bytes(data))[:-1][int(rng.integers(len(elements(bytes(data))) - 1))]
    return begin, end


def _element_removed(rng: np.random.Generator, data: bytearray) -> bytes:
    begin, end = _element(rng, data)
    return bytes(data[:begin] + data[end:])


def _element_twice(rng: np.random.Generator, data: bytearray) -> bytes:
    begin, end = _element(rng, data)
    return bytes(data[:end] + data[begin:end] + data[end:])


def _element_garbled(rng: np.random.Generator, data: bytearray) -> bytes:
    begin, end = _element(rng, data)
    texts = [
        b"",
        b"0",
        b"-1",
        b"nan",
        b"1e30",
        b"inf\\inf\\inf ",
        b"\xff\xfe\x00\x1b",
        b"CT\\MR\\PT",
    ]
    texts += [b"1\\2\\3\\4\\5\\6\\7 ", rng.bytes(int(rng.integers(1, 12))) * 2]
    value = texts[int(rng.integers(len(texts)))]
    value += b" " * (len(value) % 2)
    return bytes(data[: begin + 4] + struct.pack("<I", len(value)) + value + data[end:])


def _element_length(rng: np.random.Generator, data: bytearray) -> bytes:
    begin, _ = _element(rng, data)
    lengths = [0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 1 << 20, int(rng.integers(1, 5000))]
    struct.pack_into("<I", data, begin + 4, lengths[int(rng.integers(len(lengths)))])
    return bytes(data)


DICOM_EDITS: dict[str, Edit] = {
    "bits of the tags": lambda rng, data: flipped(rng, data, 0, elements(bytes(data))[-1][1] + 8),
    "bits of the voxels": lambda rng, data: flipped(rng, data, 800, len(data), 40),
    "a tag removed": _element_removed,
    "a tag twice": _element_twice,
    "a tag garbled": _element_garbled,
    "a tag's length": _element_length,
    "cut": _cut,
    "noise": _noise,
    "nothing but noise": lambda rng, data: rng.bytes(len(data)),
    "mixed": lambda _, data: bytes(data),
}


def outcome(path: Path) -> tuple[str, int]:
    """Of loading a scan in a process of its own: 'good', 'refused' or what went wrong; peak bytes.

    The peak is of the process's memory, beyond what it had before.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(MOST_SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, text = _memory("VmRSS"), "good"
        try:
            scan = load_scan(path)
            if not (np.isfinite(scan.values).all() and min(scan.spacing_mm) > 0):
                text = "a bad result"
        except InputError as error:
            text = "refused" if "\n" not in str(error) else f"several lines: {error}"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"[:300]
        os.write(writer, json.dumps([text, _memory("VmHWM") - before]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if status or not answer:
        return f"killed by signal {status & 127}", 0
    text, peak = json.loads(answer)
    return text, peak


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


def survey(kind: str, count: int, seed: int = 0) -> dict[str, object]:
    """Counts of what became of `count` files, the failures, and memory beside an honest file's."""
    files = {"nifti": nifti_files, "itk": itk_files, "dicom": dicom_folders}[kind]
    counts: collections.Counter[str] = collections.Counter()
    failures, peaks, began = [], [0], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        honest = _honest(kind, Path(folder, "honest"))
        Path(folder, "cases").mkdir()
        for index, (what, path) in enumerate(files(count, seed, Path(folder, "cases"))):
            text, peak = outcome(path)
            counts[text if text in ("good", "refused") else "uncaught"] += 1
            peaks.append(peak)
            if text not in ("good", "refused"):
                failures.append(f"{index} ({what}): {text}")
    return {
        "counts": dict(counts),
        "failures": failures,
        "honest_peak": honest,
        "largest_peak": max(peaks),
        "beyond": sum(peak > 3 * honest for peak in peaks),
        "seconds": round(time.monotonic() - began, 1),
    }


def _honest(kind: str, folder: Path) -> int:
    """Peak bytes of loading the undamaged file."""
    folder.mkdir()
    if kind == "dicom":
        volume = np.ascontiguousarray(scan_voxels((48, 48, 12)).T)
        path = write_series(folder / "series", volume)
    else:
        path = folder / "a.nii.gz"
        nib.Nifti1Image(scan_voxels(), np.diag([-5.0, -5, 6, 1])).to_filename(path)
    text, peak = outcome(path)
    if text != "good":
        raise AssertionError(text)
    return peak


if __name__ == "__main__":
    print(json.dumps(survey(sys.argv[1], *map(int, sys.argv[2:])), indent=1))
