"""What all pictures share.

Figures are drawn without pyplot: no display, no global state, safe in threads. Colours are from
Okabe and Ito's colour-blind-safe set, heat from matplotlib's viridis.
"""

import io
import os
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from deepsc_jax.runtime.files import aside
from deepsc_jax.runtime.names import shown


def drawn(name: str) -> str:
    """A name as matplotlib draws it: no part of it is mathematics, and no letter is an empty box.

    Letters that the font lacks, such as Chinese ones, are escaped.
    """
    glyphs = [
        get_font(findfont(FontProperties(weight=w))).get_charmap() for w in ("normal", "bold")
    ]
    letters = [
        letter
        if all(ord(letter) in font for font in glyphs)
        else letter.encode("unicode_escape").decode("ascii")
        for letter in shown(name)
    ]
    return "".join(letters).replace("$", r"\$")


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure aside and renames it: the file appears whole or not at all."""
    path = pathlib.Path(path)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    with aside(path) as partial:
        partial.write_bytes(picture.getvalue())
