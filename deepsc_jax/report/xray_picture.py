"""The picture of an X-ray: the image, its Grad-CAM in pseudo-colours, and the classes."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image

from deepsc_jax.report.figures import drawn, save_png
from deepsc_jax.report.pictures import NOT_CLINICAL, draw_probabilities
from deepsc_jax.runtime.files import aside
from deepsc_jax.runtime.names import shown

Grey = Float[np.ndarray, "height width"]


def jet(values: Grey) -> UInt8[np.ndarray, "height width 3"]:
    """Pseudo-colours of [0, 1], blue to red: OpenCV's COLORMAP_JET to within a level of 255."""
    colours = 1.5 - np.abs(4 * values[..., None] - np.array([3.0, 2.0, 1.0]))
    return np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8)


def overlay(image: Grey, heat: Grey) -> UInt8[np.ndarray, "height width 3"]:
    """Half the image and half the heat in pseudo-colours, both of [0, 1]."""
    grey = 255 * image[..., None]
    return np.rint((grey + jet(heat)) / 2).astype(np.uint8)


def save_overlay(path: pathlib.Path, image: Grey, heat: Grey) -> None:
    """Write the overlay as a PNG of the image's own size, which appears whole or not at all."""
    with aside(path) as partial:
        Image.fromarray(overlay(image, heat)).save(partial, "PNG")


def xray_picture(
    path: str | os.PathLike[str],
    image: Grey,
    heat: Grey | None,
    class_probabilities: Mapping[str, float] | None,
    *,
    title: str,
    trained_on: str,
    values: Mapping[str, float] | None = None,
) -> None:
    """Write a PNG of an X-ray, of what the network looked at, and of the classes.

    Args:
      path: of the PNG; it appears whole or not at all.
      image: of [0, 1].
      heat: Grad-CAM for the most probable class, 0 to 1, where 1 is this image's most; or None.
      class_probabilities: by class name, or None.
      title: what is shown.
      trained_on: what the network was trained on; if not X-rays, the footer says it.
      values: numbers by name, which stand in the place of classes.
    """
    figure = Figure(figsize=(12, 5), facecolor="white")
    grid = figure.add_gridspec(1, 3, width_ratios=[1, 1, 0.8], left=0.02, right=0.97, wspace=0.08)
    panels = [("X-ray", image)]
    if heat is not None:
        panels.append(("Grad-CAM: red is this image's most", overlay(image, heat)))
    for column, (name, pixels) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=12)
        axes.set_axis_off()
    draw_probabilities(figure.add_subplot(grid[0, 2]), class_probabilities, values)
    title = shown(title)
    title = title if len(title) <= 90 else f"{title[:43]}…{title[-44:]}"
    figure.text(0.02, 0.95, drawn(title), va="center", fontsize=15, fontweight="bold")
    footer = NOT_CLINICAL
    if trained_on != "X-rays":
        footer = f"network trained on {drawn(trained_on)}; {NOT_CLINICAL}"
    figure.text(0.97, 0.04, footer, ha="right", va="center", fontsize=11, color="#555555")
    save_png(figure, path)
