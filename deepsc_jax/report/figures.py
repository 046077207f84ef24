"""What all pictures share.

Figures are drawn without pyplot: no display, no global state, safe in threads. Colours are from
Okabe and Ito's colour-blind-safe set, heat from matplotlib's viridis.
"""

import io
import os
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepsc_jax.runtime.files import aside


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure aside and renames it: the file appears whole or not at all."""
    path = pathlib.Path(path)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    with aside(path) as partial:
        partial.write_bytes(picture.getvalue())
