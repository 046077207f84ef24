"""Where the pages of predicted scans are, for the page of an evaluation to lead to."""

import os
import pathlib
from collections.abc import Mapping
from urllib.parse import quote

from deepsc_jax.inference.identity import RESULT, read_result
from deepsc_jax.inference.privacy import is_private, place
from deepsc_jax.report.scan_page import PAGE


def addresses(
    predictions: pathlib.Path, scans: Mapping[str, str | os.PathLike[str]], out: pathlib.Path
) -> dict[str, str]:
    """The address of each case's page, from `out`, where `predictions` has a result of its scan.

    A result is known by the path of the scan that it says it is of, never by a name.

    Args:
      predictions: the folder that `predict` wrote.
      scans: the path of each case's scan.
      out: the folder of the page that is to lead there.
    """
    pages: dict[str, pathlib.Path] = {}
    for file in sorted(predictions.rglob(RESULT)):
        result = read_result(file.parent)
        if result is not None and PAGE in result["files"] and (file.parent / PAGE).is_file():
            pages.setdefault(result["scan"], file.parent / PAGE)
    paths = {name: pathlib.Path(scan) for name, scan in scans.items()}
    places = {name: place(path, private=is_private(path)) for name, path in paths.items()}
    return {
        name: quote(os.fsencode(os.path.relpath(pages[place], out)))
        for name, place in places.items()
        if place in pages
    }
