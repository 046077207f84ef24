"""Why a scan has no result, in one line: what a user can mend, and what is ours to."""

import contextlib
import errno
import hashlib
import os
import pathlib
import traceback

from deepsc_jax import __version__
from deepsc_jax.inference.request import Request
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.names import shown

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "give yourself the right",
    errno.EROFS: "give another --out",
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer --workers",
}


def told(error: Exception, request: Request, out: pathlib.Path) -> str:
    """As `explained`, without paths and texts of a scan of which none may be told.

    What went wrong in this program or in a library may quote a tag: its type and place are told,
    and its words are not.
    """
    if not request.private:
        return explained(error, request.path, out)
    known = isinstance(error, InputError | MemoryError | OSError)
    if not known and "RESOURCE_EXHAUSTED" not in str(error):
        words = f"{type(error).__name__}, whose words may be a patient's and are left out"
        error = RuntimeError(words).with_traceback(error.__traceback__)
    return request.without_names(explained(error, pathlib.Path(request.name), out))


def explained(error: Exception, scan: pathlib.Path, out: pathlib.Path) -> str:
    """One line about what went wrong with a scan.

    Bad input, a full or failing disk, and want of memory are the user's to mend. All else is a
    defect of this program: its traceback goes to a file in `out`, once for each place in the code.
    """
    if isinstance(error, InputError):
        return shown(str(error))
    if isinstance(error, MemoryError):
        return shown(
            f"{scan}: there is not enough memory for it: use fewer --workers, another machine, or "
            "crop the scan"
        )
    if isinstance(error, OSError):
        name = error.filename
        where = f": {os.fsdecode(name)}" if isinstance(name, str | bytes | os.PathLike) else ""
        advice = _ADVICE.get(error.errno or 0, "check the disk")
        return shown(f"{scan}: {error.strerror or error}{where}: {advice}, then start again")
    what = f"{scan}: {type(error).__name__}: {error}"
    if "RESOURCE_EXHAUSTED" in str(error):  # as XLA says it, whose exception JAX has the type of
        what = str(error).splitlines()[0]
        return shown(f"{scan}: the device lacks memory for it ({what}): use a larger one")
    log = _log(error, scan, out)
    return shown(f"{what}: an error of this program: please report it{log}")


def _log(error: Exception, scan: pathlib.Path, out: pathlib.Path) -> str:
    """Write the traceback to a file, unless one of that place is there; says where it is."""
    place = f"{__version__} {type(error)} {traceback.format_tb(error.__traceback__)}"
    path = out / f"error-{hashlib.sha256(place.encode()).hexdigest()[:12]}.log"
    text = f"deepsc_jax {__version__}, {scan}\n{''.join(traceback.format_exception(error))}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), path.open("xb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError:
        return ""
    return f" with {path}"
