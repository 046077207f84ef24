"""What stands beside the slices on a scan's page: probabilities, volumes, lesions, provenance."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax import __version__
from deepsc_jax.metrics.findings import PERIPHERY_MM, peripheral_ratio
from deepsc_jax.report import volumes
from deepsc_jax.report.document import facts, table, text
from deepsc_jax.report.lesions import Lesion
from deepsc_jax.report.pictures import SPELLED_OUT
from deepsc_jax.report.viewer import Viewer
from deepsc_jax.runtime.names import counted
from deepsc_jax.runtime.types import JsonObject


@dataclass(frozen=True)
class Findings:
    """What was found in a scan, each (D, H, W) on its grid, or None.

    Attributes:
      lesion_mask: the predicted lesions.
      lesion_probability: 0 to 1.
      evidence: the finest map, 0 to 1, in the lungs.
    """

    lesion_mask: Bool[np.ndarray, "D H W"] | None = None
    lesion_probability: Float[np.ndarray, "D H W"] | None = None
    evidence: Float[np.ndarray, "D H W"] | None = None


def probability_bars(result: JsonObject) -> str:
    """The probability of each class as a bar; nothing of a network without classes."""
    if "probabilities" not in result:
        return ""
    bars = []
    for name, share in result["probabilities"].items():
        said = html.escape(SPELLED_OUT[name]) if name in SPELLED_OUT else text(name)
        best = ' class="best"' if name == result["class"] else ""
        bars.append(
            f'<li{best}><span>{said}</span><span class="number">{100 * share:.1f} %</span>'
            f'<progress value="{share:g}" max="1" aria-label="{said}"></progress></li>'
        )
    return (
        f'<h2>Probability of each class</h2><ul class="bars">{"".join(bars)}</ul>'
        '<p class="note">What the network gives, and no finding.</p>'
    )


def volume_list(
    result: JsonObject,
    findings: Findings,
    lung_mask: np.ndarray,
    spacing_mm: Sequence[float],
) -> str:
    """The volumes of lungs and lesions, and the lesions' share and peripheral ratio."""
    pairs = [("Lungs", f"{result['lung_ml']:.0f} ml")]
    if findings.lesion_mask is not None:
        pairs.append(("Lesions", f"{result['lesion_ml']:.1f} ml"))
        pairs.append(("LVR", f"{100 * result['lesion_share_of_lung']:.2f} % of the lungs' volume"))
        box = volumes.around(lung_mask, spacing_mm, 0).box
        if findings.lesion_mask[box].any():
            ratio = peripheral_ratio(findings.lesion_mask[box], lung_mask[box], spacing_mm)
            pairs.append(
                ("PLR", f"{100 * ratio:.1f} % of them within {PERIPHERY_MM:g} mm of the edge")
            )
    return f"<h2>Volumes</h2>{facts(pairs)}"


def lesion_table(measured: Sequence[Lesion], total: int, findings: Findings, *, hu: bool) -> str:
    """The largest lesions, a row each, whose number leads there."""
    if findings.lesion_mask is None:
        return ""
    if not measured:
        return "<h2>Lesions</h2><p>None.</p>"
    head = ["Lesion", "ml", "Extent, mm", "Mean HU" if hu else "Mean", "Slice"]
    rows = []
    for number, each in enumerate(measured, start=1):
        button = (
            f'<button type="button" data-at="[{each.at[0]},{each.at[1]},{each.at[2]}]" '
            f'aria-label="Show lesion {number}">{number}</button>'
        )
        extent = " × ".join(f"{mm:.0f}" for mm in each.extent_mm)
        mean = f"{each.mean:.0f}".replace("-", "−") if hu else f"{each.mean:.2f}"
        rows.append([button, f"{each.ml:.2f}", extent, mean, str(each.at[0] + 1)])
    more = f" The {len(measured)} largest of {total}." if total > len(measured) else ""
    return (
        f"<h2>{counted(total, 'lesion').capitalize()}</h2>{table(head, rows, numbers=4)}"
        f'<p class="note">Connected parts of the mask; press a number to go there. '
        f"Extent: height × front to back × side to side.{more}</p>"
    )


def provenance(result: JsonObject, viewer: Viewer, cut: volumes.Cut) -> str:
    """Notes, what the page was made from and by, and the viewer's licence."""
    pairs = [("Network", f"trained on {text(result['trained_on'])}, stage {text(result['stage'])}")]
    if "lesion_threshold" in result:
        pairs.append(("Lesion", f"probability of at least {result['lesion_threshold']:g}"))
    given = "given" if result.get("lung_mask_sha256") else "found"
    pairs.append(("Lung mask", given))
    if cut.step != (1, 1, 1):
        shown = " × ".join(map(str, cut.step))
        pairs.append(("Shown", f"one voxel for {shown} of the scan, to keep the page small"))
    for key, name in (("sha256", "Scan, SHA-256"), ("lung_mask_sha256", "Lungs, SHA-256")):
        if result.get(key):
            pairs.append((name, _digest(result[key])))
    pairs.append(("Network, SHA-256", _digest(result["made_from"]["network"])))
    pairs += [("Program", f"deepsc_jax {__version__}"), ("Viewer", text(viewer.name))]
    notes = "".join(f"<li>{text(note)}</li>" for note in result.get("notes", ()))
    said = f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""
    licence = html.escape(viewer.licence)
    return (
        f"{said}<h2>Made from</h2>{facts(pairs)}<details><summary>Licence of the viewer</summary>"
        f"<pre>{licence}</pre></details>"
    )


def _digest(digest: str) -> str:
    """The beginning of a sum, which tells it from others; result.json has it whole."""
    return f"<code>{text(digest[:16])}…</code>"
