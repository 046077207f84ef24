"""The page of a scan: its slices, what was found in them, and on what evidence."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax.report import volumes
from deepsc_jax.report.document import asset, data, document, image
from deepsc_jax.report.lesions import lesions
from deepsc_jax.report.pictures import LUNG_WINDOW_HU, PREDICTED
from deepsc_jax.report.scan_tables import (
    Findings,
    lesion_table,
    probability_bars,
    provenance,
    volume_list,
)
from deepsc_jax.report.viewer import Viewer
from deepsc_jax.report.viewer_blocks import heat_colours, plain_colours, script_block
from deepsc_jax.runtime.files import aside
from deepsc_jax.runtime.types import JsonObject

PAGE = "report.html"
MOST_LESIONS = 50
RANGE_HU = (-1024.0, 500.0)
"""What 8 bit stand for: every window below lies in it, or beyond it on the side of air."""
WINDOWS_HU = {
    "Lung": (-1350.0, 150.0),
    "Wide": LUNG_WINDOW_HU,
    "Mediastinum": (-135.0, 215.0),
}
SMALL_PARTS = 400_000
"""Bytes that are left for a page's texts and the lungs of its 3D view."""
COARSEST = 16
MAP_MM = 1.5
"""Voxels of evidence and probability are not finer: the network's own are coarser."""
SPACE_MM = 3.0
"""Voxels of the 3D view are not finer: it shows shapes."""


@dataclass(frozen=True)
class Shown:
    """A volume of the page, and how it is drawn and said.

    Attributes:
      name: of it in the page.
      kind: `image`, `mask` or `map`.
      array: (D, H, W).
      low: value that 0 of 255 stands for.
      high: value that 255 stands for.
      window: the values drawn as the first and the last colour.
      colours: the name of the colours.
      title: of its switch.
      says: what is said before its value under the cross-hair.
      unit: after it.
      digits: of it.
      opacity: at first, per cent; 0 for switched off.
    """

    name: str
    kind: str
    array: np.ndarray = dataclasses.field(repr=False)
    low: float
    high: float
    window: tuple[float, float]
    colours: str
    title: str
    says: str
    unit: str = ""
    digits: int = 2
    opacity: int = 0


def scan_page(
    path: str | os.PathLike[str],
    viewer: Viewer,
    values: Float[np.ndarray, "D H W"],
    lung_mask: Bool[np.ndarray, "D H W"],
    findings: Findings,
    result: JsonObject,
    *,
    spacing_mm: Sequence[float],
    title: str,
    picture: pathlib.Path,
    hu: bool = True,
) -> None:
    """Write the page of a scan, which opens from disk and needs nothing else.

    Args:
      path: of the page; it appears whole or not at all.
      viewer: that draws the slices.
      values: the scan in canonical order; HU, or an image's own unit.
      lung_mask: of it; the page is cut to it and a margin.
      findings: what was found.
      result: result.json's object, without its files.
      spacing_mm: voxel size in (D, H, W) order.
      title: the scan's name.
      picture: the PNG that is shown where the viewer cannot be.
      hu: whether `values` are HU.
    """
    cut = volumes.around(lung_mask, spacing_mm)
    drawn = _drawn(values, findings, hu=hu)
    script, still = script_block(viewer), _fallback(picture)
    cut, encoded = _fitted(drawn, cut, spacing_mm, len(script) + len(still))
    encoded["lungs"] = _lungs(lung_mask, cut, spacing_mm)
    measured, total = [], 0
    if findings.lesion_mask is not None:
        measured, total = lesions(findings.lesion_mask, values, spacing_mm, MOST_LESIONS)
    at = measured[0].at if measured else _middle(findings.evidence, lung_mask)
    blocks = [
        data("scan", _description(drawn, cut, values.shape, spacing_mm, at)),
        *(
            f'<script type="text/plain" id="volume-{name}">{letters}</script>'
            for name, letters in encoded.items()
        ),
        script,
    ]
    windows = WINDOWS_HU if hu else {}
    body = "\n".join(
        [
            "<main>",
            f"<section>{_stage(drawn, cut, values.shape, windows)}{still}</section>",
            f"<aside>{probability_bars(result)}",
            volume_list(result, findings, lung_mask, spacing_mm),
            lesion_table(measured, total, findings, hu=hu),
            provenance(result, viewer, cut),
            "</aside></main>",
            *blocks,
        ]
    )
    with aside(pathlib.Path(path)) as partial:
        page = document(title, body, asset("scan.js"), loaded=[viewer.script])
        partial.write_text(page, "utf-8")


def _drawn(values: np.ndarray, findings: Findings, *, hu: bool) -> list[Shown]:
    """The volumes of the page, the scan first."""
    low, high = RANGE_HU if hu else (0.0, float(values.max()))
    window = WINDOWS_HU["Lung"] if hu else (low, high)
    unit = " HU" if hu else ""
    shown = [Shown("ct", "image", values, low, high, window, "gray", "Scan", "value", unit, 0)]
    if findings.lesion_mask is not None:
        mask = findings.lesion_mask
        shown.append(
            Shown("lesion", "mask", mask, 0, 1, (0, 1), "lesion", "Lesions", "lesion", opacity=45)
        )
    for name, array, title in (
        ("evidence", findings.evidence, "Evidence"),
        ("probability", findings.lesion_probability, "Lesion probability"),
    ):
        if array is not None:
            shown.append(
                Shown(name, "map", array, 0, 1, (0, 1), "heat", title, title.lower(), opacity=0)
            )
    return shown


def _fitted(
    drawn: Sequence[Shown], cut: volumes.Cut, spacing_mm: Sequence[float], others: int
) -> tuple[volumes.Cut, dict[str, str]]:
    """The volumes in base64, no finer than a page of bearable size allows, and their cut.

    `others`: bytes of the page's other large parts.
    """
    room = volumes.MOST_BYTES - others - SMALL_PARTS
    while True:
        encoded = {each.name: _encoded(each, cut, spacing_mm) for each in drawn}
        if sum(map(len, encoded.values())) <= room or min(cut.step) >= COARSEST:
            return cut, encoded
        cut = volumes.halved(cut, spacing_mm)


def _encoded(shown: Shown, cut: volumes.Cut, spacing_mm: Sequence[float]) -> str:
    step = _step(shown, cut, spacing_mm)
    part = volumes.coarser(shown.array[cut.box], step, largest=shown.kind == "mask")
    size = [mm * by for mm, by in zip(spacing_mm, step, strict=True)]
    as_bytes = volumes.as_bytes(part, shown.low, shown.high)
    return volumes.encoded(as_bytes, size, shown.low, shown.high)


def _step(shown: Shown, cut: volumes.Cut, spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """How many voxels of the scan make one of a volume."""
    return volumes.at_least(cut.step, spacing_mm, MAP_MM) if shown.kind == "map" else cut.step


def _lungs(mask: np.ndarray, cut: volumes.Cut, spacing_mm: Sequence[float]) -> str:
    """The lungs as the 3D view has them."""
    step = volumes.at_least(cut.step, spacing_mm, SPACE_MM)
    part = volumes.coarser(mask[cut.box].astype(np.float32), step)
    size = [mm * by for mm, by in zip(spacing_mm, step, strict=True)]
    return volumes.encoded(volumes.as_bytes(part, 0, 1), size, 0, 1)


def _middle(evidence: np.ndarray | None, lung_mask: np.ndarray) -> tuple[int, int, int]:
    """Where a page without lesions begins: the strongest evidence, or the lungs' middle."""
    if evidence is not None and evidence.any():
        place = np.unravel_index(int(evidence.argmax()), evidence.shape)
        return int(place[0]), int(place[1]), int(place[2])
    cut = volumes.around(lung_mask, (1, 1, 1), 0)
    depth, height, width = ((a + b) // 2 for a, b in zip(cut.start, cut.stop, strict=True))
    return depth, height, width


def _description(
    drawn: Sequence[Shown],
    cut: volumes.Cut,
    size: tuple[int, ...],
    spacing_mm: Sequence[float],
    at: tuple[int, int, int],
) -> JsonObject:
    """What the page's script is told."""
    keys = ["name", "kind", "low", "high", "window", "colours", "says", "unit", "digits"]
    told = [
        {key: getattr(each, key) for key in keys} | {"step": _step(each, cut, spacing_mm)}
        for each in drawn
    ]
    lungs: JsonObject = {"name": "lungs", "colours": "lungs", "window": [0, 1]}
    lungs["step"] = volumes.at_least(cut.step, spacing_mm, SPACE_MM)
    spaces = ["lungs", *(each.name for each in drawn if each.kind == "mask")]
    shape = [
        math.ceil((stop - start) / by)
        for start, stop, by in zip(cut.start, cut.stop, cut.step, strict=True)
    ]
    return {
        "size": list(size),
        "shape": shape,
        **dataclasses.asdict(cut),
        "at": at,
        "volumes": told,
        "all": {each["name"]: each for each in told} | {"lungs": lungs},
        "space": spaces,
        "colours": {
            "lesion": plain_colours(PREDICTED, 255),
            "lungs": plain_colours("#9ab7cc", 8),
            "heat": heat_colours(),
        },
    }


def _stage(
    drawn: Sequence[Shown],
    cut: volumes.Cut,
    size: tuple[int, ...],
    windows: Mapping[str, tuple[float, float]],
) -> str:
    """The canvases and what moves them."""
    views = {"all": "All", "axial": "Axial", "coronal": "Coronal", "sagittal": "Sagittal"}
    views["3d"] = "3D"
    buttons = "".join(
        f'<button type="button" data-view="{name}" '
        f'aria-pressed="{"true" if name == "all" else "false"}">{title}</button>'
        for name, title in views.items()
    )
    presets = "".join(
        f'<button type="button" data-low="{low:g}" data-high="{high:g}" '
        f'aria-pressed="{"true" if name == "Lung" else "false"}" '
        f'title="{low:g} to {high:g} HU">{name}</button>'
        for name, (low, high) in windows.items()
    )
    sliders = "".join(
        f'<div class="slider"><label for="{name}">{name.capitalize()} slice</label>'
        f'<output id="{name}-at" for="{name}"></output>'
        f'<input type="range" id="{name}" min="{start + 1}" max="{stop}"></div>'
        for name, start, stop in zip(
            ("axial", "coronal", "sagittal"), cut.start, cut.stop, strict=True
        )
    )
    overlays = "".join(_switch(i, each) for i, each in enumerate(drawn) if each.kind != "image")
    window = f"<fieldset><legend>Window</legend>{presets}</fieldset>" if presets else ""
    return f"""
<div id="stage" hidden>
<div class="views both" id="views">
<div class="canvas"><canvas id="slices" tabindex="0" aria-describedby="keys"
  aria-label="Slices of the scan"></canvas></div>
<div class="canvas"><canvas id="space" tabindex="0" aria-describedby="keys"
  aria-label="The lungs and the lesions in 3D"></canvas></div>
</div>
<p class="place" id="place" role="status"></p>
<div class="controls">
<fieldset><legend>View</legend>{buttons}</fieldset>
{window}
{sliders}
{overlays}
</div>
<p class="note" id="keys">Click or drag in the slices to move the cross-hair, drag the 3D view to
turn it. Keys, once the slices are chosen: Page Up and Page Down for the axial slice, arrows for the
others; in the 3D view arrows turn it. R is the patient's right. Slices are counted from the lowest,
the foremost and the patient's rightmost of the whole scan of {size[0]} × {size[1]} × {size[2]}.</p>
</div>
"""


def _switch(index: int, shown: Shown) -> str:
    swatch = (
        f"background:{PREDICTED}"
        if shown.kind == "mask"
        else "background:linear-gradient(90deg,#440154,#3b528b,#21918c,#5ec962,#fde725)"
    )
    checked = " checked" if shown.opacity else ""
    return (
        f'<div class="slider"><label><input type="checkbox" id="show-{index}"{checked}> '
        f'<span class="swatch" style="{swatch}"></span>{shown.title}</label>'
        f'<output id="fade-{index}-at" for="fade-{index}"></output>'
        f'<input type="range" id="fade-{index}" min="0" max="100" step="5" '
        f'value="{shown.opacity or 60}" aria-label="Opacity of {shown.title.lower()}"></div>'
    )


def _fallback(picture: pathlib.Path) -> str:
    return (
        f'<figure id="fallback"><p class="note" id="why">The viewer is being opened. It needs '
        f'JavaScript and WebGL 2; the picture does not.</p><img src="{image(picture)}" '
        'alt="Slices with the predicted lesions, the evidence, and the class probabilities">'
        "</figure>"
    )
