"""Files and folders that appear whole or not at all."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to, beside `path`; renamed to it at the end, removed where that fails."""
    partial = path.with_name(f"partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to fill, beside `path`; it takes the place of what is at `path` at the end."""
    partial, replaced = (path.with_name(f"{kind}-{path.name}") for kind in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def write_json(document: Any, path: pathlib.Path) -> None:
    """Write strict JSON; None stands for what is not a number.

    Raises:
      ValueError: the document holds NaN or an infinity.
    """
    with aside(path) as partial:
        partial.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
