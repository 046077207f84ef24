"""NiiVue, the viewer in a scan's page, from the wheel that ships it.

It is read from the installed `ipyniivue` (the extra `report`) when a page is written, and is no
part of this package. That wheel is a Jupyter widget: its script keeps the viewer to itself, and
waits for a notebook. A line that is added to it hands the viewer's class to the page.
"""

import functools
import importlib.metadata
import re
from dataclasses import dataclass

WHEEL = "ipyniivue"
_SCRIPT = "ipyniivue/static/widget.js"
# Where the widget makes its viewer: the class has a short name, which each build chooses anew.
_CLASS = re.compile(r'"Creating new Niivue instance"\).{0,200}?=\s*new ([\w$]+)\(', re.DOTALL)
_FITS = re.compile(r"2\.4(\.|$)")


@dataclass(frozen=True)
class Viewer:
    """A viewer that a page can drive.

    Attributes:
      script: of a module that sets `globalThis.Niivue`, whole.
      licence: its text.
      name: of the viewer and the wheel it came in.
    """

    script: str
    licence: str
    name: str


@functools.cache
def installed() -> Viewer | None:
    """The viewer of the installed wheel; None without one that a page can drive."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = {file.as_posix(): file for file in wheel.files or ()}
    licences = [file for name, file in files.items() if re.search(r"/LICEN[CS]E[^/]*$", name)]
    if not _FITS.match(wheel.version) or _SCRIPT not in files or not licences:
        return None
    script = drivable(files[_SCRIPT].read_text("utf-8"))
    licence = "\n\n".join(file.read_text("utf-8").strip() for file in licences)
    return None if script is None else Viewer(script, licence, f"NiiVue ({WHEEL} {wheel.version})")


def drivable(widget: str) -> str | None:
    """The script of the widget with its viewer handed out; None where it is not found in it."""
    viewer = _CLASS.search(widget)
    return None if viewer is None else f"{widget}\nglobalThis.Niivue = {viewer[1]};\n"
