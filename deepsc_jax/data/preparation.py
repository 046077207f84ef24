"""Making a store: each case loaded, preprocessed and written by one of several processes."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import secrets
import sys
from collections.abc import Iterator, Sequence

from deepsc_jax import __version__, config
from deepsc_jax.data import lungs, records, scans, store, unmasked, writing, xrays
from deepsc_jax.data.datasets import Case
from deepsc_jax.data.preprocess import Prepared
from deepsc_jax.data.sums import meanwhile
from deepsc_jax.runtime import lock
from deepsc_jax.runtime.errors import FileSystemError, InputError
from deepsc_jax.runtime.files import aside, write_json
from deepsc_jax.runtime.names import counted, shown
from deepsc_jax.runtime.pool import in_parallel

# Of a case's lesion voxels, outside of its lung mask: more than this is worth a line.
_LESION_OUTSIDE = 0.1
# What a store has, and one that is being made: all else in its folder is somebody else's.
_OURS = re.compile(
    r"(partial-[0-9a-f]{8}-)?index\.json"
    r"|(partial-[0-9a-f]{8}-)?salt"
    r"|records/[^/]+\.json"
    r"|cases/[^/]+/(partial-)?record\.json"  # of earlier versions
    r"|cases/[^/]+/(volume|lesion|lung|classes|lesion_voxels)/(zarr\.json|c(/\d+)+)(\.__lock)?"
)


def prepare(
    cases: Sequence[Case],
    out: pathlib.Path,
    data: config.DataConfig,
    *,
    workers: int = 2,
    overwrite: bool = False,
    contents: records.Contents = records.SCANS,
    private: bool = False,
) -> list[str]:
    """Preprocess `cases` into `out`/store, which appears only when it is complete.

    What a stopped run has done is found in `out`/store.partial, and not done again if it was made
    from the same configuration and the same bytes. `contents` says what the scans are; `private`
    stores a salted hash of each patient.

    Returns:
      One line for each case that could not be prepared and was left out. If that is all of them,
      there is no store.

    Raises:
      InputError: there is a store already, and `overwrite` does not allow to replace it; files that
        are not a store's lie where it is to be; nothing can be written; another process is at it.
    """
    with _alone(out):
        refuse_existing(out, overwrite)
        return _prepare(cases, out, data, workers, contents, private)


def _prepare(
    cases: Sequence[Case],
    out: pathlib.Path,
    data: config.DataConfig,
    workers: int,
    contents: records.Contents,
    private: bool,
) -> list[str]:
    final, partial = out / "store", out / "store.partial"
    with _written(out):
        (partial / "cases").mkdir(parents=True, exist_ok=True)
        if private:
            cases = _pseudonymised(cases, partial / "salt")
    job = functools.partial(prepare_case, folder=partial, data=data)
    failures, stored = [], []
    for case, result in zip(cases, in_parallel(job, cases, workers, "store"), strict=True):
        if isinstance(result, InputError):
            text = str(result)
            failures.append(text if text.startswith(f"{case.name}:") else f"{case.name}: {text}")
        else:
            stored.append(result)
    stored = _without_copies(stored, failures)
    with _written(out):
        if not stored:
            _remove(partial)
            return failures
        names = {record.name for record in stored}
        for folder in list((partial / "cases").iterdir()):
            if folder.name not in names:
                _remove(partial, f"cases/{folder.name}/")
        store.write_index(partial, data, stored, final, contents=contents)
        replaced = out / "store.replaced"
        if final.exists():
            _remove(replaced)  # of a run that was stopped here
            final.rename(replaced)
        _remove(partial, "salt")  # never in a finished store
        partial.rename(final)
        _remove(final, "records/")  # needed until here: a run that was stopped goes on with them
        _remove(replaced)
    return failures


def refuse_existing(out: pathlib.Path, overwrite: bool) -> None:
    """Raise InputError if `out` holds what may not be replaced.

    That is a store, unless `overwrite` allows it, and anything that is not a store's in the places
    that a store takes.
    """
    final = out / "store"
    if final.exists() and not overwrite:
        raise InputError(
            f"{final}: there is a store already: choose another --out, or replace it with "
            "--overwrite"
        )
    if final.exists() and not _is_store(final):
        raise InputError(
            f"{final}: exists and is not a store that prepare wrote, so it is not replaced: "
            "choose another --out, or move it away"
        )
    for folder in (final, out / "store.partial", out / "store.replaced"):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise InputError(
                f"{folder}: not a folder of prepare's own, so it is not replaced: choose another "
                "--out, or move it away"
            )
        foreign = [path for path in _files(folder) if not _OURS.fullmatch(path)]
        if foreign:
            others = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
            raise InputError(
                f"{folder / min(foreign)}{others}: not written by prepare, so it is not removed: "
                "choose another --out, or move it away"
            )


def prepare_case(case: Case, folder: pathlib.Path, data: config.DataConfig) -> records.StoredCase:
    """Load, preprocess and write one case into the store at `folder`, unless that is done.

    Raises:
      InputError: it cannot be prepared.
      FileSystemError: the store cannot be written to.
    """
    sources = {kind: getattr(case, kind) for kind in records.SOURCES}
    sources = {kind: path for kind, path in sources.items() if path is not None}
    done = folder / "records" / f"{case.name}.json"
    with meanwhile(sources) as summed:
        try:
            document = json.loads(done.read_text(encoding="utf-8"))
            if document["made_from"] == _made_from(case, data, summed.result()):
                return records.record_from_json(document["record"], folder.parent)
        except (OSError, KeyError, TypeError, ValueError):
            pass  # not begun, or stopped on the way
        prepared = _load_and_prepare(case, data)
        sums = summed.result()
    with _written(folder.parent):
        done.parent.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        record = writing.write_case(
            folder, case, prepared, sums=sums, lesion_free=data.lesion_free_id
        )
        made_from = _made_from(case, data, sums)
        document = {"made_from": made_from, "record": records.record_to_json(record, folder.parent)}
        write_json(document, done)
    return record


def _made_from(case: Case, data: config.DataConfig, sums: dict[str, str]) -> str:
    """A digest of what the stored case depends on: configuration, case, and its files' content."""
    facts = {
        "version": [records.VERSION, __version__],
        "data": dataclasses.asdict(data),
        "case": dataclasses.asdict(case),
        "sums": sums,
    }
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _load_and_prepare(case: Case, data: config.DataConfig) -> Prepared:
    _require_modality(case, data)
    if data.modality == "xray":
        xray, lesion, lung = xrays.load_case(case)
        _say(case, _of_lesions(case, data, lesion))
        return xrays.prepare(xray, data, lesion, lung, case.boxes, case.name)
    scan = scans.load_scan(case.scan, data.intensity, data.allow)
    notes: list[str] = []
    if case.lung_mask is None:
        lung = lungs.find_lungs(scan, data.intensity)
    else:
        lung = scans.load_mask(case.lung_mask, scan, "lung mask", data.allow, notes)
    lesion = None
    if case.lesion_mask is not None:
        lesion = scans.load_mask(case.lesion_mask, scan, "lesion mask", data.allow, notes)
        notes += _of_lesions(case, data, lesion)
        outside = (lesion & ~lung).sum() / max(int(lesion.sum()), 1)
        if data.mask == "lungs" and outside > _LESION_OUTSIDE:
            notes.append(
                f"{outside:.0%} of its lesion voxels lie outside of its lung mask, where the "
                "network sees nothing: check the lung mask"
            )
    _say(case, notes)  # they may tell why it is refused
    prepared = unmasked.prepare(scan, lung, data, lesion, data.allow)
    _say(case, prepared.notes)
    return prepared


def _require_modality(case: Case, data: config.DataConfig) -> None:
    """Raise InputError for an X-ray in a store of CT, and the reverse."""
    if case.modality not in ("", data.modality):
        raise InputError(
            f"{case.name}: its modality is {case.modality}, this store's {data.modality}: prepare "
            f"it with --modality={case.modality}, or drop it with --exclude={case.name}"
        )
    if case.boxes and data.modality == "ct":
        raise InputError(
            f"{case.name}: has boxes, which are of X-rays, and this store is of CT: empty the cell"
        )


def _of_lesions(case: Case, data: config.DataConfig, lesion: scans.Mask | None) -> list[str]:
    """What is to be said of a lesion mask.

    Raises:
      InputError: the case is of the class without lesions, and has some.
    """
    if lesion is None:
        return []
    voxels = int(lesion.sum())
    if voxels and case.label == data.lesion_free_id:
        raise InputError(
            f"{case.name}: labelled {data.lesion_free}, but {case.lesion_mask} has "
            f"{counted(voxels, 'lesion voxel')}, 0 expected: mend label or mask, or drop "
            f"the case with --exclude={case.name}"
        )
    if not voxels and case.label != data.lesion_free_id:
        return [f"its lesion mask {case.lesion_mask} is empty: check it"]
    return []


def _say(case: Case, notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {shown(case.name)}: {shown(note)}", file=sys.stderr)


def _without_copies(
    stored: Sequence[records.StoredCase], failures: list[str]
) -> list[records.StoredCase]:
    """The cases but for those whose scan is another's, which are added to `failures`.

    The same file twice, or what is the same image after preprocessing, such as a copy in another
    format.
    """
    seen: dict[str, str] = {}
    kept = []
    for case in stored:
        same = {case.sums["scan"], *(v for k, (_, v) in case.files.items() if "volume/c" in k)}
        first = next((seen[digest] for digest in same if digest in seen), None)
        if first is None:
            seen |= dict.fromkeys(same, case.name)
            kept.append(case)
        else:
            failures.append(
                f"{case.name}: its scan {case.scan} is the same as that of case {first}, each scan "
                f"once expected: drop one of them with --exclude={case.name}"
            )
    return kept


def _pseudonymised(cases: Sequence[Case], salt_file: pathlib.Path) -> list[Case]:
    """The cases, each patient by a salted hash; the salt is this store's and goes with its making.

    Without the salt nobody can try out which of a hospital's numbers has a hash.
    """
    if not salt_file.exists():
        with aside(salt_file) as partial:
            partial.write_text(secrets.token_hex(16), encoding="utf-8")
    salt = salt_file.read_bytes()

    def pseudonym(patient: str) -> str:
        # As patients are compared: upper and lower case alike.
        hashed = hashlib.sha256(salt + patient.casefold().encode("utf-8", "surrogateescape"))
        return f"sha256-{hashed.hexdigest()[:16]}"

    return [dataclasses.replace(case, patient=pseudonym(case.patient)) for case in cases]


def _is_store(folder: pathlib.Path) -> bool:
    """Whether the folder has an index that some version of this program wrote."""
    try:
        document = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"version", "data", "cases"} <= document.keys()


def _files(folder: pathlib.Path) -> list[str]:
    """What lies below the folder, by path from there; links are not followed."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in paths]


def _remove(folder: pathlib.Path, start: str = "") -> None:
    """Remove what is a store's below the folder, where its path begins so; empty folders too."""
    for path in _files(folder):
        if path.startswith(start) and _OURS.fullmatch(path):
            (folder / path).unlink()
    below = sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else []
    for path in [*below, folder]:
        if path.is_dir() and f"{path.relative_to(folder).as_posix()}/".startswith(start):
            with contextlib.suppress(OSError):  # somebody else's file is in it
                path.rmdir()


@contextlib.contextmanager
def _alone(out: pathlib.Path) -> Iterator[None]:
    """Keep the making of a store in `out` to this process, by a lock beside it."""
    folder, held = out / "store.lock", False
    try:
        with lock.locked(folder, "preparation"):
            held = True
            yield
    finally:
        if held:
            (folder / lock.NAME).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another process has begun, or left a file
                folder.rmdir()


@contextlib.contextmanager
def _written(out: pathlib.Path) -> Iterator[None]:
    """Turn a failure to write below `out` into the line that ends the program."""
    try:
        yield
    except OSError as error:
        raise FileSystemError(
            f"--out: {out} cannot be written to ({error.strerror or error}): make room or give "
            "yourself the right; what is done is kept, the same command goes on"
        ) from error
