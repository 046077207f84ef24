"""What a page hands to its viewer: the viewer's own script, and colours."""

import base64
import gzip

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from deepsc_jax.report.viewer import Viewer

Colours = dict[str, list[int]]
"""Red, green, blue, alpha and the intensity that each is of, all 0 to 255, as NiiVue has them."""


def script_block(viewer: Viewer) -> str:
    """The viewer's script, compressed, for the page's script to add to the page."""
    content = gzip.compress(viewer.script.encode("utf-8"), 9, mtime=0)
    letters = base64.b64encode(content).decode("ascii")
    return f'<script type="text/plain" id="viewer-script">{letters}</script>'


def plain_colours(colour: str, alpha: int) -> Colours:
    """One colour from nothing to `alpha`."""
    parts = [round(255 * part) for part in to_rgb(colour)]
    red, green, blue = ([part, part] for part in parts)
    return {"R": red, "G": green, "B": blue, "A": [0, alpha], "I": [0, 255]}


def heat_colours() -> Colours:
    """Viridis, seen through where it is low, as in the picture of a scan."""
    at = np.linspace(0, 1, 18)
    rgb = np.rint(255 * colormaps["viridis"](at)[:, :3]).astype(int)
    alpha = np.rint(255 * np.clip((at - 0.05) / 0.3, 0, 1)).astype(int)
    red, green, blue = rgb.T.tolist()
    levels = np.rint(255 * at).astype(int).tolist()
    return {"R": red, "G": green, "B": blue, "A": alpha.tolist(), "I": levels}
